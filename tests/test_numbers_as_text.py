"""Numbers written as text mean the same in every form, from files and from mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pruningawaretraining import load_config
from pruningawaretraining.errors import ConfigError, as_number
from pruningawaretraining.registry import build

GRADUAL = {"params": ["re:.*weight"], "start_epoch": 0, "end_epoch": 4, "update_frequency": 1}
FORMS: dict[str, dict[str, Any]] = {
    "native": {
        "rules": [
            {
                "pattern": "unstructured",
                "criterion": {"type": "obs", "damp": 1e-7, "num_grads": 16},
                "target": {"sparsity": 0.5},
                "start": 1,
                "end": 4,
                "initial": 0.25,
            }
        ]
    },
    "flat": {"mac_target": 0.5, "start_epoch": 1, "end_epoch": 4, "interval": 2},
    "sirc": {
        "channel_sparsity_args": {
            "global_prune_rate": 0.5,
            "start_epoch": 1,
            "end_epoch": 4,
            "regularize": {"reg": 5e-6},
            "layers": ["a"],
        }
    },
    "intel": {"pattern": "4x1", "target_sparsity": 0.9, "start_step": 1, "end_step": 9, "pruning_frequency": 4},
    "sparseml": {
        "modifiers": [
            {"!tag": "!OBSPruningModifier", "init_sparsity": 0.1, "final_sparsity": 0.5, "damp": 1e-7, **GRADUAL}
        ]
    },
}


def as_text(value: Any) -> Any:
    """The same with every number as text."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner) for inner in value]
    return str(value) if isinstance(value, (int, float)) else value


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_text_that_is_a_number(form: str) -> None:
    def built(config: Any) -> list[Any]:
        return [(rule.model_dump(exclude={"criterion"}), build("criterion", rule.criterion)) for rule in config.rules]

    assert built(load_config(as_text(FORMS[form]))) == built(load_config(FORMS[form]))


@pytest.mark.parametrize("form", ["native", "flat", "sirc", "intel"])
def test_yaml_without_a_dot_is_a_number(form: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(FORMS[form]).replace("1.0e-07", "1e-7").replace("5.0e-06", "5e-6"), encoding="utf-8")
    assert load_config(path) == load_config(FORMS[form])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), ("-3", -3), ("+2", 2), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("1e-7", 1e-7), ("1.5E+3", 1500.0),
        (" 2 ", 2), ("inf", "inf"), ("nan", "nan"), ("1_000", "1_000"), ("0x10", "0x10"), ("", ""), ("e5", "e5"),
        ("1e999999", "1e999999"), ("9" * 5000, "9" * 5000), (None, None), (True, True),
    ],
)  # fmt: skip
def test_which_texts_are_numbers(text: Any, number: Any) -> None:
    found = as_number(text)
    assert found == number and type(found) is type(number)


@pytest.mark.parametrize("value", ["many", "1e400", "nan", "inf", "1_0"])
def test_other_texts_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"damp|rules\[0\]"):
        load_config({"rules": [{"pattern": "unstructured", "criterion": {"type": "obs", "damp": value}}]})
    with pytest.raises(ConfigError, match="mac_target"):
        load_config({"mac_target": value})
