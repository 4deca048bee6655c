"""Criteria and patterns of SparseML-style modifiers."""

from __future__ import annotations

from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.base import note, note_ignored
from pruningawaretraining.config.dialects.sparseml_recipe import Found
from pruningawaretraining.errors import ConfigError

MAGNITUDE: dict[str, Any] = {"type": "magnitude", "p": 1.0, "normalize": "none"}
SECOND_ORDER = {
    "OBSPruningModifier": "obs",
    "MFACPruningModifier": "obs",
    "CAPruningModifier": "cap",
    "FastCAPruningModifier": "fast_cap",
}
TARGETS = ("final_sparsity", "compression_sparsity", "sparsity")
"""Keys that say how far a modifier goes."""
WHOLE_LAYER = 2048
"""Weights in a Fisher block where a recipe wants one block for a whole layer."""
MASK_TYPES = "'unstructured', 'block4', 'RxC' such as '4x1', or 'N:M' such as '2:4'"


def criterion_of(one: Found, modifier: keys.Modifier, cap: bool = False) -> dict[str, Any]:
    """The criterion of a modifier.

    Args:
        one: the modifier in its recipe.
        modifier: its keys.
        cap: whether the recipe is for CAP's version, which has another default.
    """
    name = one.name
    if isinstance(modifier, keys.OneShotPruning):
        if name == "WandaPruningModifier":
            return {"type": "wanda"}
        damp = modifier.dampening_frac if modifier.percdamp is None else modifier.percdamp
        return {"type": "sparse_gpt", "damp": damp}
    if isinstance(modifier, keys.SecondOrderPruning):
        return _second_order(one, modifier, cap)
    if name == "GWProdPruningModifier":
        return {"type": "snip", "momentum": 1.0}  # the sum of |w g| over gradients
    if name == "MovementPruningModifier" or (isinstance(modifier, keys.Pruning) and modifier.score_type == "movement"):
        return {"type": "movement"}
    return MAGNITUDE


def _second_order(one: Found, modifier: keys.SecondOrderPruning, cap: bool) -> dict[str, Any]:
    name = one.name
    sampler = modifier.grad_sampler_kwargs or {}
    for key in sampler:
        if key != "batch_size":
            note_ignored(f"{one.key('grad_sampler_kwargs')}.{key}", "the loader that is given decides")
    if name == "MFACPruningModifier":
        note(one.where, "the inverse Fisher in blocks (obs) stands for M-FAC's, which approximates the same matrix")
    number = modifier.num_grads
    if isinstance(number, dict):
        number = max(number.values())
        note_ignored(one.key("num_grads"), f"{number} gradients are taken at every sparsity")
    found: dict[str, Any] = {
        "type": SECOND_ORDER[name],
        "num_grads": number,
        "fisher_block_size": _block_size(one, modifier, cap),
        "num_recomputations": modifier.num_recomputations,
        "micro_batch": sampler.get("batch_size"),
    }
    if modifier.recomputation_inter_func != "linear":
        found["recomputation_schedule"] = modifier.recomputation_inter_func
    if modifier.damp is not None:
        found["damp"] = modifier.damp
    if found["type"] == "cap":
        found["merge"] = "cumulative"  # as published
    if found["type"] != "fast_cap":
        parallel = modifier.blocks_in_parallel
        found["blocks_in_parallel"] = parallel if parallel is not None and parallel > 0 else None
        found["fisher_inv_device"] = modifier.fisher_inv_device
        found["traces_backup_dir"] = modifier.traces_backup_dir
    return found


def _block_size(one: Found, modifier: keys.SecondOrderPruning, cap: bool) -> int:
    """Weights in a Fisher block: SparseML's own OBSPruningModifier has 1 where it is not given, CAP's 50."""
    given = "fisher_block_size" in modifier.model_fields_set
    return (
        1 if one.name == "OBSPruningModifier" and not cap and not given else modifier.fisher_block_size or WHOLE_LAYER
    )


def pattern_of(
    one: Found, modifier: keys.Pruning | keys.AlternatingPruning | keys.OneShotPruning, sparsity: float | None
) -> tuple[dict[str, Any], float]:
    """The pattern of a modifier's mask, and its final sparsity.

    In "N:M" N of M stay, as 1 - N/M of sparsity says; CAP's recipes mean that N of M go, and then say N/M.

    Raises:
        ConfigError: an unknown mask, or a sparsity that it does not have.
    """
    mask = modifier.mask_structure if isinstance(modifier, keys.OneShotPruning) else modifier.mask_type
    where = one.key("mask_structure" if isinstance(modifier, keys.OneShotPruning) else "mask_type")
    how_far = one.key(next(key for key in TARGETS if key in type(modifier).model_fields))
    n, m = (modifier.n, modifier.m) if isinstance(modifier, keys.Pruning) else (None, None)
    text = "x".join(map(str, mask)) if isinstance(mask, list) else str(mask).strip().lower()
    if text in ("n:m", "nm") and n and m:
        text = f"{n}:{m}"
    first, separator, second = text.replace("x", ":").partition(":")
    numbers = (int(first), int(second)) if separator and first.isdigit() and second.isdigit() else None
    if numbers is not None and ":" in text and 0 < numbers[0] < numbers[1]:
        return _windows(*numbers, sparsity, how_far)
    if sparsity is None:
        raise ConfigError(f"{how_far}: missing, but needed")
    if text == "unstructured" or (numbers == (0, 0) and ":" in text):
        return {"type": "unstructured"}, sparsity
    if text == "block4":
        return {"type": "block", "rows": 1, "columns": 4}, sparsity
    if numbers is not None and "x" in text and min(numbers) > 0:
        return {"type": "block", "rows": numbers[0], "columns": numbers[1]}, sparsity
    if text in ("filter", "channel"):
        raise ConfigError(f"{where}: {mask!r} is for 'channel' rules of a native config. Allowed: {MASK_TYPES}")
    raise ConfigError(f"{where}: {mask!r} is not known. Allowed: {MASK_TYPES}, with N below M")


def _windows(n: int, m: int, sparsity: float | None, where: str) -> tuple[dict[str, Any], float]:
    for drop in (m - n, n):
        if sparsity is None or abs(sparsity - drop / m) <= 1e-2:
            return {"type": "n_of_m", "drop": drop, "of": m}, drop / m
    allowed = f"{1 - n / m:g}" if 2 * n == m else f"{1 - n / m:g}, or {n / m:g} for N that go"
    raise ConfigError(f"{where}: {sparsity} is not that of {n}:{m}. Allowed: {allowed}")
