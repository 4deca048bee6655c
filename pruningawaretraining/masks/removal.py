"""Physical removal: slice every tensor that a group owns, take out blocks, and let optimizers and averages follow.

Shape suffixes: ``_G`` groups, ``_D`` entries of one dimension.

New tensors are all made before the first one is put in place, and every change can be undone, so a failure leaves the
model, its optimizers and its averages as they were.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.averages import copy_in
from pruningawaretraining.models.exported_graph import ExportedGraph
from pruningawaretraining.models.fake_quant import follow_weights
from pruningawaretraining.models.masked_norms import set_norm_width
from pruningawaretraining.models.optimizer_state import Exchanged, follow, mark_replaced
from pruningawaretraining.models.sliced_buffers import note_sliced
from pruningawaretraining.models.surgery import Keep, Surgery, slice_tensor, successor
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.projections import is_transposed_linear
from pruningawaretraining.registry import calling


def kept_indices(grouping: Grouping, keep_G: Tensor, gone: Container[str] = ()) -> dict[str, Keep]:
    """For every sliced tensor: dimension -> indices to keep (int64, ascending).

    Args:
        grouping: groups whose members each index one dimension.
        keep_G: True for groups that stay.
        gone: tensors that go as a whole, with the module that has them.

    Raises:
        ModelError: nothing would be left of a tensor.
    """
    keep_G1 = torch.cat([keep_G.cpu().bool(), torch.ones(1, dtype=torch.bool)])
    masks: dict[str, dict[int, Tensor]] = {}
    for member in grouping.members:
        if member.name in gone:
            continue
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


@torch.no_grad()
def remove(
    model: nn.Module,
    found: ChannelGroups,
    keep_G: Tensor,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    followers: Iterable[nn.Module] = (),
    graphs: Iterable[ExportedGraph] = (),
    surgery: Surgery | None = None,
) -> Surgery:
    """Remove groups physically; the changes in ``surgery``, which is returned, can still be undone.

    Args:
        model: changed in place.
        found: the model's channel groups.
        keep_G: True for groups that stay.
        optimizers, followers: of the model, and averages or other copies of it; their tensors are sliced likewise.
        graphs: exported from the model; they get its new parameters, and their fake quantizers follow.

    Raises:
        ModelError: a layer would be empty, or a follower is not a copy of the model.
    """
    prefixes = found.taken_prefixes(keep_G)
    gone = {member.name for member in found.grouping.members if member.name.startswith(prefixes)}
    kept = kept_indices(found.grouping, keep_G, gone)
    surgery = surgery or Surgery()

    def shrink(module: nn.Module) -> tuple[Exchanged, list[nn.Parameter]]:
        exchanged = _slice_module(module, kept, surgery)
        return exchanged, _change_parts(module, found, keep_G, surgery)

    try:
        exchanged, lost = shrink(model)
        for follower in followers:
            shrink(copy_in(follower, kept.keys() | gone))
        for graph in graphs:
            graph.slice(model, kept, surgery)
        for optimizer in optimizers:
            follow(optimizer, exchanged, surgery, lost)
        mark_replaced(optimizers, exchanged, lost, surgery)
    except BaseException:
        surgery.undo()
        raise
    return surgery


def _change_parts(module: nn.Module, found: ChannelGroups, keep_G: Tensor, surgery: Surgery) -> list[nn.Parameter]:
    """Let every attachment change its parts; the parameters that are gone with them."""
    lost: list[nn.Parameter] = []
    for one in found.outside(keep_G):
        with calling("attachment", one, "the parameters that are gone, or ()"):
            lost += one.remove(module, keep_G, surgery)
    return lost


def _slice_module(model: nn.Module, kept: dict[str, Keep], surgery: Surgery) -> dict[Tensor, tuple[nn.Parameter, Keep]]:
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
        note_sliced(owner, attribute, surgery)
    touched = {id(owner): owner for owner, _, _ in new_tensors}
    for owner in touched.values():
        _update_widths(owner, surgery)
    exchanged.update(follow_weights(model, kept, surgery))
    return exchanged


def _update_widths(module: nn.Module, surgery: Surgery) -> None:
    """Make a layer's integer attributes agree with its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        _update_conv(module, surgery)
    elif isinstance(module, nn.Linear):
        surgery.set_attribute(module, "out_features", module.weight.shape[0])
        surgery.set_attribute(module, "in_features", module.weight.shape[1])
    elif is_transposed_linear(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        surgery.set_attribute(module, "nf", weight.shape[1])
        if hasattr(module, "nx"):
            surgery.set_attribute(module, "nx", weight.shape[0])
    elif isinstance(module, nn.Embedding):
        surgery.set_attribute(module, "embedding_dim", module.weight.shape[1])
    elif isinstance(module, nn.RNNBase):
        for attribute, first in (("input_size", "weight_ih_l0"), ("hidden_size", "weight_hh_l0")):
            surgery.set_attribute(module, attribute, module.get_parameter(first).shape[1])
    elif isinstance(module, nn.RNNCellBase):
        surgery.set_attribute(module, "input_size", module.weight_ih.shape[1])
        surgery.set_attribute(module, "hidden_size", module.weight_hh.shape[1])
    elif isinstance(module, nn.PReLU):
        surgery.set_attribute(module, "num_parameters", module.weight.shape[0])
    else:
        tensors = (getattr(module, "weight", None), getattr(module, "running_mean", None))
        for tensor in tensors:
            if tensor is not None:
                set_norm_width(module, tensor.shape[0], surgery)
                return


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
