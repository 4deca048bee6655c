"""Schedules against literal tables, and what holds for every one that is registered."""

from __future__ import annotations

import pytest

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.registry import names
from pruningawaretraining.schedules import sparsity_at

PROGRESS = [0.0, 0.25, 0.5, 0.75, 1.0]

FROM_0_TO_80_PERCENT = {
    "one_shot": [0.8, 0.8, 0.8, 0.8, 0.8],
    "linear": [0.0, 0.2, 0.4, 0.6, 0.8],
    "cosine": [0.0, 0.0608964, 0.2343146, 0.4938533, 0.8],
    "exponential": [0.0, 0.3312597, 0.5527864, 0.7009302, 0.8],
    "cube": [0.0, 0.0125, 0.1, 0.3375, 0.8],
    "cubic": [0.0, 0.4625, 0.7, 0.7875, 0.8],
    "inverse_cubic": [0.0, 0.0731518, 0.1650396, 0.2960316, 0.8],
}

FROM_20_TO_60_PERCENT = {
    "one_shot": [0.6, 0.6, 0.6, 0.6, 0.6],
    "linear": [0.2, 0.3, 0.4, 0.5, 0.6],
    "cosine": [0.2, 0.2304482, 0.3171573, 0.4469266, 0.6],
    "exponential": [0.2, 0.3272829, 0.4343146, 0.5243172, 0.6],
    "cube": [0.2, 0.20625, 0.25, 0.36875, 0.6],
    "cubic": [0.2, 0.43125, 0.55, 0.59375, 0.6],
    "inverse_cubic": [0.2, 0.2365759, 0.2825198, 0.3480158, 0.6],
}


def test_every_schedule_has_a_table() -> None:
    assert sorted(FROM_0_TO_80_PERCENT) == sorted(FROM_20_TO_60_PERCENT) == names("schedule")


@pytest.mark.parametrize("name", sorted(FROM_0_TO_80_PERCENT))
def test_values(name: str) -> None:
    assert [sparsity_at(name, t, 0.0, 0.8) for t in PROGRESS] == pytest.approx(FROM_0_TO_80_PERCENT[name], abs=1e-6)
    assert [sparsity_at(name, t, 0.2, 0.6) for t in PROGRESS] == pytest.approx(FROM_20_TO_60_PERCENT[name], abs=1e-6)


def test_cube_and_cubic_are_not_the_same() -> None:
    assert sparsity_at("cube", 0.5, final=0.8) == pytest.approx(0.10, abs=1e-12)
    assert sparsity_at("cubic", 0.5, final=0.8) == pytest.approx(0.70, abs=1e-12)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("exp", "exponential"), ("geometric", "exponential"), ("cos", "cosine"), ("oneshot", "one_shot")],
)
def test_aliases(alias: str, name: str) -> None:
    assert [sparsity_at(alias, t, 0.1, 0.7) for t in PROGRESS] == [sparsity_at(name, t, 0.1, 0.7) for t in PROGRESS]


@pytest.mark.parametrize("name", names("schedule"))
@pytest.mark.parametrize(
    ("start", "final"), [(0.0, 0.8), (0.2, 0.6), (0.0, 1.0), (0.3, 0.3), (0.0, 0.1 + 0.2), (1.0, 1.0)]
)
def test_every_schedule(name: str, start: float, final: float) -> None:
    values = [sparsity_at(name, step / 200, start, final) for step in range(201)]
    assert values[0] == (final if name == "one_shot" else start)
    assert values[-1] == final, "exactly, not nearly"
    assert values == sorted(values), "never falls"
    assert all(start <= value <= final for value in values)
    assert sparsity_at(name, 1.7, start, final) == final
    assert sparsity_at(name, -0.3, start, final) == values[0]


def test_unknown_schedule() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        sparsity_at("cosin", 0.5)


@pytest.mark.parametrize(("start", "final"), [(0.5, 0.4), (-0.1, 0.4), (0.0, 1.1)])
def test_range(start: float, final: float) -> None:
    with pytest.raises(ValueError, match="need 0 <= start <= final <= 1"):
        sparsity_at("linear", 0.5, start, final)
