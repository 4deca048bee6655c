"""The modifiers of SparseML-style recipes and their keys; ``sparseml_recipe`` finds them in a file."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pruningawaretraining.config.dialects.sparseml_training_keys import (
    Distillation,
    EpochRange,
    Modifier,
    Names,
    Number,
    Outside,
    Pace,
    Quantization,
    RateFunction,
    RateSchedule,
    SetRate,
)
from pruningawaretraining.config.strict import Count, Positive, UnitInterval, Whole

__all__ = [
    "AlternatingPruning",
    "CapAlternating",
    "Constant",
    "Distillation",
    "EpochRange",
    "FastPruning",
    "GlobalPruning",
    "MfacPruning",
    "Modifier",
    "Names",
    "OneShotPruning",
    "Outside",
    "Pruning",
    "Quantization",
    "RateFunction",
    "RateSchedule",
    "RegrowingPruning",
    "SampledPruning",
    "SecondOrderPruning",
    "SetRate",
    "UniformPruning",
    "WandaPruning",
]


class Constant(Modifier):
    """Zeros that are there stay."""

    params: Names = Field("__ALL__", description="Parameters: names, 're:...', or all.")
    update_frequency: Number = Field(-1.0, description="Ignored.")

    unused = {"update_frequency": "zeros are locked once"}


class Pruning(Modifier):
    """Keys of every pruning modifier."""

    params: Names = Field("__ALL_PRUNABLE__", description="Parameters: names, 're:...', or all.")
    init_sparsity: UnitInterval | Literal["__FROM_PARAM__"] = Field(
        0.0, description="Sparsity at the start; __FROM_PARAM__: what the weights have."
    )
    final_sparsity: UnitInterval | dict[str, list[str]] | None = Field(
        None, description="Sparsity of the last event, or sparsity -> parameters."
    )
    update_frequency: Pace = Field(-1.0, description="Epochs between events; -1: at every step.")
    inter_func: Literal["linear", "cubic", "inverse_cubic"] = Field("cubic", description="How the sparsity rises.")
    mask_type: str | list[int] = Field(
        "unstructured", description="'unstructured', 'block4', 'N:M', '4x1' or [4, 1]: rows and columns of a block."
    )
    n: Count | None = Field(None, description="N of mask_type N:M.")
    m: Count | None = Field(None, description="M of mask_type N:M.")
    global_sparsity: bool | None = Field(None, description="One ranking over all layers, or the same in each.")
    leave_enabled: bool = Field(True, description="Whether masks stay after the end.")
    score_type: Literal["magnitude", "movement"] = Field("magnitude", description="What scores weights.")
    log_types: Any = Field(None, description="Ignored.")
    phased: Literal[False] = Field(False, description="Masks that come and go are not supported.")

    unused = {"log_types": "the loop logs"}
    scope: ClassVar[str] = "local"
    """How layers compete where global_sparsity does not say."""
    fixed_scope: ClassVar[bool] = False


class GlobalPruning(Pruning):
    """Magnitudes in one ranking."""

    scope = "global"


class UniformPruning(Pruning):
    """Magnitude pruning, each layer separately."""

    fixed_scope = True


TRAINED = "the gradients of training count, or all of those of pruner.calibrate_with"
OWN_SCORE = "the modifier has a score of its own"


class SampledPruning(Pruning):
    """Keys of modifiers that sample gradients."""

    num_grads: Count | dict[str, Count] = Field(1024, description="Gradients behind a score, or sparsity -> so many.")
    grad_sampler_kwargs: dict[str, Any] | None = Field({}, description="batch_size: samples behind each gradient.")

    unused = {**Pruning.unused, "score_type": OWN_SCORE, "num_grads": TRAINED, "grad_sampler_kwargs": TRAINED}


class SecondOrderPruning(SampledPruning):
    """Further keys of the second-order modifiers."""

    scope = "global"
    damp: Positive | None = Field(None, description="Dampening.")
    fisher_block_size: Count = Field(50, description="Weights in a Fisher block.")
    num_recomputations: Count = Field(1, description="Rounds with fresh curvature in each event.")
    recomputation_inter_func: Literal["linear", "cubic", "inverse_cubic"] = Field(
        "linear", description="How the sparsity rises from round to round."
    )
    blocks_in_parallel: Whole | None = Field(None, description="Blocks worked on at once; -1 or absent: our choice.")
    fisher_inv_device: str | None = Field(None, description="Where inverse Fishers are kept.")
    traces_backup_dir: str | None = Field(None, description="Folder for what is kept in the meantime.")
    block_size: Count | None = Field(None, description="Ignored.")

    unused = {
        **Pruning.unused,
        "score_type": OWN_SCORE,
        "block_size": "columns are swept in blocks of fisher_block_size",
    }


class FastPruning(SecondOrderPruning):
    """One Fisher for a layer; the same sparsity in every layer."""

    fixed_scope = True
    scope = "local"
    unused = {
        **SecondOrderPruning.unused,
        **dict.fromkeys(
            ("blocks_in_parallel", "fisher_inv_device", "traces_backup_dir"),
            "a layer has one Fisher",
        ),
    }


class MfacPruning(SecondOrderPruning):
    """The same inverse, from the last gradients."""

    scope = "local"
    num_grads: Count | dict[str, Count] = Field(64, description="Gradients behind a score, or sparsity -> so many.")
    damp: Positive | None = Field(1e-5, description="Dampening.")
    fisher_block_size: Count | None = Field(2000, description="Weights in a Fisher block; null: all of a layer.")  # type: ignore[assignment]
    use_gradient_buffering: bool | None = Field(None, description="Ignored.")
    grads_device: Any = Field(None, description="Ignored.")
    num_pages: Any = Field(None, description="Ignored.")
    available_devices: Any = Field(None, description="Ignored.")
    block_implementation: Any = Field(None, description="Ignored.")

    unused = {
        **SecondOrderPruning.unused,
        **dict.fromkeys(
            ("use_gradient_buffering", "grads_device", "num_pages", "available_devices", "block_implementation"),
            "the inverse Fisher is computed in blocks, from sampled gradients",
        ),
    }


class AlternatingPruning(Modifier):
    """AC/DC: dense and sparse phases in turn."""

    compression_sparsity: UnitInterval = Field(description="Sparsity of the sparse phases.")
    params: Names = Field("__ALL_PRUNABLE__", description="Parameters: names, 're:...', or all.")
    update_frequency: Count = Field(description="Epochs of a phase.")
    global_sparsity: bool = Field(True, description="One ranking over all layers, or the same in each.")
    leave_enabled: Literal[True] = Field(True, description="Masks stay after the end.")
    mask_type: str | list[int] = Field("unstructured", description="As that of the other pruning modifiers.")
    momentum_buffer_reset: bool = Field(True, description="Ignored.")

    unused = {"momentum_buffer_reset": "the optimizer's state of masked weights is what the 'alternate' dynamic leaves"}


class CapAlternating(AlternatingPruning):
    """CAP's version of AC/DC: it begins with a sparse phase, and phases may differ in length."""

    dense_fraction: UnitInterval = Field(0.5, description="Dense part of two regular phases.")
    last_decompression_epochs: Count | None = Field(None, description="Epochs of the last dense phase.")
    last_compression_epochs: Count | None = Field(None, description="Epochs of the last sparse phase.")
    rescale: bool = Field(False, description="Ignored.")

    unused = {**AlternatingPruning.unused, "rescale": "nothing is rescaled there either"}


class RegrowingPruning(Modifier):
    """RigL: the lowest weights go, those with the largest gradients come back."""

    final_sparsity: UnitInterval = Field(description="Sparsity from the start on.")
    params: Names = Field("__ALL_PRUNABLE__", description="Parameters: names, 're:...', or all.")
    update_frequency: Pace = Field(description="Epochs between exchanges.")
    init_update_fraction: UnitInterval = Field(0.3, description="Part of the weights that is exchanged at first.")
    sparsity_strategy: Literal["erdos_renyi_kernel", "uniform"] = Field(
        "erdos_renyi_kernel", description="How the sparsity is shared among layers."
    )
    global_sparsity: bool = Field(False, description="Ignored.")
    leave_enabled: Literal[True] = Field(True, description="Masks stay after the end.")
    mask_type: Literal["unstructured"] = Field("unstructured", description="Single weights.")
    momentum_buffer_reset: bool = Field(True, description="Ignored.")
    num_grads: Count = Field(1, description="Ignored.")
    grad_sampler_kwargs: dict[str, Any] | None = Field(None, description="Ignored.")

    unused = {
        "momentum_buffer_reset": "weights that come back start without momentum",
        "num_grads": "the gradients of training are read",
        "grad_sampler_kwargs": "the gradients of training are read",
        "global_sparsity": "sparsity_strategy shares the sparsity among layers",
    }


class OneShotPruning(Modifier):
    """SparseGPT and Wanda: all at once, from calibration data, the same in every layer."""

    sparsity: UnitInterval = Field(description="Sparsity of every layer.")
    mask_structure: str = Field("0:0", description="'0:0' and 'unstructured', or 'N:M' (N of M stay).")
    targets: Names | None = Field(None, description="Modules, or 're:...': everything in them; absent: all.")
    ignore: list[str] = Field([], description="Modules to leave out.")
    block_size: Count = Field(128, description="Ignored.")
    dampening_frac: Positive = Field(0.01, description="Dampening, as a part of the mean diagonal.")
    percdamp: Positive | None = Field(None, description="Another name for dampening_frac.")
    sequential_update: bool | None = Field(None, description="Ignored.")
    target_ids: Any = Field(None, description="Ignored.")
    preserve_sparsity_mask: bool = Field(False, description="Whether zeros that are there stay.")

    unused = {
        "block_size": "columns are swept in blocks of our choice; the result is the same",
        "target_ids": "the loader that is given decides what the model takes",
        "sequential_update": "layers are pruned in sequence, each from the inputs that the pruned ones before it give",
    }


class WandaPruning(OneShotPruning):
    """Wanda: nothing is inverted."""

    unused = {
        **OneShotPruning.unused,
        **dict.fromkeys(("dampening_frac", "percdamp"), "Wanda inverts nothing that would need dampening"),
    }
