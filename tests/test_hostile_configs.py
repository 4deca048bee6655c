"""Configs from strangers: whatever a parser trips over is one ConfigError, short, at once, and in little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruningawaretraining import load_config
from pruningawaretraining.errors import LONGEST, ConfigError, capped
from pruningawaretraining.experiment.schema import load_experiment

NINES = "9" * 400


def bomb(levels: int, width: int = 10) -> str:
    """YAML in which every level names the one before it ``width`` times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def mapping_bomb(levels: int) -> dict[str, Any]:
    value: Any = {"type": "magnitude"}
    for _ in range(levels):
        value = {str(number): value for number in range(10)}
    return {"rules": [{"criterion": value, "target": {"sparsity": 0.5}}]}


RULE = "rules: [{{target: {{sparsity: 0.5}}, {}}}]"
TEXTS: dict[str, tuple[str, str]] = {
    "deep JSON": (".json", "[" * 5000 + "]" * 5000),
    "deep JSON mapping": (".json", '{"a":' * 5000 + "1" + "}" * 5000),
    "deep YAML": (".yaml", "[" * 3000 + "]" * 3000),
    "deep YAML mapping": (".yaml", "{a: " * 3000 + "1" + "}" * 3000),
    "5000 digits in JSON": (".json", '{"rules": [{"end": ' + "9" * 5000 + "}]}"),
    "5000 digits in YAML": (".yaml", "rules: [{end: " + "9" * 5000 + "}]"),
    "400 digits": (".yaml", RULE.format(f"end: {NINES}")),
    "400 digits in JSON": (".json", json.dumps({"rules": [{"end": int(NINES)}]})),
    "400 digits, flat": (".yaml", f"start_epoch: {NINES}\nend_epoch: {NINES}\ninterval: 1\nmac_target: 0.5"),
    "1e999": (".yaml", RULE.format("min_sparsity: 1.0e+999")),
    "an infinite size": (".yaml", RULE.format("pattern: {type: slice, block_size: .inf}")),
    "0x_": (".yaml", RULE.format("end: 0x_")),
    "0b_": (".yaml", RULE.format("end: 0b_")),
    "no such day": (".yaml", RULE.format("end: 2026-02-30")),
    "no such time": (".yaml", RULE.format("end: 2026-02-03 25:61:00")),
    "a day": (".yaml", RULE.format("end: 2026-02-03")),
    "binary": (".yaml", RULE.format("end: !!binary '===='")),
    "set": (".yaml", "rules: !!set {a}"),
    "a python object": (".yaml", RULE.format("end: !!python/object/apply:os.system ['true']")),
    "an alias of itself": (".yaml", "rules: &a [*a]"),
    "an alias of nothing": (".yaml", "rules: *a"),
    "aliases, as a rule": (".yaml", bomb(9) + "\nrules: [{criterion: *a8}]"),
    "aliases, as rules": (".yaml", bomb(9) + "\nrules: *a8"),
    "aliases, unknown": (".yaml", bomb(12)),
    "aliases, layers": (".yaml", bomb(8) + "\nrules: [{layers: *a7, target: {sparsity: 0.5}}]"),
    "merged aliases": (".yaml", "a: &a {k: v}\n" + "b: &b\n  <<: [" + ", ".join(["*a"] * 20_000) + "]\nrules: [*b]"),
    "a text of a megabyte": (".json", json.dumps({"rules": [{"criterion": "x" * 1_000_000}]})),
    "a key of 600 kB": (".json", json.dumps({"rules": [{"x" * 600_000: 1}]})),
    "more than a megabyte": (".json", " " * 2_000_000),
    "many unknown keys": (".json", json.dumps({"rules": [{f"key{n}": n for n in range(20_000)}]})),
    "many rules": (".json", json.dumps({"rules": [{"start": -1.5}] * 10_000})),
    "a lone surrogate": (".json", '{"rules": [{"name": "\\ud800"}]}'),
    "NUL": (".json", '{"rules": [{"max_sparsity_from": "\\u0000", "target": {"sparsity": 0.5}}]}'),
    "a long path": (".json", json.dumps({"rules": [{"max_sparsity_from": "p" * 5000, "target": {"sparsity": 0.5}}]})),
    "a home of nobody": (
        ".json",
        '{"rules": [{"max_sparsity_from": "~nobody-at-all/x", "target": {"sparsity": 0.5}}]}',
    ),
    "escapes of a terminal": (".json", json.dumps({"rules": [{"\x1b[2J\nerror: fine": 1}]})),
    "a megabyte of keys": (".yaml", "".join(f"key{n}: {n}\n" for n in range(60_000))),
    "a megabyte of rules": (".yaml", "rules:\n" + "- {pattern: channel, target: {sparsity: 0.5}}\n" * 20_000),
    "a megabyte in brackets": (".yaml", "rules: [" + "{a: 1}, " * 120_000 + "]"),
    "a megabyte of layers": (".yaml", RULE.format("layers: [" + "a, " * 300_000 + "]")),
    "a megabyte of words": (".yaml", "a: " + "b " * 500_000),
    "a megabyte of escapes": (".yaml", 'a: "' + "\\n" * 500_000 + '"'),
    "a megabyte of anchors": (".yaml", "".join(f"k{n}: &a{n} 1\n" for n in range(50_000))),
    "a bracket that stays open": (".json", '{"rules": [{"layers": ["re:(((("], "target": {"sparsity": 0.5}}]}'),
}


def check(error: pytest.ExceptionInfo[ConfigError], seconds: float) -> None:
    message = str(error.value)
    assert len(message) <= LONGEST
    assert all(letter == "\n" or letter.isprintable() for letter in message)
    assert seconds < 1.0, "it takes longer than a second"


@pytest.mark.parametrize("load", [load_config, load_experiment])
@pytest.mark.parametrize("name", TEXTS)
def test_what_a_parser_trips_over_is_a_short_config_error(name: str, load: Any, tmp_path: Path) -> None:
    suffix, text = TEXTS[name]
    path = tmp_path / f"config{suffix}"
    path.write_text(text)
    spent = []
    for _ in range(2):  # the first call may import what it needs
        started = time.process_time()
        with pytest.raises(ConfigError) as caught:
            load(path)
        spent.append(time.process_time() - started)
    check(caught, min(spent))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("load", [load_config, load_experiment])
def test_mappings_that_share_their_parts_are_refused_too(load: Any) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="too large, with aliases expanded") as caught:
        load(mapping_bomb(12))
    check(caught, time.process_time() - started)


@pytest.mark.parametrize("name", ["a bomb", "a megabyte of rules"])
def test_it_takes_little_memory(name: str, tmp_path: Path) -> None:
    text = bomb(12) + "\nrules: [{criterion: *a11}]" if name == "a bomb" else TEXTS[name][1]
    (tmp_path / "bomb.yaml").write_text(text)
    script = (
        "import resource, sys\nfrom pruningawaretraining import load_config\nload_config({'rules': [{'target': "
        "{'sparsity': 0.5}}]})\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load_config(sys.argv[1])\nexcept ValueError as error:\n    assert 'too large' in str(error)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.yaml")], capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 200e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_large_configs_of_real_networks_are_read(tmp_path: Path) -> None:
    rules = [{"layers": [f"model.layers.{n}.mlp.up_proj" for n in range(2000)], "target": {"sparsity": 0.5}}] * 5
    (tmp_path / "large.json").write_text(json.dumps({"rules": rules}))
    assert len(load_config(tmp_path / "large.json").rules[4].layers or ()) == 2000


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("short", "short"),
        ("a\nb", "a\nb"),
        ("x" * 40 + " Allowed: this", "x" * 15 + " ... Allowed: this"),
        ("x" * 60, "x" * 17 + " ... " + "x" * 11),
        ("\x1b[2Jred\t", "\\x1b[2Jred\\t"),
        ("\n".join(["line"] * 30), "line\nline\nline\n... and 27 more"),
    ],
)
def test_messages_are_shortened_in_the_middle(message: str, expected: str) -> None:
    found = capped(message, 33)
    assert len(found) <= 33
    assert found == expected


# --- lines, keys and values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("comments", [0, 1, 90_000])
def test_the_line_is_right_in_a_file_of_any_size(comments: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# größer\n" * comments + "rules:\n- target: {sparsity: 0.5}\n\n  strat: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: line {comments + 4}: rules[0].strat: 'strat' is not known")
    path.write_text("# größer\n" * comments + "rules:\n- {target: {sparsity: 0.5}, start: 1, start: 2}\n")
    with pytest.raises(ConfigError, match=f"line {comments + 2}, column 39: start: given twice"):
        load_config(path)


@pytest.mark.parametrize("key", ["1", "true", "on", "null", "~", "2026-02-03"])
@pytest.mark.parametrize("text", ["{}: 2", "rules: [{{{}: 2}}]", "rules: [{{target: {{{}: 2}}}}]"])
def test_keys_in_yaml_that_are_not_text(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.format(key))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    column = text.replace("{{", "{").index("{}") + 1
    assert str(caught.value).startswith(f"{path}: line 1, column {column}: the key {key!r} is not text, but ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "kind"), [(1, "int"), (True, "bool"), (None, "NoneType"), ((1, 2), "tuple"), (b"a", "bytes")]
)
@pytest.mark.parametrize(
    ("where", "config"),
    [
        ("config", lambda key: {key: 1}),
        ("config", lambda key: {"rules": [], key: 1}),
        ("rules[0]", lambda key: {"rules": [{key: 1}]}),
        ("rules[0].target", lambda key: {"rules": [{"target": {key: 1}}]}),
        ("pruning_configs[0]", lambda key: {"pruning_configs": [{key: 1}]}),
        ("pruning_modifiers[0]", lambda key: {"pruning_modifiers": [{key: 1}]}),
    ],
)
def test_keys_of_a_mapping_that_are_not_text(where: str, config: Any, key: Any, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(key))
    assert str(caught.value) == f"{where}: the key {key!r} is not text ({kind})"


VALUES: dict[str, Any] = {
    "a tensor": torch.randn(1000, 1000),
    "a number in a tensor": torch.tensor(0.5),
    "a parameter": nn.Parameter(torch.ones(3)),
    "an array": np.ones(5),
    "a module": nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
}
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "rules": lambda value: {"rules": value},
    "rules[0]": lambda value: {"rules": [value]},
    "rules[0].start": lambda value: {"rules": [{"start": value, "target": {"sparsity": 0.5}}]},
    "rules[0].layers": lambda value: {"rules": [{"layers": value, "target": {"sparsity": 0.5}}]},
    "rules[0].criterion": lambda value: {"rules": [{"criterion": value, "target": {"sparsity": 0.5}}]},
    "rules[0].criterion.p": lambda value: {"rules": [{"criterion": {"type": "magnitude", "p": value}}]},
    "rules[0].target.sparsity": lambda value: {"rules": [{"target": {"sparsity": value}}]},
    "target_sparsity": lambda value: {"target_sparsity": value, "pattern": "2:4"},
    "pruning_configs[0].target_sparsity": lambda value: {"pruning_configs": [{"target_sparsity": value}]},
    "distillation": lambda value: {"distillation": value, "rules": [{"target": {"sparsity": 0.5}}]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", VALUES)
def test_values_that_are_no_plain_data_are_one_line(value: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PLACES[place](VALUES[value]))
    message = str(caught.value)
    assert message.startswith(f"{place}: a ") and type(VALUES[value]).__name__ in message
    assert message.endswith("Allowed: plain numbers, texts, lists and mappings")
    assert "\n" not in message and len(message) <= 250


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    assert load_config({"rules": [{"target": {"sparsity": number}}]}).rules[0].target.sparsity == 0.5
