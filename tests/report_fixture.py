"""A made-up run of a small residual network, in the files that a run writes."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

EPOCHS, EDGES = 30, [10 ** (-6 + number / 8) for number in range(81)]


def phase_of(epoch: int) -> str:
    return "regularize" if epoch < 8 else "prune" if epoch < 18 else "finetune"


def layers_and_groups() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three stages of two blocks each: the stem and the block ends of a stage are one set, inner layers their own."""
    chosen, layers, groups = random.Random(1), [], []
    for stage, width in enumerate((16, 32, 64)):
        trunk = chosen.randint(width // 2, width - 4)
        names = [f"layer{stage + 1}.{block}.conv2" for block in range(2)]
        groups.append((names[0], [names[1], f"layer{stage + 1}.0.bn2", f"layer{stage + 1}.1.bn2"], width, trunk))
        for block, end in enumerate(names):
            inner, kept = f"layer{stage + 1}.{block}.conv1", chosen.randint(3, width)
            groups.append((inner, [f"layer{stage + 1}.{block}.bn1"], width, kept))
            for name, of, ins, outs in (
                (inner, inner, (width, trunk), (width, kept)),
                (end, names[0], (width, kept), (width, trunk)),
            ):
                macs = [9 * ins[at] * outs[at] * (32 >> stage) ** 2 for at in (0, 1)]
                layers.append(
                    {
                        "name": name,
                        "type": "Conv2d",
                        "set": of,
                        "dense_in": ins[0],
                        "kept_in": ins[1],
                        "dense_out": outs[0],
                        "kept_out": outs[1],
                        "dense_macs": macs[0],
                        "kept_macs": macs[1],
                        "parameters": 9 * ins[1] * outs[1],
                    }
                )
    keys = ("source", "dependencies", "size", "kept")
    return layers, [{"number": number, **dict(zip(keys, row, strict=True))} for number, row in enumerate(groups)]


def metrics() -> list[dict[str, Any]]:
    noise, lines = random.Random(2), []
    for model in ("dense", "pruned"):
        for epoch in range(EPOCHS):
            pruned = model == "pruned"
            progress = min(max((epoch - 7) / 11, 0.0), 1.0) if pruned else 0.0
            dip = 0.02 * math.exp(-(((epoch - 16) / 3) ** 2)) if pruned else 0.0
            accuracy = 0.988 - 0.6 * math.exp(-epoch / 1.7) - dip + noise.uniform(-0.004, 0.004)
            lines.append(
                {
                    "model": model,
                    "epoch": epoch,
                    "phase": phase_of(epoch) if pruned else "train",
                    "loss": 2.2 * math.exp(-epoch / 3) + 0.01 + 2 * dip,
                    "train_accuracy": min(accuracy + 0.01, 1.0),
                    "accuracy": accuracy,
                    "lr": 0.05 * (1 + math.cos(math.pi * epoch / EPOCHS)),
                    "macs": 1 - 0.52 * progress,
                    "sparsity": 0.33 * progress,
                    "seconds": 1.7,
                }
            )
    return lines


def norms(groups: list[dict[str, Any]]) -> dict[str, Any]:
    chosen, epochs = random.Random(3), []
    for epoch in range(EPOCHS):
        gone = min(max((epoch - 7) / 11, 0.0), 1.0)
        sets = {}
        for group in groups:
            removed = group["size"] - group["kept"]
            zeros = round(gone * removed) if epoch < 18 else 0
            counts = [0] * (len(EDGES) - 1)
            for member in range(group["kept"] + (removed - zeros if epoch < 18 else 0)):
                low = member >= group["kept"]
                centre = -0.3 - (0.16 * epoch if low else 0.01 * epoch)
                counts[min(max(int((centre + chosen.gauss(0, 0.18) + 6) * 8), 0), 79)] += 1
            sets[group["source"]] = {"counts": counts, "zeros": zeros, "size": sum(counts) + zeros}
        epochs.append({"epoch": epoch, "phase": phase_of(epoch), "sets": sets})
    return {"edges": EDGES, "epochs": epochs}


def summary() -> dict[str, Any]:
    layers, groups = layers_and_groups()
    dense, kept = (sum(layer[key] for layer in layers) for key in ("dense_macs", "kept_macs"))
    one = {"p10": 0.4, "p90": 0.6, "runs": 200, "runtime": "onnxruntime", "threads": 1}
    return {
        "format": 1,
        "name": "demo",
        "version": "0.1.0",
        "date": "2025-01-31T12:00:00+00:00",
        "epochs": EPOCHS,
        "environment": {
            "python": "3.11.2",
            "torch": "2.8.0",
            "platform": "Linux x86_64",
            "device": "cpu",
            "threads": 2,
        },
        "config": {"model": "resnet20"},
        "seconds": 93.1,
        "target": {"macs": 0.5, "sparsity": None},
        "data": {"name": "digits", "classes": 10, "train": 1437, "test": 360, "shape": [1, 8, 8]},
        "dense": {
            "accuracy": 0.9889,
            "macs": dense,
            "parameters": 272474,
            "bytes": 1117000,
            "latency_ms": 0.815,
            "seconds": 44.0,
        },
        "pruned": {
            "accuracy": 0.9861,
            "macs": kept,
            "parameters": 121030,
            "bytes": 512300,
            "latency_ms": 0.467,
            "seconds": 47.0,
        },
        "pruning": {
            "phase": "done",
            "sparsity": 0.337,
            "macs": {"dense": dense, "kept": kept, "fraction": kept / dense},
            "parameters": {"dense": 272474, "kept": 121030, "fraction": 0.444},
            "layers": layers,
            "groups": groups,
        },
        "verification": {
            "scale": 17.2,
            "masked_removed": 3.8e-06,
            "removed_reloaded": 0.0,
            "reloaded_onnx": 5.7e-06,
            "onnx_accuracy": 0.9861,
        },
        "latency": {
            "runtime": "onnxruntime",
            "threads": 1,
            "batch": 1,
            "ratio": 0.573,
            "dense": {"median_ms": 0.815, **one, "p10": 0.79, "p90": 0.87},
            "pruned": {"median_ms": 0.467, **one},
        },
        "files": ["config.yaml", "metrics.jsonl", "norms.json", "model.onnx", "pruned.safetensors"],
    }


def write_run(folder: Path, **changes: Any) -> Path:
    """Write the run's files; ``changes`` replace keys of the summary, None removes one."""
    found = copy.deepcopy(summary())
    found.update(changes)
    found = {key: value for key, value in found.items() if value is not None or key not in changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(found))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    (folder / "norms.json").write_text(json.dumps(norms(layers_and_groups()[1])))
    (folder / "config.yaml").write_text(
        "name: demo\nmodel: {name: resnet20}\npruning:\n  rules:\n  - {pattern: channel}\n"
    )
    return folder
