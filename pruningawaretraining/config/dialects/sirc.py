"""Channel and slice pruning by ``channel_sparsity_args`` and ``slice_sparsity_args``: a rule each, channels first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from pruningawaretraining.config.dialects.base import native, note_ignored
from pruningawaretraining.config.dialects.flat import channel_target
from pruningawaretraining.config.dialects.sirc_keys import ChannelArgs, MacParams, SliceArgs
from pruningawaretraining.config.dialects.sirc_names import CHANNELS, SLICES, UNSCALED, tell_without_effect
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
        names = [*([CHANNELS] if channels else []), *([SLICES] if slices else [])]
        return native(rules, names, example_inputs=inputs, **options)


def channel_rule(args: ChannelArgs) -> dict[str, Any]:
    """Translate ``channel_sparsity_args`` into a rule.

    With a MAC target the schedule heads for 100%, so that each event is mild, and stops at the target. Pruning at init
    is one event with the full ratio.
    """
    tell_without_effect(args)
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
        "target": channel_target(_capped(args), args.mac_target or None),
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
    if not args.weighs_macs:
        return base
    options = {"alpha": params.alpha, "beta": params.beta}
    given = {key: value for key, value in options.items() if value is not None}
    return {"type": "mac_aware", "base": base, "mode": MAC_MODES[params.type.lower()], **given}


def _base(args: ChannelArgs) -> str | dict[str, Any]:
    base = VARIANCE[args.importance_mode] if args.pruning_method == "VBP" else CRITERIA[args.pruning_method]
    if args.norm_per_layer is None or args.pruning_method in UNSCALED:
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


def _capped(args: ChannelArgs) -> float | None:
    """The overall rate, which the old system cut silently where every layer's cap is lower."""
    rate, most = args.global_prune_rate, args.max_pruning_rate
    if rate and most and rate > most and args.mac_target:
        return most
    if rate and most and rate > most:
        note_ignored("channel_sparsity_args.global_prune_rate", f"max_pruning_rate {most} is lower and decides")
        return most
    return rate or None
