"""Output of ``pat plan``: which layers would lose how much, and what would be left of latency, MACs and parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import has_weights, load_weights
from pruningawaretraining.experiment.calibration import TrainingBatches, loss_of
from pruningawaretraining.experiment.data import Pipeline
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.inspection import Inspected, load_inspected
from pruningawaretraining.experiment.schema import DataConfig, load_experiment
from pruningawaretraining.experiment.shipped import is_experiment, named
from pruningawaretraining.models.calling import tensors_of
from pruningawaretraining.report.summary import fraction, si, wrapped_name
from pruningawaretraining.session.plan import Plan, Planned, PlanOptions, needs_data, plan, rule_of

logger = logging.getLogger(__name__)
RANDOM = (
    "%s: no weights are given; which channels go is decided by those that the model is built with. Allowed: "
    "--weights FILE, or an experiment with model.weights"
)
WITH_DATA = "reconstruction"
"""The criterion of models by name where data is given; without, it is that of weights alone."""
BATCH = 32
SHORT = {"parameters": "params"}
BAR, MOST_NAMED, NAME_WIDTH = 12, 3, 24


@dataclass(frozen=True)
class Planning:
    """Options of a plan.

    Args:
        source: as for ``pat inspect``: a model by name, or an experiment.
        input_shape: of the example input.
        weights: a file of dense weights; None for those of the config.
        data: of an experiment, instead of its ``data.root``; of a model by name, an .npz file or a folder of images.
        criterion: instead of the rule's.
    """

    source: str
    input_shape: Sequence[int] | None = None
    weights: Path | None = None
    data: Path | None = None
    criterion: str | None = None

    @property
    def path(self) -> str:
        """The file of the experiment, or the name of the model."""
        return named(self.source)

    @property
    def is_experiment(self) -> bool:
        """Whether it is an experiment."""
        return is_experiment(self.path)


def planned(of: Planning, wanted: Sequence[tuple[str, float]], options: PlanOptions) -> Plan:
    """Plan for a model by name, or for an experiment's model and rule.

    Args:
        of: the model.
        wanted: cost and fraction of each target.
        options: of latency.

    Raises:
        ConfigError, ModelError: see :func:`~pruningawaretraining.session.plan.plan`.
        CheckpointError: the weights do not fit.
    """
    if not wanted:
        raise ConfigError("--latency, --macs, --params: none is given. Allowed: fractions to keep, such as 0.5 0.33")
    seen = load_inspected(of.path, of.input_shape, data=of.data if of.is_experiment else None)
    config = load_experiment(of.path) if of.is_experiment else None
    if of.weights is not None:
        load_weights(seen.model, str(of.weights))
    elif config is None or not has_weights(config.model):
        logger.warning(RANDOM, of.source)
    by_data = WITH_DATA if of.data is not None and config is None else None
    rule = rule_of(seen.pruning, of.criterion or by_data)
    calibration = None
    if needs_data(rule) and (config is not None or of.data is not None):
        batches = _batches(None if config is None else config.data, of.data, seen)
        calibration = Calibration(seen.model, batches, loss_of)
    return plan(seen.model.eval(), rule, seen.inputs, wanted, calibration, options)


def _batches(config: DataConfig | None, data: Path | None, seen: Inspected) -> TrainingBatches:
    """Training batches of an experiment's data, or of the file or folder that is given."""
    if config is None:
        size = next(tensors_of(seen.inputs)).shape[-1]
        kind = {"name": "npz"} if str(data).endswith(".npz") else {"name": "imagefolder", "size": size}
        config = DataConfig.model_validate({**kind, "root": str(data)})
    elif data is not None:
        config = config.model_copy(update={"root": str(data)})
    found = load_data(config)
    return TrainingBatches(Pipeline(found.mean, found.std), found.train, BATCH, torch.device("cpu"))


# --- tables ---------------------------------------------------------------------------------------------------------


def plan_view(found: Plan, width: int = 80) -> Group:
    """The widths of all sets, then what each target comes to, and what is out of reach.

    Args:
        found: the plan.
        width: of the terminal, in characters.
    """
    lines = [f"{_title(one)}: {one.refused}" for one in found.targets if one.refused]
    lines += [found.note] if found.note else []
    parts: list[RenderableType] = [_widths(found, width), _costs(found)]
    return Group(*parts, *(Text(line) for line in lines))


def _title(one: Planned) -> str:
    return f"{SHORT.get(one.target, one.target)} {one.fraction:g}"


def _widths(found: Plan, width: int) -> Table:
    """One row a set of coupled layers: its width, and what is left of it, as a bar and as a number."""
    counted = max((len(str(one.size)) for one in found.sets), default=1)
    fixed = 4 + NAME_WIDTH + 10 + len(found.targets) * (counted + 4)
    bar = max(0, min(BAR, (width - fixed) // max(len(found.targets), 1)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("set", justify="right", no_wrap=True)
    table.add_column("layers", overflow="fold")
    table.add_column("now", justify="right", no_wrap=True)
    for one in found.targets:
        table.add_column(_title(one), no_wrap=True)
    for number, row in enumerate(found.sets, 1):
        cells = [_cell(kept, row.size, bar, counted) for kept in row.kept]
        table.add_row(str(number), _layers(row.layers or (row.name,)), str(row.size), *cells)
    return table


def _layers(names: Sequence[str]) -> Text:
    """The layers of a set, one a line; of many, the first."""
    shown = [wrapped_name(name, NAME_WIDTH) for name in names[:MOST_NAMED]]
    more = len(names) - len(shown)
    return Text("\n".join([*shown, *([f"and {more} more"] if more > 0 else [])]))


def _cell(kept: int | None, size: int, bar: int, counted: int) -> Text:
    if kept is None:
        return Text("–")
    full = round(bar * kept / size)
    text = Text("█" * full + "░" * (bar - full) + " " * bool(bar))
    text.append(f"{kept:>{counted}}", style="" if kept == size else "bold")
    return text


def _costs(found: Plan) -> Table:
    """Latency, MACs and parameters, dense and for each target; measured latencies with their confidence interval."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("latency", "of dense", "predicted", "MACs", "params"):
        table.add_column(heading, justify="right", no_wrap=True)
    dense_ms = "–" if found.latency_ms is None else f"{found.latency_ms:.3g} ms"
    table.add_row("dense", dense_ms, "", "", si(found.macs), si(found.parameters))
    for one in found.targets:
        if one.refused:
            table.add_row(_title(one), "out of reach")
            continue
        counts = ((one.macs, found.macs), (one.parameters, found.parameters))
        shares = [f"{si(kept)}  {fraction(kept, dense) or 0:.3f}" for kept, dense in counts]
        table.add_row(_title(one), *_latency(one), *shares)
    return table


def _latency(one: Planned) -> tuple[str, str, str]:
    """Milliseconds and their share of the dense model's with its interval, if it is measured; the share predicted."""
    found = one.latency
    if found is None:
        return "–", "–", "–"
    predicted = f"{found.predicted_ms / found.dense_ms:.3f}"
    if not one.measured:
        return f"{found.predicted_ms:.3g} ms", "(noisy)" if found.is_noisy else "", predicted
    share = f"{found.measured_ms / found.dense_ms:.3f}"
    if found.low_ms is not None and found.high_ms is not None:
        share += f"\n{found.low_ms / found.dense_ms:.3f}–{found.high_ms / found.dense_ms:.3f}"
    return f"{found.measured_ms:.3g} ms", share, predicted
