"""The notebook runs cell by cell and is what its script writes; reports and curves show themselves in notebooks."""

from __future__ import annotations

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pruningawaretraining.report import svg
from pruningawaretraining.report.notebook import Curves
from pruningawaretraining.report.summary import Report

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def picture(html: str) -> str:
    """The text of the SVG picture in a page, which has to be well-formed."""
    (found,) = re.findall(r'src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"', html)
    text = base64.b64decode(found).decode()
    ElementTree.fromstring(text)
    return text


class Shown:
    """Stands for a notebook's display: keeps every state of what it shows."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def __call__(self, what: Any, display_id: bool = False) -> Shown:
        self.update(what)
        return self

    def update(self, what: Any) -> None:
        self.pages.append(what._repr_html_())


def test_the_notebook_is_what_its_script_writes() -> None:
    assert NOTEBOOK.read_text(encoding="utf-8") == runpy.run_path(str(ROOT / "scripts" / "make_notebook.py"))["text"]()


def test_the_notebook_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every code cell in one namespace, with fewer epochs; the last line of a cell is shown if it is an expression."""
    monkeypatch.chdir(tmp_path)
    shown = Shown()
    names: dict[str, Any] = {"display": shown, "__name__": "__main__"}
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert sum("epochs = 12" in cell for cell in cells) == 1
    for cell in cells:
        exec(compile(cell.replace("epochs = 12", "epochs = 4"), "cell", "exec"), names)
    assert names["pruner"].phase == "finetune" and names["pruner"].macs.fraction <= 0.5
    assert names["difference"] == 0.0
    assert len(shown.pages) == 5 and ">accuracy 0." in picture(shown.pages[-1])
    assert ">MACs 0.4" in picture(shown.pages[-1])
    assert "removed" in capsys.readouterr().out and not caplog.text, "notebooks show warnings in red"
    page = names["pruner"].report()._repr_html_()
    assert "finetune" in page and "stages.1.0.conv1" in picture(page)


def test_a_report_in_a_notebook_has_a_picture_and_a_table() -> None:
    layer = {"name": "a<b>", "type": "Conv2d", "dense_out": 64, "kept_out": 32, "dense_in": 3, "kept_in": 3}
    page = Report("prune", 0.5, {"dense": 2_000_000, "kept": 1_000_000}, {}, [layer])._repr_html_()
    assert "prune · sparsity 50.0%<br>MACs 1M of 2M (50.0%)" in page, "blanks in a row are one in a page"
    assert "<td>64 → 32</td>" in page and "a&lt;b&gt;" in page and "<b>" not in page
    assert "a&lt;b&gt;" in picture(page)
    assert "<img" not in Report("done", 0.0, {}, {})._repr_html_()


def test_curves_grow() -> None:
    curves = Curves("Accuracy <by> epoch")
    assert curves._repr_html_() == ""
    curves.add(0, accuracy=0.25)
    first = picture(curves._repr_html_())
    curves.add(1, accuracy=0.75, MACs=0.5)
    page = curves._repr_html_()
    assert "Accuracy &lt;by&gt; epoch" in page
    assert picture(page) != first
    texts = ElementTree.fromstring(picture(page)).iter("{http://www.w3.org/2000/svg}text")
    assert [one.text for one in texts][-2:] == ["accuracy 0.75", "MACs 0.5"], "the legend is in the picture"


def test_pictures_are_light_on_their_white_ground() -> None:
    """Whatever the colours of the system: a notebook's theme is its own."""
    curves = Curves("Accuracy by epoch")
    curves.add(0, accuracy=0.25)
    drawn = picture(curves._repr_html_())
    assert "prefers-color-scheme" not in drawn and "--fg: #1f2328" in drawn and "color-scheme: light;" in drawn
    assert "prefers-color-scheme" in svg.standalone(svg.svg_of("a file", 10, [])), "files follow the system"
