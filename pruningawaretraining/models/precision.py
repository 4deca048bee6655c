"""The precision that a model computes in: float64 for a while, no shortcuts of hardware, and what rounding does.

A model in float64 is the same modules with other tensors in them: each module's own ``__dict__`` is remembered, copies
of its parameters, buffers and plain tensors in float64 take their places, and afterwards every ``__dict__`` is as it
was. So hooks act, tied weights are tied, closures over the model see it, and no tensor of the user's is touched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pruningawaretraining.distributed.fsdp import is_sharded
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.fake_quant import is_converted
from pruningawaretraining.models.trees import map_tensors

_MIXING = ("mm", "mv", "dot", "conv", "attention", "rnn", "linear")
"""Parts of the names of operations that sum products, which hardware may compute in lower precision."""
_STEPS = 1.0  # how far operands are moved, in units of the last place: twice what rounding does at most
_PROBED = 2.5  # the same in root mean squares of the error of one product


class _Copies:
    """float64 copies of tensors, in nests of plain containers; the copy of one thing is one thing."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, Tensor) and _is_cast(value):
            self._made[id(value)] = _in_float64(value)
        elif type(value) in (dict, OrderedDict):
            new = self._made[id(value)] = type(value)()
            new.update({key: self.of(one) for key, one in value.items()})
        elif type(value) is list:
            made: list[Any] = []
            self._made[id(value)] = made
            made.extend(self.of(one) for one in value)
        elif type(value) is tuple:
            self._made[id(value)] = tuple(self.of(one) for one in value)
        return self._made.get(id(value), value)


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _in_float64(tensor: Tensor) -> Tensor:
    new = tensor.detach().to(torch.float64)
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def inputs_in_float64(nest: Any) -> Any:
    """The same nest with its floating point tensors in float64."""
    return map_tensors(lambda one: one.detach().to(torch.float64) if _is_cast(one) else one, nest)


@contextmanager
def in_float64(models: Iterable[nn.Module]) -> Iterator[None]:
    """The models, which may share tensors, with float64 in place of any other floating point inside the block.

    Raises:
        ModelError: they hold tensors of special kinds (sharded, quantized), are scripted, or the copies do not fit into
            the memory that is left. Devices without float64, or without the memory, raise what PyTorch raises there.
    """
    modules = list({id(module): module for model in models for module in model.modules()}.values())
    _refuse_what_has_none(modules)
    untouched = vars(nn.Module()).keys() - {"_parameters", "_buffers"}
    saved = [(module, dict(vars(module))) for module in modules]
    copies = _Copies()
    try:
        for module, attributes in saved:
            own = vars(module)
            own.update({name: copies.of(value) for name, value in attributes.items() if name not in untouched})
        yield
    finally:
        _put_back(saved)


def _put_back(saved: Iterable[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Give modules their attributes back; an interrupt waits until all have theirs."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for module, attributes in saved:
                own = vars(module)
                own.update(attributes)
                for name in own.keys() - attributes.keys():
                    del own[name]
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _refuse_what_has_none(modules: Iterable[nn.Module]) -> None:
    tensors: dict[int, Tensor] = {}
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{type(module).__name__}: scripted modules have no float64 form")
        own = (*module._parameters.values(), *module._buffers.values())
        tensors.update({id(one): one for one in own if one is not None})
    for one in tensors.values():
        if is_sharded(one) or is_converted(one):
            raise ModelError(f"{type(one).__name__}: tensors of this kind have no float64 form")
    needed = sum(8 * one.numel() for one in tensors.values() if _is_cast(one) and one.device.type == "cpu")
    if needed > _free_memory():
        raise ModelError(f"float64: copies of the weights take {needed:,} bytes, and so many are not free")


def _free_memory() -> float:
    """Bytes of main memory that can be had without swapping; infinite where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return float("inf")
    lines = dict(line.split(":", 1) for line in file.read_text(encoding="ascii").splitlines())
    return 1024.0 * float(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else float("inf")


@contextmanager
def strict_float32() -> Iterator[None]:
    """float32 products are computed in float32 inside the block, not in TF32 or bfloat16; the settings are put back."""
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9; the older settings must not be mixed with these
        cuda, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
        places: list[Any] = [cuda, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn]  # type: ignore[attr-defined]
        coarse = [(place, place.fp32_precision) for place in places if place.fp32_precision in ("tf32", "bf16")]
        try:
            for place, _ in coarse:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, before in coarse:
                place.fp32_precision = before
        return
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations see their floating point operands as rounding may have left them: each value a little off, by chance.

    Every value is off by up to one unit in the last place of its own dtype, so that code that leaves float64 on its way
    is judged by the precision that it uses; operands of products by as much as products are found to be off on this
    device (TF32, say), if that is more. How far the outputs move is what rounding can do in this model, cancellation
    included (Monte Carlo arithmetic; Parker, "Monte Carlo arithmetic", 1997).

    Args:
        seed: of the random errors, which are drawn apart from PyTorch's generators.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._products: dict[tuple[torch.device, torch.dtype], float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema, kwargs = func._schema, kwargs or {}
        returned = schema.returns[0].alias_info if schema.returns else None
        if returned is not None and not returned.is_write:  # a view computes nothing
            return func(*args, **kwargs)
        written = {one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write}
        sums = any(part in schema.name for part in _MIXING)

        def moved(name: str, value: Any) -> Any:
            return value if name in written else tree_map(lambda one: self._moved(one, sums), value)

        names = [one.name for one in schema.arguments]
        args = tuple(moved(name, value) for name, value in zip(names, args, strict=False))
        return func(*args, **{name: moved(name, value) for name, value in kwargs.items()})

    def _moved(self, value: Any, sums: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta or is_sharded(value):
            return value
        wide = value if value.dtype is torch.float64 else value.float()
        most = self._step(value.device, value.dtype, sums)
        noise = torch.empty(value.shape, dtype=wide.dtype).uniform_(-most, most, generator=self._generator)
        moved = torch.addcmul(wide, wide, noise.to(value.device))
        return torch.where(torch.isfinite(wide), moved, wide).to(value.dtype)

    def _step(self, device: torch.device, dtype: torch.dtype, sums: bool) -> float:
        step = _STEPS * torch.finfo(dtype).eps
        if not sums or dtype is torch.float64:
            return step
        if (device, dtype) not in self._products:
            self._products[device, dtype] = product_error(device, dtype)
        return max(step, _PROBED * self._products[device, dtype])


def product_error(device: torch.device, dtype: torch.dtype) -> float:
    """The relative error (root mean square) of one product in a matrix multiplication or a convolution, measured."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 64, 8, 8), (64, 64, 3, 3)))
    a, b = x.reshape(64, 64), w[:, :, 0, 0].contiguous()
    found = torch.mm(a.to(device), b.to(device)), _convolved(x.to(device), w.to(device))
    a, b, x, w = a.double(), b.double(), x.double(), w.double()
    exact = torch.mm(a, b), _convolved(x, w)
    scale = torch.mm(a.square(), b.square()), _convolved(x.square(), w.square())
    return max(
        float(((one.cpu().double() - true).square().mean() / size.mean()).sqrt())
        for one, true, size in zip(found, exact, scale, strict=True)
    )


def _convolved(x: Tensor, w: Tensor) -> Tensor:
    """A convolution by the operation itself, which modes see also from within one."""
    return torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
