"""The registry: names, aliases, and building from a name or a mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pruningawaretraining import registry
from pruningawaretraining.errors import ConfigError


@dataclass(frozen=True)
class Round:
    radius: float = 1.0
    turns: int = 1
    label: str = ""

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius: {self.radius} is below 0")


@dataclass(frozen=True)
class Square:
    side: float


def flat() -> str:
    return "flat"


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own, with three shapes."""
    monkeypatch.setattr(registry, "_ENTRIES", {})
    monkeypatch.setattr(registry, "_ALIASES", {})
    monkeypatch.setattr(registry, "KINDS", ("shape",))
    registry.register("shape", "round", "circle", "disc")(Round)
    registry.register("shape", "square")(Square)
    registry.register("shape", "flat")(flat)


def test_register_gives_back_what_it_was_given() -> None:
    assert registry.register("shape", "round")(Round) is Round


def test_names_are_sorted_and_without_aliases() -> None:
    assert registry.names("shape") == ["flat", "round", "square"]
    assert registry.names("colour") == []


@pytest.mark.parametrize("name", ["round", "Round", "ROUND", "circle", "Circle", "disc"])
def test_canonical_takes_aliases_and_any_case(name: str) -> None:
    assert registry.canonical("shape", name) == "round"
    assert registry.lookup("shape", name) is Round


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'round' is already registered"):
        registry.register("shape", "round")(Square)
    for name in ("circle", "oblong"):  # an alias of another, and a free name whose alias is taken
        with pytest.raises(ConfigError, match="Allowed: another name"):
            registry.register("shape", name, "square")(Square)
    assert registry.names("shape") == ["flat", "round", "square"]


@pytest.mark.parametrize("kind, name, entry, said", [
    ("shaep", "oblong", Square, "register: 'shaep' is not known; did you mean 'shape'?"),
    ("shape", None, Square, "shape: None is not a name."),
    ("shape", "", Square, "shape: '' is not a name."),
    ("shape", flat, Square, "is not a name. Allowed: @register('shape', 'some_name')"),
    ("shape", "oblong", 5, "shape: 'oblong' is registered for 5. Allowed: a dataclass or a function"),
])  # fmt: skip
def test_what_cannot_be_looked_up_is_not_registered(kind: str, name: Any, entry: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        registry.register(kind, name)(entry)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_cell_of_a_notebook_may_run_again() -> None:
    def cell() -> type:
        made = type("Mine", (), {"__module__": "__main__", "__qualname__": "Mine"})
        return registry.register("shape", "mine", "ours")(made)

    first, second = cell(), cell()
    assert first is not second and registry.lookup("shape", "ours") is second


@pytest.mark.parametrize(
    ("spec", "built"),
    [
        ("round", Round()),
        ("disc", Round()),
        ({"type": "round"}, Round()),
        ({"type": "Circle", "radius": 2, "label": "a"}, Round(2, 1, "a")),
        ({"type": "square", "side": 3.0}, Square(3.0)),
        (Square(4.0), Square(4.0)),
        ("flat", flat),
        ({"type": "flat"}, flat),
    ],
)
def test_build(spec: object, built: object) -> None:
    assert registry.build("shape", spec) == built


def test_build_leaves_the_mapping_alone() -> None:
    spec = {"type": "round", "radius": 2.0}
    registry.build("shape", spec)
    assert spec == {"type": "round", "radius": 2.0}


@pytest.mark.parametrize(
    ("spec", "fragments"),
    [
        ("rond", ["key.type: 'rond' is not known", "did you mean 'round'?", "square"]),
        ({"radius": 1.0}, ["key: ", "has no 'type'", "flat, round, square"]),
        ({"type": "round", "radios": 1.0}, ["key.radios: 'radios' is not known", "did you mean 'radius'?"]),
        ({"type": "round", "radius": "big"}, ["key.radius: 'big' is not a number"]),
        ({"type": "round", "turns": True}, ["key.turns: True is not a number"]),
        ({"type": "round", "radius": -1.0}, ["key: radius: -1.0 is below 0"]),
        ({"type": "square"}, ["key: ", "side"]),
        ({"type": "flat", "side": 1.0}, ["key: 'flat' takes no options", "side"]),
    ],
)
def test_build_refuses(spec: object, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.build("shape", spec, "key")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
