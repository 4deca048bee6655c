"""Names of the two rules in messages, and keys of ``channel_sparsity_args`` that have no effect."""

from __future__ import annotations

from pruningawaretraining.config.dialects.base import note_ignored
from pruningawaretraining.config.dialects.sirc_keys import ChannelArgs, Regularize
from pruningawaretraining.config.origin import Names


def _in(section: str, **fields: str) -> Names:
    common = {"enabled": "is_prune", "layers": "layers", "start": "start_epoch", "end": "end_epoch"}
    known = {**common, "every": "epoch_rate", "criterion": "pruning_method", **fields}
    return Names(section, {field.replace("__", "."): f"{section}.{key}" for field, key in known.items()})


CHANNELS = _in(
    "channel_sparsity_args",
    schedule="schedule",
    scope="global_pruning",
    target="global_prune_rate",
    target__macs="mac_target",
    macs="mac_target",
    max_sparsity="max_pruning_rate",
    multiple="block_size",
    application="prune_channels_at_init",
    at_init="prune_channels_at_init",
    regularizer="regularize",
)
SLICES = _in(
    "slice_sparsity_args",
    pattern="block_size",
    schedule="pruning_gradually",
    target="prune_rate",
    mode="pruning_mode",
    regularizer="reg",
)
"""Field of each rule -> key of its section."""
DEFAULTS = Regularize.model_fields
UNSCALED = ("LAMP", "Random", "BNScalePruner")
"""Methods whose scores are not divided by the mean of a layer."""

STATE = "state is kept in the checkpoint, never in the config"
OTHER_MODE = "it is of an importance_mode that is not supported"
SPARSE = "it is of a sparse_mode that is not supported"
NO_EFFECT = {
    "reach_mac_target": STATE,
    "log_str": STATE,
    "verbose": "the level of the logger 'pruningawaretraining' decides what is logged",
    "epochs_ft": "the loop decides how long it trains between events and after the last",
    "max_batches": "every batch that the model sees in training counts, or those of pruner.calibrate_with",
    "bn_recalibration": "running statistics go on in training; a rule's 'compensation' measures them anew",
    "bn_recalib_batches": "running statistics go on in training; a rule's 'compensation' measures them anew",
    "no_compensation": "nothing is compensated; a rule's 'compensation' with pruner.calibrate_with does that",
    "fold_bn_before_prune": "norms stay in the model, and their weights count in the group magnitude",
    "var_loss_weight": "the loss is the loop's",
    "alpha": OTHER_MODE,
    "normalize_importance": OTHER_MODE,
    "wv_base_mode": OTHER_MODE,
    "mag_guided_delta": OTHER_MODE,
    "sparse_gmp_target": SPARSE,
    "reparam_lambda": SPARSE,
    "reparam_normalize": SPARSE,
    "reparam_layers": SPARSE,
    "reparam_entropy_lambda": SPARSE,
    "reparam_during_pat": SPARSE,
    "reparam_target": SPARSE,
}
"""Keys of channel_sparsity_args that have no effect -> why."""


def tell_without_effect(args: ChannelArgs) -> None:
    """Say which keys change nothing, by themselves or beside the other ones."""
    section = CHANNELS.place
    for key in [key for key in NO_EFFECT if key in args.model_fields_set]:
        note_ignored(f"{section}.{key}", NO_EFFECT[key])
    if not args.prune_at_target:
        note_ignored(f"{section}.prune_at_target", "the target is met all the same, and channels are removed then")
    if args.mac_target and args.global_prune_rate is not None:
        note_ignored(f"{section}.global_prune_rate", "mac_target decides how far to prune")
    if args.isomorphic and not args.global_pruning:
        note_ignored(f"{section}.isomorphic", "without global_pruning every layer is ranked by itself")
    if "importance_mode" in args.model_fields_set and args.pruning_method != "VBP":
        note_ignored(f"{section}.importance_mode", f"it is of VBP, and pruning_method is {args.pruning_method}")
    if args.norm_per_layer is not None and args.pruning_method in UNSCALED:
        note_ignored(f"{section}.norm_per_layer", f"the scores of {args.pruning_method} are not divided by anything")
    if args.container is not None and not _several(args.input_shape):
        note_ignored(f"{section}.container", "the model gets one input, as it is")
    if args.prune_channels_at_init:
        for key in sorted({"end_epoch", "epoch_rate", "schedule", "pruning_schedule"} & args.model_fields_set):
            note_ignored(f"{section}.{key}", "with prune_channels_at_init all channels go at once")
    _tell_of_penalty(args.regularize or Regularize(), args.pruning_method, f"{section}.regularize")
    _tell_of_macs(args, f"{section}.MAC_params")


def _several(shape: list[int] | list[list[int]] | None) -> bool:
    return bool(shape) and isinstance((shape or [0])[0], list)


def _tell_of_penalty(values: Regularize, method: str, where: str) -> None:
    given = sorted(key for key in values.model_fields_set - {"reg"} if getattr(values, key) != DEFAULTS[key].default)
    why = "the BN scale penalty has no strength but reg" if method == "BNScalePruner" else ""
    for key in given:
        if why or not values.reg:
            note_ignored(f"{where}.{key}", why or "without reg there is no penalty to weigh")


def _tell_of_macs(args: ChannelArgs, where: str) -> None:
    if args.MAC_params is None or args.weighs_macs:
        return
    for key in sorted(args.MAC_params.model_fields_set - {"use_macs"}):
        note_ignored(f"{where}.{key}", "MACs do not weigh in the score: use_macs is not true")
