"""Channel and slice pruning by ``channel_sparsity_args`` and ``slice_sparsity_args``: a rule each, channels first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from pruningawaretraining.config.dialects.base import native, note_ignored
from pruningawaretraining.config.dialects.flat import channel_target
from pruningawaretraining.config.dialects.sirc_keys import ChannelArgs, MacParams, SliceArgs
from pruningawaretraining.config.schema import PruningConfig
from pruningawaretraining.config.strict import Strict
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import register

GROUP_NORM: dict[str, Any] = {"type": "magnitude", "p": 2, "normalize": "mean"}
CRITERIA: dict[str, str | dict[str, Any]] = {
    "BNScalePruner": "bn_scale",
    "GroupNormPruner": GROUP_NORM,
    "MACAwareImportance": GROUP_NORM,
    "VBP": "variance",
    "NormNet": "variance_next",
    "LAMP": "lamp",
    "Random": "random",
}
"""Criterion of each pruning_method; MACAwareImportance is the group norm weighted by MACs."""

VARIANCE = {"variance": "variance", "weight_variance": "variance_next", "tp_variance": "variance_magnitude"}
"""importance_mode of VBP -> criterion."""

SLICE_CRITERIA: dict[str, str | dict[str, Any]] = {"L2_norm": {"type": "magnitude", "p": 2}}
MAC_MODES = {"sum": "sum", "mul": "mul", "per_mac": "per_mac"}


class SircConfig(Strict):
    """The two sections; at least one of them."""

    channel_sparsity_args: ChannelArgs | None = Field(None, description="Channel pruning.")
    slice_sparsity_args: SliceArgs | None = Field(None, description="Slice pruning, after the channels.")
    reset_optimizer: bool = Field(False, description="Clear the optimizer's state after removal.")


@register("dialect", "sirc")
@dataclass(frozen=True)
class Sirc:
    """Channel pruning, slice pruning, or both."""

    keys: ClassVar[tuple[str, ...]] = ("channel_sparsity_args", "slice_sparsity_args")
    yaml_tags: ClassVar[tuple[str, ...]] = ()

    def recognises(self, mapping: Mapping[str, Any]) -> bool:
        """One of the two sections is there."""
        return any(key in mapping for key in self.keys)

    def translate(self, mapping: Mapping[str, Any]) -> PruningConfig:
        """A rule named "channels", a rule named "slices", or both in this order.

        Raises:
            ConfigError: an unknown key or a value that is not allowed.
        """
        given = SircConfig.model_validate({key: mapping[key] for key in mapping if key != "$schema"})
        channels, slices = given.channel_sparsity_args, given.slice_sparsity_args
        rules = [*([channel_rule(channels)] if channels else []), *([slice_rule(slices)] if slices else [])]
        if not rules:
            raise ConfigError(f"{', '.join(self.keys)}: both empty. Allowed: at least one section")
        inputs = None
        if channels and channels.input_shape is not None:
            inputs = {"shape": channels.input_shape, "container": channels.container}
        options = {"infer": bool(channels and channels.infer), "reset_optimizer": given.reset_optimizer}
        return native(rules, example_inputs=inputs, **options)


def channel_rule(args: ChannelArgs) -> dict[str, Any]:
    """Translate ``channel_sparsity_args`` into a rule.

    With a MAC target the schedule heads for 100%, so that each event is mild, and stops at the target. Pruning at init
    is one event with the full ratio.
    """
    _note_ignored(args)
    at_once = args.prune_channels_at_init
    return {
        "name": "channels",
        "pattern": "channel",
        "layers": args.layers,
        "criterion": channel_criterion(args),
        "schedule": "one_shot" if at_once else args.chosen_schedule,
        "scope": "local" if not args.global_pruning else "isomorphic" if args.isomorphic else "global",
        "start": args.start_epoch,
        "end": args.start_epoch if at_once else args.end_epoch,
        "every": args.epoch_rate,
        "target": channel_target(_capped(args.global_prune_rate, args.max_pruning_rate), args.mac_target or None),
        "final_sparsity": 1.0,
        "max_sparsity": args.max_pruning_rate,
        "multiple": args.block_size,
        "application": "remove" if at_once else "mask",
        "regularizer": channel_regularizer(args),
        "at_init": at_once,
        "enabled": args.is_prune,
    }


def channel_criterion(args: ChannelArgs) -> str | dict[str, Any]:
    """The criterion of a pruning_method, weighed with MACs when MAC_params say so (MACAwareImportance: unless they
    say no)."""
    base = _base(args)
    params = args.MAC_params or MacParams()
    wanted = params.use_macs if params.use_macs is not None else args.pruning_method == "MACAwareImportance"
    if not wanted:
        return base
    options = {"alpha": params.alpha, "beta": params.beta}
    given = {key: value for key, value in options.items() if value is not None}
    return {"type": "mac_aware", "base": base, "mode": MAC_MODES[params.type.lower()], **given}


def _base(args: ChannelArgs) -> str | dict[str, Any]:
    base = VARIANCE[args.importance_mode] if args.pruning_method == "VBP" else CRITERIA[args.pruning_method]
    if args.norm_per_layer is None or args.pruning_method in ("LAMP", "Random", "BNScalePruner"):
        return base
    normalize = "mean" if args.norm_per_layer else "none"
    return {**(base if isinstance(base, dict) else {"type": base}), "normalize": normalize}


def channel_regularizer(args: ChannelArgs) -> dict[str, Any] | None:
    """The penalty, or None where ``reg`` is 0: the growing L2, or for BNScalePruner a group lasso on norm weights."""
    values = args.regularize
    if values is None or values.reg == 0:
        return None
    if args.pruning_method == "BNScalePruner":
        return {"type": "bn_scale", "strength": values.reg}
    return {
        "type": "growing_l2",
        "strength": values.reg,
        "gamma": values.gamma,
        "alpha": values.alpha_shrinkage_reg,
        "mac_strength": values.mac_reg,
    }


def slice_rule(args: SliceArgs) -> dict[str, Any]:
    """Translate ``slice_sparsity_args`` into a rule.

    There a slice event takes place at multiples of epoch_rate, here every so many epochs from the start on: so the rule
    starts at the first such multiple. A rate of 0 prunes nothing, and a rule that does not even regularise is off.
    """
    start = -(-args.start_epoch // args.epoch_rate) * args.epoch_rate
    mode, rate = args.pruning_mode.lower(), args.prune_rate or None
    regularizer = {"type": "slice_penalty", "strength": args.reg} if args.reg > 0 else None
    return {
        "name": "slices",
        "pattern": {
            "type": "slice",
            "block_size": args.block_size,
            "depthwise_block_size": args.depthwise_block_size,
            "first_tap": args.disable_first_index,
            "order": "interleaved",
        },
        "layers": args.layers,
        "criterion": SLICE_CRITERIA[args.pruning_method],
        "schedule": "linear" if args.pruning_gradually else "one_shot",
        "scope": "local",
        "start": start,
        "end": None if args.end_epoch is None else max(args.end_epoch, start),
        "every": args.epoch_rate,
        "target": channel_target(rate, None),
        "regularizer": regularizer,
        "enabled": args.is_prune and (rate is not None or regularizer is not None or mode == "unprune"),
        "mode": mode,
    }


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


def _note_ignored(args: ChannelArgs) -> None:
    section = "channel_sparsity_args"
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
    if args.regularize and args.regularize.mac_reg and not args.regularize.reg:
        note_ignored(f"{section}.regularize.mac_reg", "without reg there is no penalty to weigh")
    if args.regularize and args.pruning_method == "BNScalePruner":
        for key in sorted(args.regularize.model_fields_set - {"reg"}):
            note_ignored(f"{section}.regularize.{key}", "the BN scale penalty has no strength but reg")


def _capped(rate: float | None, most: float) -> float | None:
    """The overall rate, which the old system cut silently where every layer's cap is lower."""
    if rate and most and rate > most:
        note_ignored("channel_sparsity_args.global_prune_rate", f"max_pruning_rate {most} is lower and decides")
        return most
    return rate or None
