"""Finds the modifiers of a SparseML-style recipe: lists of tagged ones, newer mappings without tags, stages, and the
arithmetic that recipes may use for values."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pruningawaretraining.config.dialects import sparseml_keys as keys
from pruningawaretraining.config.dialects.base import TAG, note_ignored
from pruningawaretraining.errors import ConfigError, unknown

OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}

MODIFIERS: dict[str, type[keys.Modifier]] = {
    "EpochRangeModifier": keys.EpochRange,
    "SetLearningRateModifier": keys.SetRate,
    "LearningRateFunctionModifier": keys.RateFunction,
    "LearningRateModifier": keys.RateSchedule,
    "DistillationModifier": keys.Distillation,
    "ConstantPruningModifier": keys.Constant,
    "GMPruningModifier": keys.Pruning,
    "MagnitudePruningModifier": keys.UniformPruning,
    "GlobalMagnitudePruningModifier": keys.GlobalPruning,
    "MovementPruningModifier": keys.SampledPruning,
    "GWProdPruningModifier": keys.SampledPruning,
    "OBSPruningModifier": keys.SecondOrderPruning,
    "CAPruningModifier": keys.SecondOrderPruning,
    "FastCAPruningModifier": keys.FastPruning,
    "MFACPruningModifier": keys.MfacPruning,
    "ACDCPruningModifier": keys.AlternatingPruning,
    "ACDC_MagnitudePruningModifier": keys.CapAlternating,
    "ACDC_GlobalMagnitudePruningModifier": keys.CapAlternating,
    "RigLPruningModifier": keys.RegrowingPruning,
    "SparseGPTModifier": keys.OneShotPruning,
    "WandaPruningModifier": keys.WandaPruning,
    "QuantizationModifier": keys.Quantization,
    "LegacyQuantizationModifier": keys.Quantization,
}
"""Modifier -> its keys."""

AFTER_TRAINING = "quantization after training is not the pruner's; see docs/quantization.md"
FEATURES = "features are compared by 'distillation' of a native config; see docs/distillation.md"
OUTSIDE = {
    "GPTQModifier": AFTER_TRAINING,
    "SmoothQuantModifier": AFTER_TRAINING,
    "LogarithmicEqualizationModifier": AFTER_TRAINING,
    "SetWeightDecayModifier": "the weight decay is the optimizer's",
    "TrainableParamsModifier": "which parameters are trained is the loop's: requires_grad_()",
    "SetParamModifier": "parameters are set by the loop",
    "GradualParamModifier": "parameters are set by the loop",
    "SparsificationLoggingModifier": "the loop logs; pruner.report() has the sparsity of every layer",
    "LoggingModifier": "the loop logs; pruner.report() has the sparsity of every layer",
    "PerLayerDistillationModifier": FEATURES,
    "OutputDistillationModifier": FEATURES,
}
"""Modifiers that prune nothing -> why nothing is done about them."""

INSTEAD = "Allowed: GlobalMagnitudePruningModifier"
REFUSED = {
    "TopKASTPruningModifier": f"masked weights that grow back are not supported. {INSTEAD}",
    "STRPruningModifier": f"learned thresholds are not supported. {INSTEAD}",
    "PowerpropagationModifier": f"weights raised to a power are not supported. {INSTEAD}",
    "AdaPruningModifier": "it is not supported. Allowed: OBSPruningModifier, CAPruningModifier",
    "ASRegModifier": "a penalty on activations is not supported. Allowed: leave it out",
    "StructuredPruningModifier": "filters and channels are pruned by 'channel' rules. Allowed: a native config",
    "LayerPruningModifier": "layers are removed by 'depth' rules. Allowed: a native config",
    "LayerThinningModifier": "filters and channels are removed by 'channel' rules. Allowed: a native config",
}
"""Modifiers that would change what is pruned -> why they are refused."""

NAMES = (*MODIFIERS, *OUTSIDE, *REFUSED)
NEWER = {"start": "start_epoch", "end": "end_epoch", "targets": "params", "mask_structure": "mask_type"}
NEWER |= {"update_scheduler": "inter_func", "apply_globally": "global_sparsity", "update": "update_frequency"}
"""Keys of the newer form -> of the older one."""


@dataclass(frozen=True)
class Found:
    """A modifier in its recipe.

    Args:
        where: its place, for messages.
        name: of its class, without the tag's "!".
        modifier: its keys.
        offset: epochs that the stages before it train.
        once: its stage prunes without training.
        spelled: older name of a key -> the newer one that the recipe has.
    """

    where: str
    name: str
    modifier: keys.Modifier
    offset: float = 0.0
    once: bool = False
    spelled: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """The place of a key, under the name that the recipe has for it."""
        return f"{self.where}.{self.spelled.get(name, name)}"


def is_recipe(mapping: Mapping[str, Any]) -> bool:
    """Whether there are modifiers in a mapping: a key that ends in "modifiers", at the top or in a stage."""
    return any(True for _ in _groups(mapping))


def _groups(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise ConfigError(f"config: the key {key!r} is not text ({type(key).__name__})")
        if key.endswith("modifiers") and isinstance(value, (list, Mapping)):
            yield prefix + key, value
        elif isinstance(value, Mapping) and (key.endswith("stage") or any(_names_modifiers(one) for one in value)):
            yield from _groups(value, f"{prefix}{key}.")


def _names_modifiers(key: Any) -> bool:
    return isinstance(key, str) and key.endswith("_modifiers")


def modifiers_of(mapping: Mapping[str, Any]) -> list[Found]:
    """The modifiers of a recipe, stage by stage; those that are none of the pruner's are said and left out.

    Raises:
        ConfigError: an unknown modifier or key, or a value that is not allowed.
    """
    variables = _variables(mapping)
    found: list[Found] = []
    offset = 0.0
    plain = {key: value for key, value in mapping.items() if not isinstance(value, Mapping)}
    stages = {
        key: value for key, value in mapping.items() if isinstance(value, Mapping) and not key.endswith("modifiers")
    }
    top = {**plain, **{key: value for key, value in mapping.items() if key.endswith("modifiers")}}
    found += [one for where, group in _groups(top) for one in _of_group(where, group, variables, 0.0, False)]
    for stage, values in stages.items():
        once = values.get("run_type") == "oneshot"
        mine = [
            one for where, group in _groups({stage: values}) for one in _of_group(where, group, variables, offset, once)
        ]
        found += mine
        if values.get("run_type") == "train":
            ends = [one.modifier.end_epoch for one in mine if one.modifier.end_epoch > 0]
            if not ends and stage != list(stages)[-1]:
                note_ignored(f"{stage}.run_type", "it does not say how long the stage trains: 1 epoch is taken")
            offset += max(ends, default=1.0)
    return found


CAP_NAMES = frozenset(
    {
        "CAPruningModifier",
        "FastCAPruningModifier",
        "GWProdPruningModifier",
        "ACDC_MagnitudePruningModifier",
        "ACDC_GlobalMagnitudePruningModifier",
    }
)
"""Modifiers that only CAP's version of SparseML has."""
CAP_KEYS = frozenset({"cycle_mul", "cycle_warmup", "warmup", "decay_rate", "decay_epochs", "recomputation_inter_func"})
CAP_KEYS |= {"blocks_in_parallel", "traces_backup_dir"}
"""Keys that only CAP's version knows."""


def is_cap(found: Sequence[Found]) -> bool:
    """Whether a recipe is for CAP's version of SparseML, whose learning rates have an arithmetic of their own.

    It has a modifier or a key that only this version knows, or cycles of ``linear`` or ``cosine``.
    """
    if any(one.name in CAP_NAMES or one.modifier.model_fields_set & CAP_KEYS for one in found):
        return True
    rates = [one.modifier for one in found if isinstance(one.modifier, keys.RateFunction)]
    in_cycles = [one for one in rates if one.lr_func in ("linear", "cosine") and one.cycle_epochs is not None]
    return bool(in_cycles) or any(one.lr_func in ("exponential", "step") for one in rates)


def _variables(mapping: Mapping[str, Any]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for key, value in mapping.items():
        worked_out = evaluated(value, key, variables) if not isinstance(value, (list, Mapping)) else None
        if isinstance(worked_out, (int, float, str)):
            variables[key] = worked_out
    return variables


def _of_group(where: str, group: Any, variables: Mapping[str, Any], offset: float, once: bool) -> Iterator[Found]:
    for place, name, values in _entries(where, group):
        if name in OUTSIDE:
            note_ignored(f"{place} ({name})", OUTSIDE[name])
            continue
        if name in REFUSED:
            raise ConfigError(f"{place} ({name}): {REFUSED[name]}")
        if name not in MODIFIERS:
            raise ConfigError(unknown(place, name if name else values, sorted(NAMES)))
        yield _parsed(Found(place, name, keys.Modifier(), offset, once), values, variables)


def _entries(where: str, group: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(place, name, keys) of the modifiers of a list of tagged ones, or of a mapping of names."""
    if isinstance(group, Mapping):
        for name, values in group.items():
            yield f"{where}.{name}", str(name).lstrip("!"), values or {}
        return
    for number, one in enumerate(group):
        place = f"{where}[{number}]"
        if isinstance(one, Mapping) and TAG in one:
            yield place, str(one[TAG]).removeprefix("!"), {key: value for key, value in one.items() if key != TAG}
        elif isinstance(one, Mapping) and len(one) == 1:
            ((name, values),) = one.items()
            yield place, str(name).lstrip("!"), values or {}
        else:
            yield place, "", one


def _parsed(one: Found, values: Any, variables: Mapping[str, Any]) -> Found:
    """A modifier with its keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{one.where} ({one.name}): {values!r} is not a mapping of keys to values")
    model = MODIFIERS[one.name]
    given = {key: evaluated(value, f"{one.where}.{key}", variables) for key, value in values.items()}
    spelled: dict[str, str] = {}
    for key, older in NEWER.items():
        if key in given and key not in model.model_fields and older not in given:
            given[older] = given.pop(key)
            spelled[older] = key
    found = replace(one, spelled=spelled)
    try:
        modifier = model.model_validate(given)
    except ConfigError as error:
        lines = [_said(found, line) for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from error
    for key, why in model.unused.items():
        if key in modifier.model_fields_set and getattr(modifier, key) != model.model_fields[key].default:
            note_ignored(found.key(key), why)
    return replace(found, modifier=modifier)


def _said(one: Found, line: str) -> str:
    """A line about a modifier's key."""
    key, colon, rest = line.partition(":")
    return f"{one.where} ({one.name}): {one.spelled.get(key, key)}{colon}{rest}"


def evaluated(value: Any, where: str, variables: Mapping[str, Any]) -> Any:
    """A value with ``eval(...)`` worked out: numbers, the recipe's own variables, and + - * / // only.

    Raises:
        ConfigError: it cannot be worked out, or names a variable that the recipe does not have.
    """
    if isinstance(value, Mapping):
        return {key: evaluated(inner, f"{where}.{key}", variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [evaluated(inner, f"{where}[{number}]", variables) for number, inner in enumerate(value)]
    if not (isinstance(value, str) and value.startswith("eval(") and value.rstrip().endswith(")")):
        return value
    try:
        result = _arithmetic(ast.parse(value.rstrip()[5:-1].strip(), mode="eval").body, variables)
    except (SyntaxError, ZeroDivisionError, RecursionError, TypeError) as error:
        raise ConfigError(f"{where}: {value!r} cannot be worked out: {error}") from error
    except LookupError as error:
        raise ConfigError(
            f"{where}: {value!r} has {error.args[0]!r} in it. Allowed: numbers, + - * / and {sorted(variables)}; other "
            "values are given as load_config(file, variables={...})"
        ) from error
    return result


def _arithmetic(node: ast.AST, variables: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in variables:
        return variables[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_arithmetic(node.left, variables), _arithmetic(node.right, variables))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_arithmetic(node.operand, variables))
    raise LookupError(ast.unparse(node))
