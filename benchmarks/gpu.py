"""What pruning costs on a GPU: steps, events, proximal steps, second order, 2:4 products, latency; with the goals.

    python benchmarks/gpu.py [--only steps events ...]      # on a GPU, under four minutes; writes its table
    python benchmarks/gpu.py --device cpu --tiny            # a dry run of the same code; its figures mean nothing

A part that fails is a row that says so, and the others are measured all the same; Torch-Pruning and torchao beside,
where they are installed. Only whole runs on a GPU are saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, markdown, save
from gpu_models import latency, second_order, semi_structured
from gpu_setting import Setting, row
from gpu_steps import events, proximal_steps, training_steps

log = logging.getLogger("benchmarks.gpu")

NOTE = (
    "Ratios are of medians in turns; parts of a step are timed between two events of the GPU. PyTorch's defaults "
    "otherwise, TF32 for convolutions among them."
)


PARTS: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
    "steps": training_steps,
    "events": events,
    "proximal": proximal_steps,
    "second_order": second_order,
    "semi_structured": semi_structured,
    "latency": latency,
}


def measured(names: list[str], setting: Setting) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all parts, and the names of those that failed."""
    rows: list[dict[str, Any]] = []
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            found = PARTS[name](setting)
        except Exception as error:  # noqa: BLE001  (one part's failure is a result; the others are measured)
            log.exception("%s failed", name)
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            found = [{**row(name, 0.0, ""), "found": "failed", "beside": f"{type(error).__name__}: {reason}"}]
            failed.append(name)
        rows += found
        print(markdown(found), f"\n{name}: {time.perf_counter() - start:.1f} s\n", flush=True)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, failed


def main() -> int:
    """Measure, print, and save what is worth keeping; 2 without a GPU, 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to try the code; nothing is saved in results/"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here. Allowed: --device cpu --tiny for a dry run", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    start = time.perf_counter()
    rows, failed = measured(options.only, Setting(device, options.tiny))
    spent = f"All of it took {time.perf_counter() - start:.0f} s."
    if device.type == "cuda" and not options.tiny and len(options.only) == len(PARTS):
        title = f"On a GPU ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"
        print("saved", save("gpu", rows, title, f"{NOTE} {spent}"))
    else:
        path = Path(tempfile.mkdtemp()) / "gpu.json"
        path.write_text(json.dumps({"name": "gpu", **environment(), "rows": rows}, indent=1))
        print(f"not a whole run on a GPU, so kept apart: {path}. {spent}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
