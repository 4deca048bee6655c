"""Interrupted equals uninterrupted, for real: ``pat run --resume`` is killed with SIGKILL until it is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from experiment_fixture import tiny
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
KILLS = 50
RULE = {
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 3, "end": 10, "target": {"macs": 0.5}, "final_sparsity": 0.5,
}  # fmt: skip


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Every tensor of a file, bit by bit, and its description."""
    with safe_open(str(path), framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}, file.metadata()  # noqa: SIM118


def rows(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in ("pruned.safetensors", "dense.safetensors"):
        tensors, description = contents(folder / name)
        expected, expected_description = contents(whole / name)
        assert tensors == expected, (folder.name, name)
        assert description == expected_description
    assert rows(folder) == rows(whole)
    assert (folder / "norms.json").read_text() == (whole / "norms.json").read_text()
    results = [json.loads((one / "summary.json").read_text()) for one in (folder, whole)]
    assert results[0]["pruning"] == results[1]["pruning"]
    assert not list(folder.glob(".*.tmp")), "a file that was half written is left behind"


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_like_one_that_is_not(tmp_path: Path) -> None:
    config = tiny(
        epochs=12, scheduler={"name": "CosineAnnealingLR"}, pruning={"rules": [RULE]}, data={"train_fraction": 1.0}
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    driver = [sys.executable, str(ROOT / "tests" / "kill_driver.py"), str(tmp_path / "tiny.yaml"), str(tmp_path)]
    done = subprocess.run(
        [*driver, str(KILLS), "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for name, (status, _) in result["precise"].items():
        assert status == -9, f"{name}: not reached"
    kills = [moment for chain in result["random"] for moment in chain]
    counts = {moment: kills.count(moment) for moment in sorted(set(kills))}
    print(f"\n{len(kills)} random kills: {counts}; {len(result['precise'])} precise ones: {result['precise']}")
    assert len(kills) >= KILLS
    if "RELIABILITY_COUNTS" in os.environ:
        found = {"name": "kills", "random": counts, "precise": len(result["precise"])}
        (Path(os.environ["RELIABILITY_COUNTS"]) / "kills.json").write_text(json.dumps(found))
    assert {"dense", "regularize", "prune", "finetune"} <= set(kills)
    phases = {row["phase"] for row in rows(tmp_path / "whole")}
    assert phases == {"train", "regularize", "prune", "finetune"}
    killed = [folder for folder in sorted(tmp_path.iterdir()) if folder.is_dir() and folder.name != "whole"]
    assert len(killed) == len(result["random"]) + len(result["precise"])
    for folder in killed:
        assert_same_run(folder, tmp_path / "whole")
