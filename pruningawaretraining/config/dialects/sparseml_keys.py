"""The modifiers of SparseML-style recipes, their keys, and the arithmetic that recipes may use for values."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from pruningawaretraining.config.dialects.base import TAG
from pruningawaretraining.config.strict import Amount, Count, Strict, UnitInterval
from pruningawaretraining.errors import ConfigError, unknown

OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


class Modifier(Strict):
    """What every modifier has."""

    start_epoch: float = Field(-1.0, description="First epoch.")
    end_epoch: float = Field(-1.0, description="Last epoch; -1 for none.")


class EpochRange(Modifier):
    """How long to train."""


class SetRate(Modifier):
    """A learning rate from an epoch on."""

    learning_rate: Amount | None = Field(None, description="The rate; absent: the optimizer's own.")
    constant_logging: bool = Field(False, description="Ignored.")


class RateFunction(Modifier):
    """A learning rate that changes between two epochs."""

    lr_func: Literal["linear", "cosine", "cyclic_linear"] = Field(description="How it changes.")
    init_lr: Amount = Field(description="The rate at the start (of every cycle).")
    final_lr: Amount = Field(description="The rate at the end (of every cycle).")
    cycle_epochs: Amount = Field(1.0, description="Epochs of a cycle, for cyclic_linear.")
    constant_logging: bool = Field(False, description="Ignored.")


class Pruning(Modifier):
    """What every pruning modifier has."""

    params: str | list[str] = Field("__ALL_PRUNABLE__", description="Parameters: names, 're:...', or all.")
    init_sparsity: UnitInterval | Literal["__FROM_PARAM__"] = Field(
        0.0, description="Ignored: it rises from what there is."
    )
    final_sparsity: UnitInterval | dict[str, list[str]] | None = Field(
        None, description="Sparsity of the last event, or sparsity -> parameters."
    )
    update_frequency: float = Field(-1.0, description="Epochs between events.")
    inter_func: Literal["linear", "cubic", "inverse_cubic"] = Field("cubic", description="How the sparsity rises.")
    mask_type: str = Field("unstructured", description="'unstructured', 'block4', '4x1' or 'N:M' (N of M stay).")
    global_sparsity: bool | None = Field(None, description="One ranking over all layers, or the same in each.")
    leave_enabled: bool = Field(True, description="Whether masks stay after the end.")
    log_types: Any = Field(None, description="Ignored.")
    phased: bool = Field(False, description="Ignored.")


class SecondOrderPruning(Pruning):
    """What the second-order modifiers have beside that."""

    num_grads: Count = Field(1024, description="Gradients behind the curvature.")
    damp: float | None = Field(None, gt=0, description="Dampening.")
    fisher_block_size: Count = Field(50, description="Weights in a Fisher block.")
    grad_sampler_kwargs: dict[str, Any] = Field({}, description="batch_size: samples behind each gradient.")
    num_recomputations: Count = Field(1, description="Rounds with fresh curvature in each event.")
    blocks_in_parallel: int | None = Field(None, description="Blocks worked on at once; -1 or absent: our choice.")
    fisher_inv_device: str | None = Field(None, description="Device of the Fisher.")
    traces_backup_dir: str | None = Field(None, description="Folder to spool the Fisher to.")


MODIFIERS: dict[str, type[Modifier]] = {
    "!EpochRangeModifier": EpochRange,
    "!SetLearningRateModifier": SetRate,
    "!LearningRateFunctionModifier": RateFunction,
    "!GlobalMagnitudePruningModifier": Pruning,
    "!MagnitudePruningModifier": Pruning,
    "!OBSPruningModifier": SecondOrderPruning,
    "!CAPruningModifier": SecondOrderPruning,
    "!FastCAPruningModifier": SecondOrderPruning,
}
"""YAML tag -> keys."""


def parse_modifier(values: Any, where: str, variables: Mapping[str, Any]) -> tuple[str, Modifier]:
    """A tagged mapping as a modifier.

    Args:
        values: the mapping, its tag under ``"!tag"``.
        where: its place in the recipe, for messages.
        variables: the recipe's numbers, for ``eval(...)``.

    Raises:
        ConfigError: no or an unknown tag, an unknown key, or a value that is not allowed.
    """
    tag = values.get(TAG) if isinstance(values, Mapping) else None
    if tag not in MODIFIERS:
        raise ConfigError(unknown(where, tag or values, MODIFIERS))
    given = {key: evaluated(value, f"{where}.{key}", variables) for key, value in values.items() if key != TAG}
    try:
        return tag, MODIFIERS[tag].model_validate(given)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{where} ({tag}): {line}" for line in str(error).splitlines())) from error


def evaluated(value: Any, where: str, variables: Mapping[str, Any]) -> Any:
    """A value with ``eval(...)`` worked out: numbers, the recipe's own numbers, and + - * / // only."""
    if isinstance(value, Mapping):
        return {key: evaluated(inner, f"{where}.{key}", variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [evaluated(inner, f"{where}[{number}]", variables) for number, inner in enumerate(value)]
    if not (isinstance(value, str) and value.startswith("eval(") and value.endswith(")")):
        return value
    try:
        result = _arithmetic(ast.parse(value[5:-1].strip(), mode="eval").body, variables)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ConfigError(f"{where}: {value!r} cannot be worked out: {error}") from error
    except LookupError as error:
        raise ConfigError(
            f"{where}: {value!r} has {error.args[0]!r} in it. Allowed: numbers, + - * / and {sorted(variables)}"
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


def whole_epoch(epoch: float) -> int:
    """The first whole epoch from ``epoch`` on."""
    return max(0, math.ceil(epoch))
