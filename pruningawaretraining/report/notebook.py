"""Output for notebooks: a report with its picture, and curves that grow during training.

Pictures are embedded as images, so that their styles do not reach the page around them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pruningawaretraining.report import coupling, svg

IMAGE = Markup(
    '<img alt="{}" src="data:image/svg+xml;base64,{}" style="max-width: 100%; width: {}px; background: #fff">'
)
TABLE = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>")
STYLES = ("s-kept", "s-dense", "s-other")
"""Of the lines of a curve, in turn."""


def image(drawn: Markup, alt: str, width: int = 560) -> Markup:
    """An SVG element as an ``<img>``."""
    return IMAGE.format(alt, base64.b64encode(svg.standalone(drawn, light=True).encode()).decode("ascii"), width)


def report_html(
    head: str, layers: Sequence[Mapping[str, Any]], headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """A report: its headline, the widths of its layers as a picture, and a table.

    Args:
        head: lines of text.
        layers: as in a report.
        headings, rows: of the table.
    """
    lines = Markup("<br>").join(head.splitlines())
    parts = [Markup("<p>{}</p>").format(lines)]
    if layers:
        heads = Markup("").join(Markup("<th>{}</th>").format(one) for one in headings)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
            for row in rows
        )
        parts += [image(coupling.picture(layers), "Width of each layer, dense and kept"), TABLE.format(heads, body)]
    return str(Markup("\n").join(parts))


class Curves:
    """Numbers by epoch, drawn: ``shown = display(curves, display_id=True)``, then ``shown.update(curves)``.

    Args:
        title: above the picture, and its alt text.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._values: dict[str, list[tuple[float, float]]] = {}

    def add(self, epoch: int, **values: float) -> None:
        """Add one epoch.

        Args:
            epoch: counted from 0.
            values: name of a line -> its value, such as a fraction in [0, 1].
        """
        for name, value in values.items():
            self._values.setdefault(name, []).append((float(epoch), float(value)))

    def _repr_html_(self) -> str:
        if not self._values:
            return ""
        series = [
            svg.Series(f"{name} {points[-1][1]:.3g}", points, STYLES[number % len(STYLES)])
            for number, (name, points) in enumerate(self._values.items())
        ]
        drawn = svg.line_chart(svg.LineChart(self.title, series, legend=True))
        return str(Markup("<p>{}</p>").format(self.title) + image(drawn, self.title))
