"""Reports: what they say, that they stand alone, and that they live with what a run did not record."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_fixture
from rich.console import Console

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.report import Report, coupling, figures, svg, tables
from pruningawaretraining.report.html import duration, write_report
from pruningawaretraining.report.run import Phase, Run, phases_of
from pruningawaretraining.report.summary import arrow, percent, render, si

SECTIONS = ("result", "training", "channels", "norms", "latency", "verification", "details")


class Page(HTMLParser):
    """Sections, pictures, attributes and text of a page; unbalanced tags are an error."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] != "style" else ""

    def sections(self) -> list[str]:
        return [str(found["id"]) for tag, found in self.tags if tag == "section"]


def write(folder: Path, **changes: Any) -> tuple[str, Page]:
    path = write_report(report_fixture.write_run(folder, **changes))
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_report_has_every_section_and_the_numbers(tmp_path: Path) -> None:
    _, page = write(tmp_path / "run")
    assert tuple(page.sections()) == SECTIONS
    said = " ".join(page.text.split())
    for number in ("98.89%", "98.61%", "−0.28 pt", "272k", "121k", "1.12 MB", "0.467 ms", "3.8e-06", "57.3%", "3.11.2"):
        assert number in said
    for phase in ("regularize epochs 0–7", "prune epochs 8–17", "finetune epochs 18–29"):
        assert phase in said
    pictures = [found for tag, found in page.tags if tag == "svg" and "role" in found]
    assert len(pictures) == 4 + 1 + 10 + 1  # training, coupled layers, norms of all and of nine sets, latency
    assert all(found["aria-label"] for found in pictures)
    assert "rules:" in said and "layer3.1.conv1" in said


def test_the_report_stands_alone(tmp_path: Path) -> None:
    text, page = write(tmp_path / "run")
    assert not re.search(r"(https?:)?//\w|@import|url\(", text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all((found.get("href") or "#").startswith("#") and "src" not in found for _, found in page.tags)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not re.search(r"[^a-z](nan|inf)[^a-z]", text)
    assert [item.name for item in (tmp_path / "run").iterdir() if item.name.startswith(".")] == []


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    folder = report_fixture.write_run(tmp_path / "run", name=evil, data={"name": evil}, environment={evil: evil})
    summary = json.loads((folder / "summary.json").read_text())
    for layer in summary["pruning"]["layers"]:
        layer["name"] = evil
    for group in summary["pruning"]["groups"]:
        group.update(source=evil, dependencies=[evil])
    (folder / "summary.json").write_text(json.dumps(summary))
    recorded = json.loads((folder / "norms.json").read_text())
    for epoch in recorded["epochs"]:
        epoch["sets"] = {f"{evil}{key}": value for key, value in epoch["sets"].items()}
    (folder / "norms.json").write_text(json.dumps(recorded))
    (folder / "config.yaml").write_text(evil)
    page = Page(write_report(folder).read_text())
    assert "script" not in [tag for tag, _ in page.tags] and page.text.count(evil) > 20


@pytest.mark.parametrize(
    ("changes", "removed", "sections"),
    [
        ({"latency": None}, [], [name for name in SECTIONS if name != "latency"]),
        ({"verification": None}, [], [name for name in SECTIONS if name != "verification"]),
        ({"pruning": None}, ["norms.json"], ["result", "training", "latency", "verification", "details"]),
        ({}, ["metrics.jsonl", "norms.json", "config.yaml"], [n for n in SECTIONS if n not in ("training", "norms")]),
    ],
)
def test_what_was_not_recorded_is_left_out(
    tmp_path: Path, changes: dict[str, Any], removed: list[str], sections: list[str]
) -> None:
    folder = report_fixture.write_run(tmp_path / "run", **changes)
    for name in removed:
        (folder / name).unlink()
    page = Page(write_report(folder).read_text())
    assert page.sections() == sections


def test_a_run_of_nothing_but_a_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert Page(write_report(tmp_path).read_text()).sections() == ["result", "details"]


def test_no_baseline_and_links_that_were_not_run(tmp_path: Path) -> None:
    dense = {"accuracy": None, "macs": 100, "parameters": 10, "bytes": 40, "latency_ms": None, "seconds": None}
    links = {
        "scale": 1.0,
        "masked_removed": 2e-3,
        "removed_reloaded": 0.0,
        "reloaded_onnx": None,
        "onnx_accuracy": None,
    }
    _, page = write(tmp_path / "run", dense=dense, verification=links, target={"macs": None, "sparsity": 0.3})
    assert "not run" in page.text and "A link does not hold" in page.text and "98.61%" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "holds no summary.json"),
        ("summary.json", "{", "summary.json' cannot be read: not JSON"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl: list where"),
        ("norms.json", "", "norms.json' cannot be read: not JSON"),
    ],
)
def test_damaged_runs(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def pruner_report() -> Report:
    layer = {"name": "stem[0]", "type": "Conv2d", "set": "stem", "dense_out": 64, "kept_out": 32, "dense_in": 3,
             "kept_in": 3, "dense_macs": 2_000_000, "kept_macs": 1_000_000, "parameters": 864}  # fmt: skip
    group = {"number": 0, "source": "stem[0]", "dependencies": ["bn", "head"], "size": 64, "kept": 32}
    macs = {"dense": 81_000_000, "kept": 40_100_000, "fraction": 0.495}
    return Report("prune", 0.5, macs, {"dense": 1000, "kept": 500, "fraction": 0.5}, [layer], [group])


def test_report_prints_as_a_table_and_converts_to_plain_data() -> None:
    report = pruner_report()
    text = str(report)
    for part in ("prune", "sparsity 50.0%", "40.1M of 81M (49.5%)", "stem[0]", "64 → 32", "1M", "864"):
        assert part in text
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "stem[0]" in console.export_text()
    plain = report.to_dict()
    keys = ["phase", "sparsity", "macs", "parameters", "layers", "groups", "batch", "masked", "latency"]
    assert list(plain) == keys and plain["latency"] is None
    assert json.loads(json.dumps(plain)) == plain
    plain["groups"][0]["dependencies"].clear()
    assert report.groups[0]["dependencies"] == ["bn", "head"]
    assert "done" in str(Report("done", 0.0, {}, {}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (5, "5"),
        (12.34, "12.3"),
        (999, "999"),
        (1000, "1k"),
        (999_600, "1M"),
        (1_234_567, "1.23M"),
        (None, "–"),
    ],
)
def test_si(value: float | None, text: str) -> None:
    assert si(value) == text


def test_small_texts() -> None:
    assert [percent(0.4987), percent(None), percent(1.0, 0)] == ["49.9%", "–", "100%"]
    assert [arrow(64, 32), arrow(64, 64), arrow(None, None), arrow(64, None)] == ["64 → 32", "64", "–", "64"]
    assert [tables.byte_count(value) for value in (512, 1536, 2.5e6, None)] == ["512B", "1.54 kB", "2.5 MB", "–"]
    assert [duration(value) for value in (None, 5.25, 93.1, 3720)] == ["", "5.2 s", "1 min 33 s", "1 h 2 min"]


@pytest.mark.parametrize(
    ("dense", "pruned", "change", "good"),
    [
        (0.98, 0.99, "+1.00 pt", True),
        (0.98, 0.98, "same", None),
        (0.98, 0.975, "−0.50 pt", None),
        (0.98, 0.95, "−3.00 pt", False),
        (None, 0.95, "–", None),
    ],
)
def test_accuracy_row(dense: float | None, pruned: float, change: str, good: bool | None) -> None:
    row = tables.compared_rows({"dense": {"accuracy": dense}, "pruned": {"accuracy": pruned}})[0]
    assert (row.change, row.good) == (change, good)


def test_size_rows_and_the_terminal_table() -> None:
    summary = {"dense": {"macs": 200, "latency_ms": 1.0}, "pruned": {"macs": 100, "latency_ms": 1.2}}
    rows = tables.compared_rows(summary)
    assert [(row.label, row.change, row.good) for row in rows] == [
        ("MACs", "−50.0%", True),
        ("Latency", "+20.0%", False),
    ]
    assert rows[0].share == 0.5 and tables.compared_rows({}) == []
    assert re.search(r"MACs +200 +100 +−50.0%", render(tables.comparison_table(summary)))


def test_chain_is_relative_to_the_output() -> None:
    found = {"scale": 100.0, "masked_removed": 1e-3, "removed_reloaded": 1.0, "reloaded_onnx": None}
    assert [link.holds for link in tables.chain({"verification": found})] == [True, False, None]
    assert tables.chain({}) == []


def test_phases_merge_and_repeated_epochs_count_once() -> None:
    lines = [{"epoch": epoch, "phase": phase} for epoch, phase in enumerate(["a", "a", "b", "a"])]
    assert phases_of(lines) == [Phase("a", 0, 1), Phase("b", 2, 2), Phase("a", 3, 3)]
    repeated = [{"model": "pruned", "epoch": epoch, "loss": loss} for epoch, loss in ((0, 1.0), (1, 2.0), (1, 3.0))]
    assert [line["loss"] for line in Run({}, repeated).lines_of("pruned")] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.93, 0.99, [0.94, 0.96, 0.98]), (3, 3, [3]), (0, 12, [0, 2.5, 5, 7.5, 10])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert svg.nice_ticks(low, high) == ticks


def test_ticks_of_decades() -> None:
    assert svg.decades(0.002, 30) == [0.01, 0.1, 1.0, 10.0]
    assert svg.decades(0.15, 0.9) == pytest.approx([0.2, 0.5])
    assert [svg.power_of_ten(value) for value in (1e-3, 1.0, 1e10, 0.2)] == ["10⁻³", "1", "10¹⁰", "0.2"]


def test_an_axis_of_accuracies_leaves_out_the_climb_and_no_fall() -> None:
    climb = svg.Series("a", [(0.0, 0.1), (1.0, 0.5), (2.0, 0.95), (3.0, 0.2), (4.0, 0.96)])
    limits, note = figures.without_climb([climb])
    assert limits is not None and limits[0] < 0.2 and limits[0] > 0.1 and "first epochs" in note
    assert figures.without_climb([svg.Series("b", [(0.0, 0.9), (1.0, 0.91)])])[1] == ""
    assert figures.without_climb([]) == (None, "")
    early = [0.1, 0.75, 0.88, 0.36, 0.6, 0.98]  # falls before it has come near its best
    limits, note = figures.without_climb([svg.Series("c", list(enumerate(early)))])
    assert limits is not None and 0.1 < limits[0] < 0.36 and "first epochs" in note
    ruined = [0.104, 0.094, 0.088, 0.156, 0.25, 0.488]  # climbs until the end: there is no first part to leave out
    limits, note = figures.without_climb([svg.Series("d", list(enumerate(ruined)))])
    assert limits is not None and limits[0] < 0.088 and not note


def test_the_change_of_latency_is_the_ratio_that_its_interval_is_of() -> None:
    sides = {"dense": {"latency_ms": 0.99}, "pruned": {"latency_ms": 0.6}}
    measured = {"ratio": 0.572, "interval": [0.56, 0.582]}
    (row,) = [one for one in tables.compared_rows({**sides, "latency": measured}) if one.label == "Latency"]
    assert (row.dense, row.pruned, row.change, row.share) == ("0.99 ms", "0.6 ms", "−42.8%", 0.572) and row.good
    (row,) = [one for one in tables.compared_rows(sides) if one.label == "Latency"]
    assert row.change == "−39.4%"


def test_each_histogram_has_an_axis_of_its_own_norms() -> None:
    edges = report_fixture.EDGES
    counts = [0] * 80
    counts[40:43] = [1, 5, 2]
    shown = figures.shown_bins([counts], edges)
    assert (shown.start, shown.stop) == (38, 45)
    counts[:] = [0] * 80
    counts[10] = 3
    shown = figures.shown_bins([counts], edges)
    assert shown.start < 10 < shown.stop and edges[shown.stop] / edges[shown.start] >= 5.1


def test_a_line_breaks_where_there_is_no_value() -> None:
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0), (3.0, 3.0)]
    drawn = svg.line_chart(svg.LineChart("t", [svg.Series("a", points)]))
    path = re.search(r'class="line s-kept" d="([^"]*)"', drawn)
    assert path and re.sub(r"[\d. ]", "", path[1]) == "MML" and drawn.count("<title>") == 3


def test_snapshots_keep_the_ends_of_phases() -> None:
    epochs = [{"epoch": number, "phase": report_fixture.phase_of(number)} for number in range(30)]
    chosen = figures.chosen_moments(epochs)
    assert len(chosen) == 8 and {0, 7, 17, 29} <= set(chosen)
    assert figures.chosen_moments(epochs[:1]) == [0] and figures.chosen_moments(epochs[:3]) == [0, 1, 2]


# --- coupled layers ---------------------------------------------------------------------------------------------


def test_lanes_do_not_overlap_and_are_shared() -> None:
    found = coupling.lanes({"a": [0, 5], "b": [1, 3], "c": [6, 9], "d": [4, 8], "alone": [2]})
    assert found == {"a": 0, "b": 1, "d": 1, "c": 0}


def test_the_picture_has_every_layer_and_a_lane_for_each_set_of_several() -> None:
    layers, _ = report_fixture.layers_and_groups()
    drawn = coupling.picture(layers)
    assert drawn.count('<text class="row name"') == len(layers) == 12
    assert drawn.count('class="lane') == 3 and drawn.count('class="knot r-') == 6
    assert drawn.count('class="knot alone"') == 6
    alone = coupling.picture([{"name": "a", "set": None, "dense_out": 8, "kept_out": 6}])
    assert "6 / 8" in alone and "knot" not in alone and coupling.picture([]) == ""


def test_a_resnet50_is_as_wide_as_a_small_network(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pruningawaretraining.cli.main import app

    path = tmp_path / "groups.svg"
    arguments = ["inspect", "resnet50", "--input-shape", "1,3,64,64", "--picture", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = path.read_text()
    tree = ElementTree.fromstring(text)
    assert tree.get("viewBox") == "0 0 430 930" and text.count('class="lane') == 4
    assert text.count('<text class="row name"') == 54
    assert len(set(re.findall(r'class="knot r-\d" cx="([\d.]+)"', text))) == 1, "one lane serves all stages"


def test_numbers_of_the_report_as_json_and_csv(tmp_path: Path) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    write_report(folder)
    found = json.loads((folder / "report.json").read_text())
    assert found["pruned"]["accuracy"] == 0.9861 and len(found["epochs"]) == 2 * report_fixture.EPOCHS
    assert [link["holds"] for link in found["verification"]] == [True, True, True]
    rows = list(csv.DictReader((folder / "layers.csv").open()))
    layers, groups = report_fixture.layers_and_groups()
    assert [(row["name"], int(row["kept_out"])) for row in rows] == [(one["name"], one["kept_out"]) for one in layers]
    coupled = {row["source"]: row["dependencies"] for row in csv.DictReader((folder / "groups.csv").open())}
    assert coupled == {one["source"]: " ".join(one["dependencies"]) for one in groups}
    epochs = list(csv.DictReader((folder / "epochs.csv").open()))
    assert len(epochs) == 2 * report_fixture.EPOCHS and float(epochs[-1]["macs"]) == found["epochs"][-1]["macs"]


def fine_run(folder: Path, **rule: Any) -> Path:
    """A run whose rule masks single weights, as a 2:4 rule leaves it."""
    found = report_fixture.summary()
    rules = [{"pattern": "2:4", "regularizer": None, "enabled": True, **rule}]
    layers = [{**one, "set": None, "kept_out": one["dense_out"]} for one in found["pruning"]["layers"]]
    groups = [{"number": 1, "source": "layer1.0.conv1.weight", "dependencies": [], "size": 576, "kept": 288}]
    pruning = {**found["pruning"], "layers": layers, "groups": groups, "sparsity": 0.5}
    pruning["parameters"] = {"dense": 272474, "kept": 140000, "fraction": 0.51}
    pruned = {**found["pruned"], "parameters": 272474}
    return report_fixture.write_run(folder, pruning=pruning, pruned=pruned, config={"pruning": {"rules": rules}})


def test_a_run_of_single_weights_is_not_told_in_channels(tmp_path: Path) -> None:
    page = Page(write_report(fine_run(tmp_path / "run")).read_text())
    said = " ".join(page.text.split())
    assert "50.0% of the prunable single weights are zero" in said
    for untrue in ("Channels", "channels", "coupled", "the regulariser separates", "what was masked is removed"):
        assert untrue not in said
    assert "no regulariser: nothing is pruned yet" in said and "what was masked stays zero" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    text = render(tables.comparison_table(summary))
    assert re.search(r"Sparsity +0.0% +50.0%", text)
    assert re.search(r"Nonzero parameters +272k +140k +−48.6%", text)
    assert "groups removed" not in said and "set to zero" in said


def test_a_run_of_channels_is_told_in_channels(tmp_path: Path) -> None:
    config = {"pruning": {"rules": [{"pattern": {"type": "channel"}, "regularizer": "growing_l2"}]}}
    _, page = write(tmp_path / "run", config=config)
    said = " ".join(page.text.split())
    assert (
        "33.7% of the prunable channels are gone" in said and "the regulariser pulls weak groups towards zero" in said
    )
    rules = [{"pattern": "channel", "regularizer": None}, {"pattern": "4x1", "regularizer": None}]
    _, page = write(tmp_path / "both", config={"pruning": {"rules": rules}})
    assert "of the prunable channels and blocks of weights are gone or zero" in " ".join(page.text.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "Sparsity" not in render(tables.comparison_table(summary))


def test_latency_that_was_predicted_and_measured(tmp_path: Path) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    event = {"rule": "channels", "at": 7, "predicted_ms": 0.55, "measured_ms": 0.5, "dense_ms": 1.0, "budget_ms": 0.6}
    summary["latency"]["events"] = [event]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report(folder).read_text()).text
    assert all(one in text for one in ("predicted, ms", "0.550", "0.500", "+10.0%", "50.0%"))


@pytest.mark.parametrize("is_noisy", [False, True])
def test_the_head_says_the_latency_with_its_interval(tmp_path: Path, is_noisy: bool) -> None:
    folder = report_fixture.write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    event = {"rule": "channels", "at": 7, "predicted_ms": 0.55, "measured_ms": 0.5, "dense_ms": 1.0, "budget_ms": 0.6}
    event |= {"low_ms": 0.488, "high_ms": 0.512, "spread": 0.37, "is_noisy": is_noisy}
    summary["latency"] |= {"events": [event], "interval": [0.571, 0.633]}
    (folder / "summary.json").write_text(json.dumps(summary))
    cards = Page(write_report(folder).read_text()).text.partition("Each epoch of the pruned model")[0]
    shown = render(tables.comparison_table(summary))
    for text in (cards, shown):
        text = " ".join(text.split())
        assert "0.571 to 0.633 of dense (95%)" in text and "Latency at the target" in text
        assert ("0.488 to 0.512 of dense (95%)" in text) is not is_noisy
        assert ("predicted: timing is too noisy here (spread 37%)" in text) is is_noisy
        assert ("0.55 ms" if is_noisy else "0.5 ms") in text
