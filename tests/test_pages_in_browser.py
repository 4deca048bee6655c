"""The pages in headless Chromium: every picture there, no script error, readable on a phone and in the dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import report_fixture

from pruningawaretraining.analysis import sensitivity
from pruningawaretraining.analysis.compare import write_comparison
from pruningawaretraining.analysis.sources import load_sources
from pruningawaretraining.report.html import write_report

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")

PROBE = """
<script>
window.failures = [];
window.onerror = message => window.failures.push(message);
window.addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const broken = [...document.images].filter(one => !one.complete || !one.naturalWidth).length;
  const drawn = [...document.querySelectorAll("svg[role=img]")];
  const empty = drawn.filter(one => one.getBoundingClientRect().height < 20).length;
  const shown = [...document.querySelectorAll("svg[role=img] text")].map(one => one.getBoundingClientRect());
  const boxes = [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth);
  const found = {
    broken, pictures: drawn.length, empty, failures: window.failures,
    loaded: performance.getEntriesByType("resource").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    smallest: Math.min(...shown.filter(box => box.height).map(box => box.height), 99),
    cut: boxes.length,
    hinted: boxes.filter(one => getComputedStyle(one).backgroundAttachment.includes("local")).length,
    dark: getComputedStyle(document.body).backgroundColor,
  };
  document.title = "PROBED " + JSON.stringify(found);
});
</script>
"""


def run(*options: str, url: Path) -> str:
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=3000", "--enable-logging=stderr", *options, url.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert errors == []
    return done.stdout


def probed(page: Path, width: int, *options: str) -> dict[str, object]:
    """What a browser window of this width finds in the page."""
    probe = page.with_name(f"probe-{page.name}")
    frame = page.with_name(f"frame-{page.name}")
    probe.write_text(page.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>"), encoding="utf-8")
    inner = f'<iframe src="{probe.name}" style="width:{width}px;height:900px;border:0"></iframe>'
    script = (
        "<script>onload=()=>document.body.dataset.found=document.querySelector('iframe').contentDocument.title</script>"
    )
    frame.write_text(f"<!doctype html><body>{inner}{script}</body>", encoding="utf-8")
    flags = ["--allow-file-access-from-files", "--window-size=1200,1000", "--dump-dom", *options]
    text = run(*flags, url=frame)
    match = re.search(r'data-found="PROBED ({.*?})"', text)
    assert match, text[:500]
    import html

    found: dict[str, object] = json.loads(html.unescape(match[1]))
    return found


def colours(png: Path) -> set[bytes]:
    """The distinct first pixels of the rows, and whether anything is drawn: a plain decoder of 8-bit PNG."""
    data, at, packed, width = png.read_bytes(), 8, b"", 0
    channels = 3
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, channels = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, stride = zlib.decompress(packed), width * channels + 1
    return {raw[row : row + stride] for row in range(0, len(raw), stride)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    report = write_report(report_fixture.write_run(folder / "run"))
    report_fixture.write_run(folder / "other")
    runs = load_sources([folder / "run", folder / "other"], page=folder / "compare.html")
    comparison = write_comparison(runs, folder / "compare.html", "two runs")[0]
    rows = [{"sparsity": level, "kept": 8 - int(8 * level), "accuracy": 0.9 - level / 5} for level in (0.25, 0.5)]
    found = {
        "format": 1,
        "name": "tiny",
        "accuracy": 0.9,
        "images": 100,
        "tolerance": 0.06,
        "sets": {"layer1.0.conv1": {"groups": 8, "rows": rows, "max_sparsity": 0.25}},
    }
    table = sensitivity.write_sensitivity(found, folder / "sensitivity.json")[1]
    timed = report_fixture.write_run(folder / "timed")
    summary = json.loads((timed / "summary.json").read_text())
    event = {"at": 17, "predicted_ms": 0.555, "measured_ms": 0.512, "dense_ms": 1.003}
    summary["latency"]["events"] = [event] * 2
    (timed / "summary.json").write_text(json.dumps(summary))
    return {"report": report, "compare": comparison, "sensitivity": table, "latency": write_report(timed)}


@pytest.mark.parametrize(
    ("name", "pictures"), [("report", 16), ("compare", 3 + 20), ("sensitivity", 0), ("latency", 16)]
)
@pytest.mark.parametrize("width", [360, 375, 1100])
def test_pages_are_whole_and_fit(pages: dict[str, Path], name: str, pictures: int, width: int) -> None:
    found = probed(pages[name], width)
    assert found["broken"] == found["empty"] == found["loaded"] == 0 and found["failures"] == []
    assert found["pictures"] == pictures
    assert found["overflow"] == 0, "the page is wider than the window"
    assert float(str(found["smallest"])) >= 8, "text in a picture is too small to read"


def test_a_table_that_is_cut_off_says_so(pages: dict[str, Path]) -> None:
    """A wide table scrolls in its own box, under a hint that is there only as long as something is cut off."""
    narrow, wide = probed(pages["report"], 375), probed(pages["report"], 1100)
    assert int(str(narrow["cut"])) > 0 and narrow["hinted"] == narrow["cut"]
    assert wide["cut"] == wide["hinted"] == 0


def test_the_table_of_runs_is_not_cut_off_on_a_phone(pages: dict[str, Path]) -> None:
    assert probed(pages["compare"], 375)["cut"] == 0


def test_pages_follow_the_dark(pages: dict[str, Path]) -> None:
    dark = probed(pages["report"], 400, "--blink-settings=preferredColorScheme=0")
    light = probed(pages["report"], 400, "--blink-settings=preferredColorScheme=1")
    assert (dark["dark"], light["dark"]) == ("rgb(20, 23, 26)", "rgb(252, 252, 250)")


@pytest.mark.parametrize("name", ["report", "compare", "sensitivity"])
def test_screenshots_show_something(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    run(f"--screenshot={picture}", "--window-size=1100,1200", url=pages[name])
    assert len(colours(picture)) > 40, "hardly any two rows of pixels differ"
    keep = os.environ.get("PAT_SCREENSHOTS")
    if keep:
        shutil.copy(picture, Path(keep) / f"{name}.png")
