"""The picture of ``pat latency``: accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.timing import Timed
from pruningawaretraining.files import write_text
from pruningawaretraining.report.coupling import COLOURS
from pruningawaretraining.report.svg import LineChart, Series, line_chart, standalone


def draw_timing(rows: Sequence[Timed], path: Path, title: str) -> None:
    """Draw accuracy against latency as SVG: a colour for each family, a point for each model.

    Raises:
        ConfigError: no model has an accuracy.
    """
    known = [one for one in rows if one.accuracy is not None]
    if not known:
        raise ConfigError("--plot: no accuracy is known. Allowed: with at least one folder of a run")
    series = []
    for number, family in enumerate(dict.fromkeys(one.family for one in known)):
        mine = sorted((one for one in known if one.family == family), key=lambda one: one.median_ms)
        points = [(one.median_ms, one.accuracy or 0.0) for one in mine]
        series.append(Series(family, points, f"r-{number % COLOURS}", [one.name for one in mine]))
    slowest = max(one.median_ms for one in known)
    values = [one.accuracy or 0.0 for one in known]
    air = max(0.02, 0.1 * (max(values) - min(values)))  # two points at least, so that small differences look small
    chart = LineChart(
        f"Accuracy against latency: {title}",
        series,
        y_format=lambda value: f"{100 * value:.3g}%",
        y_range=(max(0.0, min(values) - air), min(1.0, max(values) + air)),
        x_label=f"latency, ms ({title})",
        whole=False,
        x_range=(0.0, 1.1 * slowest),
    )
    write_text(path, standalone(line_chart(chart)))
