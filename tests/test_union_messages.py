"""Values that may be of several kinds: one plain line when they are none of them."""

from __future__ import annotations

from typing import Any

import pytest

from pruningawaretraining import load_config
from pruningawaretraining.errors import ConfigError

KEYS = ("sparsity", "macs", "parameters", "peak_memory", "latency", "latency_ms", "costs")
VALUES: tuple[Any, ...] = (50, -1, "x", [], [0.5, 0.7], None, True, {})
GOOD = {("latency_ms", 0)}
"""Keys and numbers of values that are allowed."""
MODIFIER = {"!tag": "!OBSPruningModifier", "params": "__ALL_PRUNABLE__", "init_sparsity": 0.1, "final_sparsity": 0.5,
            "start_epoch": 0, "end_epoch": 2}  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALUES)))
@pytest.mark.parametrize("key", KEYS)
def test_targets(key: str, number: int) -> None:
    config = {"rules": [{"pattern": "channel", "target": {key: VALUES[number]}}]}
    if (key, number) in GOOD:
        assert load_config(config).rules[0].target.given
        return
    with pytest.raises(ConfigError) as error:
        load_config(config)
    message = str(error.value)
    assert message.startswith("rules[0].")
    assert "Allowed: " in message or message.endswith("is not a mapping of keys to values")
    assert not any(word in message for word in ("\n", "function-", "constrained", "dict[", "list["))


TABLE: list[tuple[dict[str, Any], str]] = [
    ({"final_sparsity": 50}, "final_sparsity: 50 is not allowed. Allowed: a number in [0, 1], or a mapping of keys to "
                             "values"),
    ({"final_sparsity": [0.5]}, "final_sparsity: [0.5] is not allowed. Allowed: a number in [0, 1], or a mapping of "
                                "keys to values"),
    ({"final_sparsity": {"0.5": "a.weight"}}, "final_sparsity.0.5: 'a.weight' is not a list"),
    ({"init_sparsity": 2}, "init_sparsity: 2 is not allowed. Allowed: a number in [0, 1], or '__FROM_PARAM__'"),
    ({"params": 3}, "params: 3 is not allowed. Allowed: a string, or a list"),
    ({"params": ["a.weight", 3]}, "params[1]: 3 is not a string"),
    ({"num_grads": 0}, "num_grads: 0 is not allowed. Allowed: a whole number of 1 or more, or a mapping of keys to "
                       "values"),
    ({"num_grads": {"0.5": 0}}, "num_grads.0.5: 0 is not allowed. Allowed: a whole number of 1 or more"),
    ({"mask_type": 4}, "mask_type: 4 is not allowed. Allowed: a string, or a list"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "expected"), TABLE, ids=[row[1][:30] for row in TABLE])
def test_keys_of_recipes(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"modifiers": [{**MODIFIER, **keys}]})
    assert str(error.value) == f"modifiers[0] (OBSPruningModifier): {expected}"
