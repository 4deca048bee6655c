"""Reductions over channels in a module's own code, while some channels are masked: taken over the kept ones.

Shape suffixes: ``_N`` channels along the reduced dimension, ``_K`` kept ones, ``_G`` groups.

A norm that a block's ``forward`` spells out (mean and variance over dimension 1, a root mean square, a pixel norm) has
no module whose output a hook could replace. While such a block runs, a function mode of PyTorch sees every call in its
code; a reduction over masked channels is called with the kept ones alone, whatever it computes. Calls in modules
inside the block are theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.compiling import part_of_callers
from pruningawaretraining.models.kept_hooks import KeptHooks
from pruningawaretraining.models.reduction_sites import NORMS, Site, is_computed_again, is_plain, reduced_by
from pruningawaretraining.models.surgery import Surgery

AGAIN = (
    "model: code that reduces over masked channels is called by torch.utils.checkpoint inside a module, and would run "
    "again without the masks. Allowed: to checkpoint whole modules, or to give the norm a module of its own"
)


class KeptAt:
    """Which channels are kept where a site's reductions run.

    Args:
        behind: how many dimensions come after that of the channels.

    Attributes:
        saved: whether it came with a file; see :mod:`pruningawaretraining.models.saved_masks`.
    """

    saved = False

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self.keep_N: Tensor | None = None
        self.kept_K = torch.zeros(0, dtype=torch.int64)
        self.channels = 0

    def take(self, keep_N: Tensor, device: torch.device) -> None:
        """Take new masks."""
        self.keep_N = keep_N.detach().cpu().reshape(-1).bool()
        self.channels = len(self.keep_N)
        self.kept_K = torch.nonzero(self.keep_N).flatten().to(device)

    def known(self) -> Tensor | None:
        """Which channels are kept, on the CPU; None before it was told."""
        return self.keep_N

    def narrow(self, keep_N: Tensor, surgery: Surgery) -> None:
        """Know of these channels alone."""
        left = KeptAt(self.behind)
        if self.keep_N is not None:
            left.take(self.keep_N[keep_N], self.kept_K.device)
        for name in ("keep_N", "kept_K", "channels"):
            surgery.set_attribute(self, name, getattr(left, name))

    def masks(self, x: Tensor, dim: int) -> bool:
        """Whether some of the channels along a tensor's dimension are masked."""
        return x.shape[dim] == self.channels > len(self.kept_K)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The kept channels of a tensor."""
        if self.kept_K.device != x.device:
            self.kept_K = self.kept_K.to(x.device)
        return x.index_select(dim, self.kept_K)


class _Mode(TorchFunctionMode):
    """Corrects the reductions of one call of a module.

    A KeyboardInterrupt leaves it behind, since PyTorch calls no hooks then: so it does nothing outside of its call.

    Args:
        owner: the hooks of the module.
        frame: in which the module is called; None if not known.
    """

    def __init__(self, owner: ModuleReductions, frame: FrameType | None) -> None:
        super().__init__()
        self.owner, self.frame, self.inside, self.after = owner, frame, 0, ""

    def runs(self) -> bool:
        """Whether the call has not ended."""
        if torch.compiler.is_compiling() or self.frame is None:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None if self.inside else reduced_by(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        x, dims = found
        for dim in dims:
            kept = self.owner.parts.get(Site(self.after, dim - x.dim()))
            if kept is None or not kept.masks(x, dim) or not self.runs():
                continue
            if not torch.compiler.is_compiling() and is_computed_again():
                raise ModelError(AGAIN)
            if getattr(func, "__name__", "") in NORMS:
                return _norm(func, args, kwargs, kept)
            args = (kept.of(args[0], dim), *args[1:])
        return func(*args, **kwargs)


def _norm(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: KeptAt) -> Tensor:
    """A functional norm over the last dimension: that of the kept channels, and 0 elsewhere."""

    def narrowed(one: Any) -> Any:
        return kept.of(one, -1) if isinstance(one, Tensor) and one.shape[-1:] == (kept.channels,) else one

    width = [len(kept.kept_K)]
    values = {key: width if key == "normalized_shape" else narrowed(one) for key, one in kwargs.items()}
    found: Tensor = func(*(width if place == 1 else narrowed(one) for place, one in enumerate(args)), **values)
    return found.new_zeros(args[0].shape).index_copy(found.dim() - 1, kept.kept_K, found)


class ModuleReductions:
    """Forward hook, with others, of a module: reductions in its own code run over the kept channels.

    Args:
        module: the module.

    Attributes:
        parts: site -> which channels are kept there.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: dict[Site, KeptAt] = {}
        self._handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self, prepend=True, always_call=True),  # the last to enter is the first out
        ]
        self._inner: list[tuple[Any, RemovableHandle]] = []
        for name, inner in module.named_modules():
            if inner is not module and not is_plain(inner):
                self._handles.append(inner.register_forward_pre_hook(self._enter_inner))
                handle = inner.register_forward_hook(partial(self._leave_inner, name), always_call=True)
                self._inner.append((inner._forward_hooks, handle))

    def drop(self, site: Site) -> None:
        """Forget a site; the hooks go with the last one."""
        self.parts.pop(site, None)
        if not self.parts:
            for handle in (*self._handles, *(handle for _, handle in self._inner)):
                handle.remove()

    def run_last(self) -> None:
        """Let the modules inside end after all their hooks: what these compute is no code of this module."""
        for hooks, handle in self._inner:
            if handle.id in hooks:
                hooks.move_to_end(handle.id)

    @part_of_callers
    def _enter(self, module: nn.Module, inputs: Any) -> None:
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        _Mode(self, frame).__enter__()  # type: ignore[no-untyped-call]

    @part_of_callers
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After the module has run, or has failed."""
        top = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if isinstance(top, _Mode) and top.owner is self:
            top.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _mode(self) -> _Mode | None:
        """The mode of the call that runs."""
        for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            if isinstance(mode, _Mode) and mode.owner is self:
                return mode
        return None

    def _enter_inner(self, module: nn.Module, inputs: Any) -> None:
        mode = self._mode()
        if mode is not None:
            mode.inside += 1

    def _leave_inner(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        mode = self._mode()
        if mode is not None:
            mode.inside, mode.after = mode.inside - 1, name


def reductions_of(module: nn.Module) -> list[ModuleReductions]:
    """The hooks of this kind that a module has."""
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, ModuleReductions)]


@contextmanager
def plain_reductions(model: nn.Module) -> Iterator[None]:
    """Inside the block the code of all modules runs as it is written."""
    found = [(hook, hook.parts) for module in model.modules() for hook in reductions_of(module)]
    try:
        for hook, _ in found:
            hook.parts = {}
        yield
    finally:
        for hook, parts in found:
            hook.parts = parts


def saved_at(module: nn.Module, site: Site) -> list[KeptAt]:
    """The masks that a file brought for a site of a module."""
    parts = (hook.parts.get(site) for hook in reductions_of(module))
    return [part for part in parts if part is not None and part.saved]


def put_saved(module: nn.Module, site: Site, keep_N: Tensor, device: torch.device, surgery: Surgery) -> None:
    """Let the hooks of a module know what a file says of a site."""
    owner = ModuleReductions(module)
    owner.parts[site] = part = KeptAt(-site.axis - 1)
    part.take(keep_N, device)
    part.saved = True
    surgery.when_undone(lambda: owner.drop(site))


def drop_saved(module: nn.Module, surgery: Surgery) -> None:
    """Take out what a file has said of a module's code."""
    for hook in reductions_of(module):
        surgery.set_attribute(hook, "parts", {site: part for site, part in hook.parts.items() if not part.saved})


class _Handle(RemovableHandle):
    """Handle of one site of a module."""

    def __init__(self, owner: ModuleReductions, site: Site) -> None:
        self.owner, self.site = owner, site

    def remove(self) -> None:
        """Take the site out."""
        self.owner.drop(self.site)


class ReductionHooks(KeptHooks[KeptAt]):
    """Reductions in the code of a model's modules run over the kept channels; see :class:`ModuleReductions`.

    Args:
        model: the model.
        kept: masks -> name of a part, see :meth:`Site.within` -> which of its channels are kept.
    """

    def __init__(self, model: nn.Module, kept: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        super().__init__(model, kept)
        self._modules: dict[str, ModuleReductions] = {}

    def module_of(self, name: str) -> nn.Module:
        """The module in whose code the reductions are."""
        return self.model.get_submodule(Site.of(name)[0])

    def with_saved(self, name: str, keep_N: Tensor) -> Tensor:
        """Masks, and those that came with a file."""
        for part in saved_at(self.module_of(name), Site.of(name)[1]):
            if (known_N := part.known()) is not None:
                keep_N = keep_N & known_N
        return keep_N

    def hooked(self, name: str, keep_N: Tensor, device: torch.device) -> tuple[KeptAt, RemovableHandle]:
        """Let a site be known to the hooks of its module."""
        layer, site = Site.of(name)
        if layer not in self._modules:
            self._modules[layer] = ModuleReductions(self.module_of(name))
        owner = self._modules[layer]
        owner.parts[site] = KeptAt(-site.axis - 1)
        return owner.parts[site], _Handle(owner, site)

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU)."""
        super().mask(keep_G, device)
        for owner in self._modules.values():
            owner.run_last()

    def release(self) -> None:
        """Take every hook out."""
        super().release()
        self._modules = {}
