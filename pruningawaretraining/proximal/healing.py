"""Healing: what is 0 stays 0, and the rest trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from pruningawaretraining.distributed.fsdp import local_of
from pruningawaretraining.models.optimizer_state import mask_state
from pruningawaretraining.proximal.latent import ParamSlot
from pruningawaretraining.proximal.prox_groups import Unit
from pruningawaretraining.proximal.spectral_plan import SpectralPlan


def mask_of(own: dict[str, Any], weight: Tensor) -> Tensor | None:
    """1 where a weight may train on, in its dtype; frozen at the first call. None for a weight of low rank, which has
    no zeros to freeze.

    Args:
        own: the weight's state; the latent, which is no longer needed, leaves it.
        weight: the parameter.
    """
    own.pop("latent", None)
    if "rank" in own:
        return None
    if "mask" not in own:
        own["mask"] = (weight.detach() != 0).to(weight.dtype)
    return cast(Tensor, own["mask"])


def mask_gradients(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Zero the gradients of masked weights, in place."""
    gradients = [weight.grad for weight in weights]
    pairs = [(g, mask) for g, mask in zip(gradients, masks, strict=True) if g is not None and mask is not None]
    if pairs:
        torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])


def mask_weights(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Zero masked weights, in place."""
    pairs = [(weight, mask) for weight, mask in zip(weights, masks, strict=True) if mask is not None]
    if pairs:
        torch._foreach_mul_([weight for weight, _ in pairs], [mask for _, mask in pairs])


def mask_base_state(base: Optimizer, weights: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Zero the base optimizer's state of masked weights: schedule-free ones mix it into the weights to evaluate them.

    Args:
        base: the base optimizer.
        weights: those of which healing begins, with their masks.
    """
    pairs = [(one, mask) for one, mask in weights if mask is not None]
    if pairs:
        mask_state([base], [one for one, _ in pairs], [local_of(mask) for _, mask in pairs])


def hold_ranks(unit: Unit, places: Sequence[ParamSlot], state: Mapping[Tensor, Any]) -> None:
    """Cut low-rank weights back to the ranks that they had when healing began."""
    places = [place for place in places if "rank" in state[place.weight]]
    if places:
        plan = cast(SpectralPlan, unit.plan(places, [place.weight for place in places]))
        plan.project([state[place.weight]["rank"] for place in places])
