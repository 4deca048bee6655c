"""Intel's gradient_sensitivity of 2021: so many heads and neurons stay in every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pruningawaretraining import Pruning, load_config

transformers = pytest.importorskip("transformers")
NAMES = "bert.encoder.layer.*."


def pruner_text(names: list[str], target: int, transpose: bool, inputs: list[str]) -> dict[str, Any]:
    parameters = {"target": target, "normalize": True, "stride": 8, "transpose": transpose, "importance_inputs": inputs}
    return {"prune_type": "gradient_sensitivity", "names": [NAMES + name for name in names], "parameters": parameters}


def test_heads_and_neurons_by_count(tmp_path: Path) -> None:
    projections = [f"attention.self.{one}.weight" for one in ("query", "key", "value")]
    pruners = [
        pruner_text(projections, 3, False, ["head_mask"]),
        pruner_text(["attention.output.dense.weight"], 3, True, ["head_mask"]),
        pruner_text(["intermediate.dense.weight"], 20, False, [NAMES + "intermediate.dense.weight"]),
        pruner_text(["output.dense.weight"], 20, True, [NAMES + "intermediate.dense.weight"]),
    ]
    section = {"start_epoch": 0, "end_epoch": 1, "pruners": pruners}
    config = load_config({"pruning": {"approach": {"weight_compression": section}}})
    assert [(one.enabled, one.pattern, one.keep_per_layer) for one in config.rules] == [
        (True, "head", 3),
        (False, "channel", None),
        (True, "channel", 20),
        (False, "channel", None),
    ]
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=48))
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    pruner = Pruning(model, config, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(2):
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        pruner.prune(model, epoch)
    assert pruner.phase == "finetune"
    for layer in model.bert.encoder.layer:
        assert layer.attention.self.query.out_features == 24 and layer.intermediate.dense.out_features == 20
