"""A pruned transformers model without the places of its removed layers, which ``from_pretrained`` alone can load."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.records import own_state
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.models.calling import unwrap
from pruningawaretraining.models.hugging_face import changed, fit_of, is_configured
from pruningawaretraining.models.short_lists import names_without, removed_blocks
from pruningawaretraining.models.skipped_blocks import passed_blocks


def shortened(model: nn.Module) -> nn.Module:
    """A copy of a pruned transformers model whose lists of layers are shortened and whose config says so.

    A removal of whole layers (pattern ``depth``) leaves what hands on its input in their place, so that the other
    layers keep their names, and no config can say that. The copy is an ordinary model of the class, built from a config
    with fewer layers, which has the layers that are left under new numbers, so that
    ``shortened(model).save_pretrained(folder)`` writes files that ``from_pretrained`` loads without this package, with
    the same outputs.

    Args:
        model: of transformers; wrappers are looked through. It is not changed, and the copy shares no memory with it.

    Returns:
        The copy, on the same device, in the same dtypes and mode. It has no pruner: a new ``Pruning`` of it takes it as
        dense.

    Raises:
        CheckpointError: not a model of transformers, layers that are masked and not removed, or no config says what is
            left; the reason is named.
    """
    inner = unwrap(model)
    if not is_configured(inner):
        raise CheckpointError(
            f"model: {type(inner).__name__} has no config that could say fewer layers. Allowed: a model of "
            "transformers; save_pruned saves any other"
        )
    gone = removed_blocks(inner)
    masked = next((name for name in passed_blocks(inner) if name not in gone), None)
    if masked is not None:
        raise CheckpointError(f"model: {masked!r} is masked and not removed. Allowed: pruner.remove() first")
    fit = fit_of(inner)
    if fit.reason:
        raise CheckpointError(
            f"model: the config of {type(inner).__name__} cannot say what is left ({fit.reason}). Allowed: "
            "save_pruned(model, path)"
        )
    config = changed(inner.config, {**fit.widths, **fit.layers})
    with torch.random.fork_rng():
        made = type(inner)(config)
    _take_over(made, inner, gone)
    return made


def _take_over(made: nn.Module, model: nn.Module, gone: tuple[str, ...]) -> None:
    """Give a model the tensors of another, by their new names, and what else it was set to."""
    short, copies = names_without(model, gone), dict[int, Tensor]()
    for old in (*model.parameters(), *model.buffers()):
        copies[id(old)] = old.detach().clone()
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    state = {short(name): copies[id(named[name])] for name in own_state(model) if name in named}
    device = next(iter(copies.values())).device
    made.to(device).load_state_dict(state, assign=True)
    tie = getattr(made, "tie_weights", None)
    if tie is not None:
        tie()
    own = dict(made.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own[short(name)].requires_grad_(parameter.requires_grad)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    made.train(model.training)
