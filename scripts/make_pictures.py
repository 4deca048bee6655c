"""Makes the pictures of reports in docs/images anew, with headless Chromium.

pat demo
pat analyze runs/demo
pat sweep CONFIG --reg 3e-3 2e-3 2e-4, where CONFIG is configs/demo.yaml with `alpha: 8` in its regulariser
pat sensitivity demo --weights runs/demo/dense.safetensors --out runs/demo/sensitivity.json
python scripts/make_pictures.py runs/demo runs/demo-sweep
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import resnet50

from pruningawaretraining import Pruning
from pruningawaretraining.report.coupling import picture
from pruningawaretraining.report.svg import standalone

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = 192
"""Of a picture: as many as the pages have, so that it is about half as large."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Shot:
    """A picture of the top of a page.

    Attributes:
        page: the HTML file.
        width, height: of the window in pixels.
        dark: with the dark colours.
    """

    page: Path
    width: int
    height: int
    dark: bool = False


def shots(run: Path, sweep: Path) -> dict[str, Shot]:
    """Name of each picture in docs/images -> what it shows."""
    report = run / "report.html"
    return {
        "report.png": Shot(report, 1080, 1500),
        "report-dark.png": Shot(report, 1080, 1000, dark=True),
        "analyze.png": Shot(run / "analysis.html", 1080, 1440),
        "sweep-demo.png": Shot(sweep / "sweep.html", 1080, 1880),
        "sensitivity.png": Shot(run / "sensitivity.html", 880, 690),
    }


def take(shot: Shot, path: Path) -> None:
    """Take one picture.

    Raises:
        FileNotFoundError: no page, or no Chromium.
    """
    if not shot.page.is_file():
        raise FileNotFoundError(f"there is no {str(shot.page)!r}: run the commands that this script names at its top")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"no browser is installed. Allowed: one of {', '.join(BROWSERS)}")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=3000", f"--window-size={shot.width},{shot.height}", f"--screenshot={path}"]
    command += ["--blink-settings=preferredColorScheme=0"] if shot.dark else []
    subprocess.run([*command, shot.page.resolve().as_uri()], check=True, capture_output=True, timeout=300)
    with Image.open(path) as taken:
        few = taken.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def coupling() -> str:
    """The layers of a ResNet-50 with random weights, half of whose MACs are gone, as SVG."""
    torch.manual_seed(0)
    rule = {"criterion": "magnitude", "target": {"macs": 0.5}}
    pruner = Pruning(resnet50(), {"rules": [rule]}, example_inputs=torch.zeros(1, 3, 64, 64))
    pruner.prune()
    return standalone(picture(pruner.report().layers))


def main() -> int:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the demo's run")
    parser.add_argument("sweep", type=Path, help="folder of its sweep")
    given = parser.parse_args()
    for name, shot in shots(given.run, given.sweep).items():
        take(shot, IMAGES / name)
        print(f"wrote {IMAGES / name}")
    (IMAGES / "coupling.svg").write_text(coupling(), encoding="utf-8")
    print(f"wrote {IMAGES / 'coupling.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
