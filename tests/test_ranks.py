"""Several processes decide and train as one does on the same global batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from ranks_worker import SCHEDULE, run, run_all

from pruningawaretraining.registry import names

PATTERNS: dict[str, dict[str, Any]] = {
    "channel": {"pattern": "channel", "target": {"sparsity": 0.4}},
    "slice": {"pattern": "slice", "target": {"sparsity": 0.4}},
    "2:4": {"pattern": "2:4", "target": {"sparsity": 0.5}, "exclude": ["0"]},
    "unstructured": {"pattern": "unstructured", "target": {"sparsity": 0.6}},
}
REGISTRY = {
    f"{criterion} {pattern}": {"rule": {**rule, **SCHEDULE, "criterion": criterion}}
    for criterion in names("criterion")
    for pattern, rule in PATTERNS.items()
    if criterion not in ("block_change", "reap", "bn_scale")  # of blocks, experts, and norms, which the network lacks
}
CAP = {"type": "cap", "num_grads": 64, "micro_batch": 1, "damp": 1e-2, "fisher_block_size": 16}
SAME: dict[str, dict[str, Any]] = {
    "channel": {
        "rule": {
            "regularizer": {"type": "growing_l2", "strength": 1e-3},
            **SCHEDULE,
            "target": {"macs": 0.5},
            "final_sparsity": 0.7,
        }
    },
    "channel, wrapper kept": {"rule": {**PATTERNS["channel"], **SCHEDULE}, "in_place": True},
    "channel, variance": {"rule": {**PATTERNS["channel"], **SCHEDULE, "criterion": "variance"}},
    "depth": {
        "rule": {"pattern": "depth", "criterion": "block_change", **SCHEDULE, "target": {"sparsity": 0.5}},
        "of": "blocks",
    },
    "expert": {
        "rule": {"pattern": "expert", "criterion": "reap", **SCHEDULE, "target": {"sparsity": 0.4}},
        "of": "experts",
    },
    "slice": {"rule": {**PATTERNS["slice"], **SCHEDULE, "criterion": "magnitude"}},
    "2:4": {"rule": {**PATTERNS["2:4"], **SCHEDULE, "criterion": "weight"}},
    "snip_momentum": {
        "rule": {
            **PATTERNS["unstructured"],
            "criterion": "snip_momentum",
            "unit": "step",
            "start": 2,
            "end": 6,
            "every": 2,
        }
    },
    "cap": {"rule": {**PATTERNS["unstructured"], **SCHEDULE, "criterion": CAP}, "calibrated": True},
    "cap on channels": {"rule": {**PATTERNS["channel"], **SCHEDULE, "criterion": CAP}, "calibrated": True},
    "straight through": {
        "rule": {
            **PATTERNS["unstructured"],
            **SCHEDULE,
            "criterion": "l1",
            "dynamic": {"type": "straight_through", "refresh": 2},
        }
    },
    "straight through, channels": {
        "rule": {**PATTERNS["channel"], **SCHEDULE, "dynamic": "straight_through"}
    },
    "regrow": {"rule": {**PATTERNS["unstructured"], "start": 0, "end": 3, "dynamic": "regrow"}},
    "regrow at random": {
        "rule": {**PATTERNS["unstructured"], "start": 0, "end": 3, "dynamic": {"type": "regrow", "by": "random"}}
    },
    "alternate": {"rule": {**PATTERNS["slice"], "start": 0, "end": 2, "dynamic": "alternate"}},
    "soft": {"rule": {**PATTERNS["2:4"], **SCHEDULE, "dynamic": {"type": "soft", "steps": 3}}},
    "rewind": {"rule": {**PATTERNS["unstructured"], **SCHEDULE, "dynamic": {"type": "rewind", "to": 1}}},
    "compensation": {
        "rule": {**PATTERNS["channel"], **SCHEDULE, "compensation": "least_squares"},
        "calibrated": True,
    },
    "family": {"rule": {"start": 0, "end": 3, "hold": 1, "target": {"macs": [0.8, 0.6]}}},
    "family of zeros": {
        "rule": {"pattern": "unstructured", "start": 0, "end": 3, "hold": 1, "target": {"sparsity": [0.3, 0.6]}}
    },
    "family of all structures": {
        "rule": {
            "pattern": ["channel", "depth"],
            "criterion": "taylor",
            "start": 0,
            "end": 3,
            "target": {"macs": [0.8, 0.6]},
        },
        "of": "blocks",
    },
    "proximal": {"proximal": {"group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso", "reg_lambda": 1.5}},
}  # fmt: skip


def check_same(alone: dict[str, Any], ranks: list[dict[str, Any]], tolerance: float) -> None:
    assert all(one.keys() == alone.keys() for one in ranks)
    if "refused" in alone:
        assert all(one == alone for one in ranks)
        return
    for one in ranks:
        assert one["phase"] == alone["phase"]
        for name, keep in alone["masks"].items():
            assert torch.equal(keep, one["masks"][name]), f"masks of {name}"
        for name, value in alone["model"].items():
            assert torch.equal(one["model"][name], ranks[0]["model"][name]), f"{name}: bit by bit on all processes"
            torch.testing.assert_close(one["model"][name], value, rtol=0, atol=tolerance)
    assert any(not bool(keep.all()) for keep in alone["masks"].values())


def differing(cases: dict[str, Any], ranks: list[dict[str, Any]], tolerance: float) -> dict[str, str]:
    """The cases whose processes do not end as one alone, with what differs; in one test, so that one launch serves."""
    found = {}
    for name, case in cases.items():
        try:
            check_same(run(case), [one[name] for one in ranks], tolerance)
        except AssertionError as error:
            found[name] = str(error)
    return found


def test_every_criterion_decides_on_two_processes_as_on_one(tmp_path):
    ranks = on_ranks(2, tmp_path, run_all, REGISTRY)
    assert differing(REGISTRY, ranks, 1e-4) == {}
    refused = {name: one["refused"] for name, one in ranks[0].items() if "refused" in one}
    assert all("channel" in text or "slice" in text for text in refused.values()), refused
    assert len(refused) < len(REGISTRY) / 4


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_end_as_one(tmp_path, count):
    assert differing(SAME, on_ranks(count, tmp_path, run_all, SAME), 1e-6) == {}
