"""``pat oneshot``: prune an experiment's trained model at once, to several sparsities, and compare.

Nothing is trained: the model comes with its weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from pruningawaretraining.checkpoint.pruned import save_pruned
from pruningawaretraining.config.options import support_of
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.calibration import SourceBatches, TrainingBatches, loss_of
from pruningawaretraining.experiment.data import Pipeline
from pruningawaretraining.experiment.datasets import load_data
from pruningawaretraining.experiment.run import find_device
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.tracking import tracked
from pruningawaretraining.files import write_text
from pruningawaretraining.registry import build
from pruningawaretraining.report.summary import si
from pruningawaretraining.report.svg import Guide, LineChart, Series, line_chart, standalone
from pruningawaretraining.session.one_shot import AfterPruning, accuracy, one_shot

logger = logging.getLogger(__name__)
TEST_BATCH = 500
DENSE = 0.0
RESULTS, PICTURE = "oneshot.json", "oneshot.svg"


@dataclass(frozen=True)
class OneShotOptions:
    """Options of ``pat oneshot``.

    Args:
        sparsities: fractions to remove; None for the rules' own targets.
        out: folder of the results.
        save: whether to save every pruned model.
        after: compensation of channels, and measuring norms again.
        wandb: project of Weights & Biases to log to, or None.
        overwrite: replace the results that are in the folder.
    """

    sparsities: tuple[float, ...] | None = None
    out: Path | None = None
    save: bool = False
    after: AfterPruning = AfterPruning()
    wandb: str | None = None
    overwrite: bool = False


def run_one_shot(config: ExperimentConfig, options: OneShotOptions) -> list[dict[str, Any]]:
    """Prune the config's model, which is to be trained already, by its rules.

    Args:
        config: model (with its weights), data and pruning rules; nothing is trained.
        options: see there.

    Returns:
        A row for the dense model and one for each sparsity: "sparsity", "zeros" (of all weights of more than one
        dimension), "parameters", "macs" of one image and "accuracy" on the test images. Also written to
        ``oneshot.json`` and pictures.

    Raises:
        ConfigError: sparsities for several rules, or anything that the config gets wrong.
    """
    folder = options.out or config.folder()
    if (folder / RESULTS).is_file() and not options.overwrite:
        raise ConfigError(f"out: {str(folder)!r} holds results. Allowed: another --out, or --overwrite")
    device = find_device(config.device)
    torch.manual_seed(config.seed)
    data = load_data(config.data)
    model = build_model(config.model, len(data.classes), data.shape[0]).to(device).eval()
    if config.model.weights is None:
        logger.warning("model.weights: none given; pruning the model as model.name builds it")
    pipeline = Pipeline(data.mean, data.std, channels_last=config.channels_last)
    train = TrainingBatches(pipeline, data.train, config.batch_size, device)
    test = SourceBatches(pipeline, data.test, TEST_BATCH, device)
    models = prune_by_rules(model, config.pruning.rules, train, options)
    rows = [_row(DENSE, model, test), *(_row(sparsity, one, test) for sparsity, one in models.items())]
    for stale in folder.glob("pruned_*.safetensors"):
        stale.unlink()
    write_results(rows, folder, config.name)
    if options.save:
        for sparsity, one in models.items():
            save_pruned(one, folder / f"pruned_{sparsity:g}.safetensors")
    with tracked(options.wandb, config.name) as watch:
        for row in rows:
            watch(row)
    return rows


def prune_by_rules(
    model: nn.Module, rules: Sequence[Rule], train: TrainingBatches, options: OneShotOptions
) -> dict[float, nn.Module]:
    """One rule at every sparsity, or several rules one after the other, each to its own target.

    Raises:
        ConfigError: no rule is enabled, or sparsities are given for several.
    """
    active = [rule for rule in rules if rule.enabled and rule.mode == "prune"]
    if not active:
        raise ConfigError("pruning.rules: none prunes. Allowed: one rule with a target, or several")
    if len(active) == 1:
        return one_shot(model, active[0], train, loss_of, options.sparsities, after=options.after)
    if options.sparsities is not None:
        raise ConfigError(f"--sparsities: the config has {len(active)} rules, each with a target of its own")
    for number, rule in enumerate(active):
        last = number == len(active) - 1
        channels = support_of(build("pattern", rule.pattern, "pattern")).removable
        compensation = options.after.compensation if channels else "none"
        after = replace(options.after, compensation=compensation) if last else AfterPruning(compensation)
        (model,) = one_shot(model, rule, train, loss_of, after=after).values()
    return {zeros_of(model): model}


def zeros_of(model: nn.Module) -> float:
    """The fraction of zeros among all weights of more than one dimension."""
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / max(sum(weight.numel() for weight in weights), 1)


def _row(sparsity: float, model: nn.Module, test: SourceBatches) -> dict[str, Any]:
    return {
        "sparsity": sparsity,
        "zeros": round(zeros_of(model), 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, next(iter(test))[0][:1]),
        "accuracy": round(accuracy(model, test), 4),
    }


def write_results(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """Write ``oneshot.json`` and ``oneshot.svg``: accuracy against sparsity."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, json.dumps({"name": name, "rows": list(rows)}, indent=1) + "\n")
    points = sorted((float(row["sparsity"]), float(row["accuracy"])) for row in rows[1:])
    chart = LineChart(
        f"{name}: accuracy against sparsity",
        [Series("pruned, not fine-tuned", points)],
        guides=[Guide(float(rows[0]["accuracy"]), "dense")],
        y_format=_percent,
        y_range=(0.0, 1.02),
        x_label=f"sparsity of {name}, not fine-tuned",
        x_format=_percent,
        whole=False,
    )
    write_text(folder / PICTURE, standalone(line_chart(chart)))


def written_in(folder: Path) -> list[Path]:
    """The files that ``run_one_shot`` wrote into its folder."""
    return [folder / RESULTS, folder / PICTURE, *sorted(folder.glob("pruned_*.safetensors"))]


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table("", "sparsity", "zeros", "parameters", "MACs", "accuracy", box=box.SIMPLE)
    for number, row in enumerate(rows):
        name = "pruned" if number else "dense"
        level, zeros = f"{row['sparsity']:.4g}" if number else "", f"{row['zeros']:.1%}"
        counts = (f"{row['parameters']:,}", si(row["macs"]))
        table.add_row(name, level, zeros, *counts, f"{row['accuracy']:.2%}")
    return table
