"""Every architecture: groups, time to find them, the MAC target, and whether all checks hold after removal.

Each architecture runs in a process of its own with a time limit. It is built without weights, small where its config
allows, masked and removed to half of its MACs by magnitude, channels and attention heads together, and then checked:
the outputs of the masked and the removed model, analytic against counted MACs, one training step, save and load. An
architecture passes when all of them hold; else the one line says why not. Before all that every parameter is given
values at which its branch counts. The difference in onnxruntime, or why there was no export, stands beside it.

Seconds are CPU time of one thread. *To find groups*: one forward pass that is followed, and the groups of all channels
and heads. *To build*: all of `Pruning(...)`, which also tries the removal before training starts: without one group of
each set, then without about half, where the outputs of the removed and the masked model are compared in float64. Its
forward passes and one float64 copy of the weights are the larger part for large models. *Floor*: the smallest fraction
of the MACs that can be reached, one group left of every set.

    pip install timm transformers     # optional: their architectures are left out without them
    python benchmarks/zoo.py [--only NAME ...] [--limit 300] [--onnx torchscript] [--part FILE] [--docs-only]

With --part, rows are kept in that file, and a run that was interrupted goes on with those that are not there; results
and page are written when all are.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown, save
from torch import Tensor, nn
from zoo_kinds import KINDS, build_kind
from zoo_models import SIZES, build

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import PruningError
from pruningawaretraining.models.calling import call, outputs_of
from pruningawaretraining.models.probes import perturbed
from pruningawaretraining.models.trees import float_tensors_of
from pruningawaretraining.patterns.channel import Channel

DOCS = Path(__file__).parent.parent / "docs" / "supported-models.md"
TARGET = 0.5
ALIKE = 1e-4
"""Largest difference of outputs, as a fraction of the largest output."""


def check(name: str, exporter: str) -> dict[str, Any]:
    """One row of the table; raises what goes wrong."""
    model, inputs, forward_fn = build(name)
    let_all_count(model)
    dense = count_macs(model, inputs, forward_fn)
    begun = time.process_time()
    Channel(heads=True).build(model, inputs, forward_fn=forward_fn)
    found = time.process_time()
    config = {
        "rules": [
            {
                "pattern": {"type": "channel", "heads": True},
                "target": {"macs": TARGET},
                "start": 0,
                "final_sparsity": 0.9,
            }
        ]
    }
    pruner = Pruning(model, config, forward_fn, example_inputs=inputs)
    engine = pruner.channel_pruner
    row: dict[str, Any] = {
        "architecture": name,
        "library": SIZES[name][0],
        "sets": len(engine.dense_sets),
        "groups": len(engine.keep_D),
        "seconds to find groups": round(found - begun, 2),
        "seconds to build": round(time.process_time() - found, 2),
        "floor": floor_of(engine),
    }
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, inputs, forward_fn))
    pruner.prune(model, 0)
    row["MACs kept"] = round(count_macs(model, inputs, forward_fn) / dense, 4)
    difference, told = _difference(seen["masked"], outputs_of(model, inputs, forward_fn))
    row["masked - removed"] = f"{difference:.1e}"
    problems = [] if difference <= ALIKE else ["masked and removed differ"]
    if not told:
        problems.append("the outputs are constant: the comparison tells nothing")
    if not row["MACs kept"] <= TARGET + 5e-5:
        problems.append(f"{row['MACs kept']} of the MACs are kept")
    if pruner.macs.kept != count_macs(model, inputs, forward_fn):
        problems.append("analytic and counted MACs differ")
    problems += _reloaded(name, model, inputs, forward_fn)
    row["ONNX"] = _exported(model, inputs, exporter) if forward_fn is None else "not tried"
    problems += _trained(model, inputs, forward_fn)
    row["result"] = "; ".join(problems) or "pass"
    return row


def floor_of(channels: Any) -> float:
    """The fraction of the MACs that is left when one group of every set stays."""
    grouping, cost = channels.found.grouping, channels.macs_cost
    keep_G = torch.zeros(grouping.size, dtype=torch.bool)
    keep_G[[one.start for one in grouping.sets]] = True
    return round(float(cost(keep_G) / cost.dense), 4)


def let_all_count(model: nn.Module) -> None:
    """Give parameters that start constant or tiny random values, so that no branch is 0 when outputs are compared."""
    with perturbed(model):
        weights = [one.detach().clone() for one in model.parameters()]
    with torch.no_grad():
        for one, values in zip(model.parameters(), weights, strict=True):
            one.copy_(values)


def _difference(masked: list[Tensor], removed: list[Tensor]) -> tuple[float, bool]:
    """Largest difference of masked and removed outputs, as a fraction of the largest, and whether any output
    varies."""
    told = any(bool((one != one.flatten()[:1]).any()) for one in masked if one.numel())
    pairs = zip(masked, removed, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs), told


def _trained(model: nn.Module, inputs: Any, forward_fn: Any) -> list[str]:
    """One training step on a batch of two."""
    batch = torch.cat([inputs, inputs]) if isinstance(inputs, Tensor) else inputs
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    found = call(model, batch, forward_fn)
    sum(tensor.float().square().mean() for tensor in float_tensors_of(found)).backward()
    optimizer.step()
    model.eval()
    return [] if all(bool(torch.isfinite(one).all()) for one in model.parameters()) else ["a step gives NaN"]


def _reloaded(name: str, model: nn.Module, inputs: Any, forward_fn: Any) -> list[str]:
    """Save, load into a fresh dense model, compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.safetensors"
        save_pruned(model, path)
        again = load_pruned(build(name)[0], path)
    pairs = zip(outputs_of(model, inputs, forward_fn), outputs_of(again, inputs, forward_fn), strict=True)
    same = all(bool(torch.equal(a, b)) for a, b in pairs)
    return [] if same else ["the reloaded model differs"]


def _exported(model: nn.Module, inputs: Any, exporter: str) -> str:
    """The ONNX model's difference, as a fraction of the output, or why there is none with either exporter."""
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        for one in dict.fromkeys((exporter, "dynamo")):
            try:
                result = export_onnx(model, inputs, Path(folder) / "m.onnx", exporter=one, dynamic_batch=False)
            except PruningError as error:
                problem = problem or f"no: {str(error)[:120]}"
            else:
                return f"{result.relative_diff:.1e}"
    return problem


def _sent(name: str, exporter: str, out: Connection) -> None:
    """A row, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = check(name, exporter)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row = {"architecture": name, "library": SIZES[name][0], "result": text}
    out.send(row)


def isolated(name: str, limit: float, exporter: str, processes: Any) -> dict[str, Any]:
    """A row, computed in a process that has imported the libraries and nothing else."""
    row = {"architecture": name, "library": SIZES[name][0]}
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=_sent, args=(name, exporter, there))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv() if here.poll(limit) else {**row, "result": f"longer than {limit:g} s"}
    except EOFError:
        process.join()
        found = {**row, "result": f"exit status {process.exitcode}"}
    process.kill()
    process.join()
    return found


KINDS_HEAD = """## Kinds of networks

What has to be followed exactly, on small networks of `benchmarks/zoo_kinds.py`, by `python benchmarks/zoo.py --kinds`.
Floor: the smallest fraction of the MACs, one group left of every set. The outputs of the masked and the removed model
are compared at half of the groups, at weights at which every branch counts.
"""


def check_kind(name: str) -> dict[str, Any]:
    """One row of the table of kinds."""
    model, inputs = build_kind(name)
    with perturbed(model):
        model = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    begun = time.process_time()
    config = {"rules": [{"target": {"sparsity": 0.5}, "start": 0, "end": 0}]}
    pruner = Pruning(model, config, example_inputs=inputs)
    seconds = time.process_time() - begun
    channels = pruner.channel_pruner
    grouping, floor = channels.found.grouping, floor_of(channels)
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, inputs))
    pruner.prune(model, 0)
    pairs = list(zip(seen["masked"], outputs_of(model, inputs), strict=True))
    kept = count_macs(model, inputs)
    assert pruner.macs.kept == kept < count_macs(twin, inputs)
    return {
        "kind": name,
        "sets": len(grouping.sets),
        "groups": grouping.size,
        "seconds to build": round(seconds, 2),
        "floor": floor,
        "masked - removed": f"{max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs):.1e}",
    }


def write_kinds() -> None:
    """The second half of docs/supported-models.md."""
    text = DOCS.read_text(encoding="utf-8").partition(KINDS_HEAD.splitlines()[0])[0].rstrip()
    rows = [check_kind(name) for name in KINDS]
    DOCS.write_text(f"{text}\n\n{KINDS_HEAD}\n{markdown(rows)}\n", encoding="utf-8")


def write_docs(rows: list[dict[str, Any]]) -> None:
    """The first half of docs/supported-models.md."""
    kinds = "".join(DOCS.read_text(encoding="utf-8").partition(KINDS_HEAD.splitlines()[0])[1:])
    passed = sum(row["result"] == "pass" for row in rows)
    text = (__doc__ or "").partition("\n\n")[2].partition("\n\n    pip")[0]
    head = f"# Supported models\n\nWritten by `python benchmarks/zoo.py`. {passed} of {len(rows)} pass.\n\n{text}\n\n"
    DOCS.write_text(head + markdown(rows) + "\n" + ("\n" + kinds if kinds else ""), encoding="utf-8")


def run(names: list[str], part: Path, limit: float, exporter: str) -> dict[str, dict[str, Any]]:
    """Rows of these architectures, those that are in a file already from there; each is written there at once."""
    rows: dict[str, dict[str, Any]] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["zoo_imports"])
    for name in names:
        if name not in rows:
            rows[name] = isolated(name, limit, exporter, processes)
            print(name, rows[name]["result"], flush=True)
            part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("--onnx", default="torchscript")
    parser.add_argument("--part", type=Path, default=None)
    parser.add_argument("--docs-only", action="store_true")
    parser.add_argument("--kinds", action="store_true", help="the table of kinds of networks alone")
    arguments = parser.parse_args()
    if arguments.kinds:
        warnings.simplefilter("ignore")
        write_kinds()
        return
    path = RESULTS / "zoo.json"
    known = {row["architecture"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    if not arguments.docs_only:
        with tempfile.TemporaryDirectory() as folder:
            part = arguments.part or Path(folder) / "rows.json"
            known |= run(arguments.only or list(SIZES), part, arguments.limit, arguments.onnx)
    rows = [known[one] for one in SIZES if one in known]
    save("zoo", rows, "Architectures", "See docs/supported-models.md.", "python benchmarks/zoo.py")
    write_docs(rows)


if __name__ == "__main__":
    main()
