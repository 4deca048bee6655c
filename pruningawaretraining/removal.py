"""Physical removal: slice every tensor that a group owns, and let the optimizers and averages follow.

Shape suffixes: ``_G`` groups, ``_D`` entries of one dimension.

New tensors are all made before the first one is put in place, and every change can be undone, so a failure leaves the
model, its optimizers and its averages as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.grouping import Grouping

log = logging.getLogger(__name__)

Keep = dict[int, Tensor]  # dimension -> indices that stay


def kept_indices(grouping: Grouping, keep_G: Tensor) -> dict[str, Keep]:
    """For every tensor that loses something: dimension -> indices that stay (int64, ascending).

    Args:
        grouping: groups whose members each index one dimension.
        keep_G: True for groups that stay.

    Raises:
        ModelError: nothing would be left of a tensor.
    """
    keep_G1 = torch.cat([keep_G.cpu().bool(), torch.ones(1, dtype=torch.bool)])
    masks: dict[str, dict[int, Tensor]] = {}
    for member in grouping.members:
        dim = next(index for index, label in enumerate(member.labels) if label is not None)
        assert member.slots is not None
        keep_D = keep_G1[member.slots.cpu()]
        known = masks.setdefault(member.name, {})
        known[dim] = known[dim] & keep_D if dim in known else keep_D
    kept: dict[str, Keep] = {}
    for name, by_dim in masks.items():
        for dim, keep_D in by_dim.items():
            if not bool(keep_D.any()):
                raise ModelError(f"{name}: removal would leave no channel in dimension {dim}")
            if not bool(keep_D.all()):
                kept.setdefault(name, {})[dim] = torch.nonzero(keep_D).flatten()
    return kept


def slice_tensor(tensor: Tensor, keep: Keep) -> Tensor:
    """The tensor with only the kept indices of some dimensions, in its own memory and memory format."""
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    for dim, indices in keep.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor.clone()


def successor(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter with other values (and another shape) that keeps the old one's hooks, attributes and freezing."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks):
            setattr(new, hooks, getattr(old, hooks))
    return new


class Surgery:
    """Changes to a model, its optimizers and followers that can be undone until they are committed."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        old = getattr(target, name)
        setattr(target, name, value)
        self._undo.append(lambda: setattr(target, name, old))

    def set_item(self, target: Any, key: Any, value: Any) -> None:
        old = target[key]
        target[key] = value
        self._undo.append(lambda: target.__setitem__(key, old))

    def rename_key(self, target: Any, old_key: Any, new_key: Any, value: Any) -> None:
        old = target.pop(old_key)
        target[new_key] = value

        def undo() -> None:
            target.pop(new_key)
            target[old_key] = old

        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back."""
        for step in reversed(self._undo):
            step()
        self._undo = []


@torch.no_grad()
def remove(
    model: nn.Module,
    grouping: Grouping,
    keep_G: Tensor,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    followers: Iterable[nn.Module] = (),
    norms: Mapping[str, Tensor] | None = None,
) -> Surgery:
    """Remove the groups that are not kept from a model, physically.

    Args:
        model: changed in place: its parameters and buffers are replaced by sliced ones, widths are updated.
        grouping: the model's channel groups.
        keep_G: True for groups that stay.
        optimizers: their parameters are exchanged, their state sliced as the parameter was.
        followers: moving averages or other copies of the model, sliced likewise (``AveragedModel`` included).
        norms: norm layer -> group of each channel, for norms without any tensor.

    Returns:
        The changes made, which can still be undone.

    Raises:
        ModelError: nothing would be left of a layer, or a follower is no copy of the model.
    """
    kept = kept_indices(grouping, keep_G)
    bare = _bare_norm_widths(model, norms or {}, keep_G)
    surgery = Surgery()
    try:
        exchanged = _slice_module(model, kept, bare, surgery)
        for follower in followers:
            _slice_module(_inner(follower, kept), kept, bare, surgery)
        for optimizer in optimizers:
            _follow(optimizer, exchanged, surgery)
    except BaseException:
        surgery.undo()
        raise
    return surgery


def _bare_norm_widths(model: nn.Module, norms: Mapping[str, Tensor], keep_G: Tensor) -> dict[str, int]:
    keep_G1 = torch.cat([keep_G.cpu().bool(), torch.ones(1, dtype=torch.bool)])
    modules = dict(model.named_modules())
    return {
        name: int(keep_G1[groups.cpu()].sum())
        for name, groups in norms.items()
        if getattr(modules[name], "weight", None) is None
    }


def _inner(follower: nn.Module, kept: dict[str, Keep]) -> nn.Module:
    """The module inside a follower that has the model's tensors under the model's names."""
    for candidate in (follower, getattr(follower, "module", None), getattr(follower, "ema", None)):
        if isinstance(candidate, nn.Module):
            names = {name for name, _ in candidate.named_parameters()} | {name for name, _ in candidate.named_buffers()}
            if kept.keys() <= names:
                return candidate
    raise ModelError(f"ema: {type(follower).__name__} holds no copy of the model; {next(iter(kept))} is missing in it")


def _slice_module(
    model: nn.Module, kept: dict[str, Keep], bare: dict[str, int], surgery: Surgery
) -> dict[Tensor, tuple[nn.Parameter, Keep]]:
    """Put sliced tensors in place and update widths; returns old parameter -> (new parameter, what was kept)."""
    owners = dict(model.named_modules())
    exchanged: dict[Tensor, tuple[nn.Parameter, Keep]] = {}
    new_tensors: list[tuple[nn.Module, str, Tensor]] = []
    for name, keep in kept.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = owners[owner_name]
        old = getattr(owner, attribute)
        new = slice_tensor(old.detach(), keep)
        if isinstance(old, nn.Parameter):
            parameter = successor(old, new)
            if old.grad is not None:
                parameter.grad = slice_tensor(old.grad, keep)
            exchanged[old] = (parameter, keep)
            new = parameter
        new_tensors.append((owner, attribute, new))
    for owner, attribute, new in new_tensors:
        surgery.set_attribute(owner, attribute, new)
    touched = {id(owner): owner for owner, _, _ in new_tensors}
    for owner in touched.values():
        _update_widths(owner, surgery)
    for name, width in bare.items():
        _set_norm_width(owners[name], width, surgery)
    return exchanged


def _update_widths(module: nn.Module, surgery: Surgery) -> None:
    """Make a layer's integer attributes agree with its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        _update_conv(module, surgery)
    elif isinstance(module, nn.Linear):
        surgery.set_attribute(module, "out_features", module.weight.shape[0])
        surgery.set_attribute(module, "in_features", module.weight.shape[1])
    elif isinstance(module, nn.Embedding):
        surgery.set_attribute(module, "embedding_dim", module.weight.shape[1])
    elif isinstance(module, nn.PReLU):
        surgery.set_attribute(module, "num_parameters", module.weight.shape[0])
    else:
        tensors = (getattr(module, "weight", None), getattr(module, "running_mean", None))
        for tensor in tensors:
            if tensor is not None:
                _set_norm_width(module, tensor.shape[0], surgery)
                return


def _set_norm_width(module: nn.Module, width: int, surgery: Surgery) -> None:
    if isinstance(module, nn.LayerNorm):
        surgery.set_attribute(module, "normalized_shape", (width,))
    elif isinstance(module, nn.GroupNorm):
        surgery.set_attribute(module, "num_channels", width)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        surgery.set_attribute(module, "num_features", width)


def _update_conv(module: nn.modules.conv._ConvNd, surgery: Surgery) -> None:
    first, second = module.weight.shape[:2]
    groups = module.groups
    depthwise = groups == module.in_channels and second == (module.out_channels // groups if module.transposed else 1)
    if depthwise and groups > 1:
        multiplier = module.out_channels // module.in_channels
        groups = first if module.transposed else first // multiplier
    surgery.set_attribute(module, "groups", groups)
    inputs, outputs = (first, second * groups) if module.transposed else (second * groups, first)
    surgery.set_attribute(module, "in_channels", inputs)
    surgery.set_attribute(module, "out_channels", outputs)


def _follow(
    optimizer: torch.optim.Optimizer, exchanged: dict[Tensor, tuple[nn.Parameter, Keep]], surgery: Surgery
) -> None:
    """Exchange an optimizer's parameters and slice its state."""
    for group in optimizer.param_groups:
        for index, old in enumerate(group["params"]):
            if old in exchanged:
                surgery.set_item(group["params"], index, exchanged[old][0])
    for old, (new, keep) in exchanged.items():
        if old in optimizer.state:
            state = {key: _slice_state(value, old, keep) for key, value in optimizer.state[old].items()}
            surgery.rename_key(optimizer.state, old, new, state)


def _slice_state(value: Any, parameter: Tensor, keep: Keep) -> Any:
    """Slice one entry of a parameter's state: of its shape, or of its shape with one dimension summed out."""
    if isinstance(value, (list, tuple)):
        return type(value)(_slice_state(item, parameter, keep) for item in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    shape = list(parameter.shape)
    if list(value.shape) == shape:
        return slice_tensor(value, keep)
    if value.dim() == len(shape) and all(have in (1, want) for have, want in zip(value.shape, shape, strict=True)):
        return slice_tensor(value, {dim: indices for dim, indices in keep.items() if value.shape[dim] > 1})
    for dropped in reversed(range(len(shape))):  # factored second moments (Adafactor): one dimension summed out
        if list(value.shape) == shape[:dropped] + shape[dropped + 1 :]:
            left = {dim - (dim > dropped): indices for dim, indices in keep.items() if dim != dropped}
            return slice_tensor(value, left)
    return value
