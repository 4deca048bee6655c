"""Example inputs in all their forms, and calls of a model with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models.compiling import uncompiled
from pruningawaretraining.models.trees import float_tensors_of, map_tensors
from pruningawaretraining.models.trees import tensors_of as tensors_of

ForwardFn = Callable[..., Any]


def from_shapes(shape: Sequence[Any], container: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Random inputs from a config's shapes.

    Args:
        shape: one shape ``[B, C, H, W]``, or a list of shapes.
        container: for a list of shapes, "tuple" to pass the tensors as one tuple argument, "list" or None as one list.
        dtype: dtype of the tensors.

    Returns:
        A tensor for one shape; a tuple of one argument (the list or tuple of tensors) for several.
    """

    def one(sizes: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if dtype.is_floating_point:
            return torch.randn(*sizes, generator=generator).to(dtype)
        return torch.zeros(*sizes, dtype=dtype)

    if not shape:
        raise ConfigError("example_inputs.shape: [] is empty; give a shape such as [1, 3, 224, 224]")
    if isinstance(shape[0], int):
        return one(shape)
    tensors = [one(sizes) for sizes in shape]
    return (tuple(tensors),) if container == "tuple" else (tensors,)


def move(inputs: Any, device: torch.device) -> Any:
    """The same nest of tensors on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def device_of(model: nn.Module) -> torch.device | None:
    """Device of a model: the device of all its parameters (of its buffers if it has none).

    None for a model without tensors, and for one that is spread over several devices.
    """
    found = {_computed_on(one) for one in model.parameters()} or {one.device for one in model.buffers()}
    return next(iter(found)) if len(found) == 1 else None


def _computed_on(weight: Tensor) -> torch.device:
    """A weight that ``fully_shard`` keeps on the CPU is used on the device of its mesh."""
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None or mesh.device_type == weight.device.type else torch.device(mesh.device_type)


def beside(model: nn.Module, inputs: Any) -> Any:
    """Inputs on the model's device; unchanged for a model on no device or several."""
    device = device_of(model)
    if device is None or all(one.device == device for one in tensors_of(inputs)):
        return inputs
    return move(inputs, device)


def call(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Call a model on example inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Inputs go to the model's device first: a copy of a model, or one that has been moved, may be on another than they.

    Args:
        model: the module.
        inputs: see above.
        forward_fn: None; a bound ``model.forward``; or a function of ``(model, inputs)`` or of ``(inputs)`` alone.
    """
    with uncompiled():
        return call_as_is(model, beside(model, inputs), forward_fn)


def call_as_is(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> Any:
    """:func:`call`, compiled code included, on inputs that are where the model is."""
    if forward_fn is not None and getattr(forward_fn, "__self__", None) is None:
        return forward_fn(model, inputs) if _takes_two(forward_fn) else forward_fn(inputs)
    target: Callable[..., Any] = model
    if forward_fn is not None and getattr(forward_fn, "__self__", None) is not model:
        target = forward_fn
    if isinstance(inputs, Mapping):
        return target(**inputs)
    return target(*inputs) if isinstance(inputs, tuple) else target(inputs)


def _takes_two(function: ForwardFn) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    required = [
        one
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) >= 2 or any(one.kind == one.VAR_POSITIONAL for one in parameters)


def shown(value: Any) -> str:
    """Describe a value for messages."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """First line of an error for messages; its type if it is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; every submodule's own mode is restored after it.

    ``eval()`` is not called: exported graphs refuse it, and what a user's own ``train`` does besides is not undone by
    restoring the modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Disable a surrounding autocast, whose cached copies of weights would outlive a change of the weights."""
    device = next((one.device.type for one in model.parameters()), "cpu")
    if not torch.amp.autocast_mode.is_autocast_available(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Every floating point parameter requires a gradient inside the block, so that frozen layers are traced too."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    floating = [parameter for parameter in frozen if parameter.is_floating_point()]
    try:
        for parameter in floating:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in floating:
            parameter.requires_grad_(False)


@contextmanager
def spelled_out(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers are run as the operations that they are made of, not as one."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def outputs_of(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> list[Tensor]:
    """The floating point outputs of the model in eval mode without gradients.

    Raises:
        ModelError: the model rejects the inputs; the message names their shapes.
    """
    with torch.no_grad(), evaluating(model):
        return float_tensors_of(checked_call(model, inputs, forward_fn))


_LOOKS = [0]
REJECTED = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError, NotImplementedError)
"""Errors that models raise at unsuitable inputs, or without a part that they need."""


@contextmanager
def _looking() -> Iterator[None]:
    _LOOKS[0] += 1
    try:
        yield
    finally:
        _LOOKS[0] -= 1


def generator_devices(model: nn.Module) -> list[torch.device]:
    """The GPUs that a model is on; each has a random generator of its own."""
    return sorted({one.device for one in model.parameters() if one.device.type == "cuda"}, key=str)


@contextmanager
def same_generators(model: nn.Module) -> Iterator[None]:
    """Restore PyTorch's random generators after the block."""
    with torch.random.fork_rng(generator_devices(model)):
        yield


def is_probing() -> bool:
    """Whether the model runs only to be looked at (widths, MACs, a removal's check): nothing that listens counts it."""
    return _LOOKS[0] > 0


def checked_call(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None = None) -> Any:
    """:func:`call`, with an error that names the shapes when the model rejects the inputs; see :func:`looking`.

    Random generators are as before afterwards.
    """
    try:
        with _looking(), same_generators(model):
            return call(model, inputs, forward_fn)
    except REJECTED as error:
        if is_out_of_memory(error):
            raise
        shapes = [tuple(tensor.shape) for tensor in tensors_of(inputs)]
        reason = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
        raise ModelError(
            f"example_inputs: {type(model).__name__} rejects inputs of shape {shapes}: its forward pass raised "
            f"{type(error).__name__}{reason}. "
            f"{_as_one_argument(inputs, error)}Pass example_inputs= as a tensor, a tuple of positional inputs or a "
            "dict of keyword inputs, or a forward_fn(model, inputs)"
        ) from error


def _as_one_argument(inputs: Any, error: Exception) -> str:
    """Advice for a dict whose keys the model does not take as keywords: it may want the dict itself."""
    wanted = isinstance(inputs, Mapping) and isinstance(error, TypeError) and "argument" in str(error)
    return "If it takes the dict as one argument, pass ({...},). " if wanted else ""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DataParallel, DistributedDataParallel or torch.compile."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    return inner if inner is model else unwrap(inner)


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside it repeats an earlier one (activation checkpointing),
    and an optimizer that steps inside it has only some of the gradients."""
    return torch._C._current_graph_task_id() != -1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full: that says nothing of inputs or models."""
    full = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(one in str(error) for one in full)
    )


def outside_inference() -> AbstractContextManager[object]:
    """Inside the block tensors are made that training can use, also where the caller is in ``torch.inference_mode``."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
