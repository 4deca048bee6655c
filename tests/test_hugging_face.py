"""After a removal the config says the new sizes, and from_pretrained alone loads the pruned model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_pruned, save_pruned
from pruningawaretraining.allocation.uniform import uniform
from pruningawaretraining.groups.grouping import Grouping, GroupSet
from pruningawaretraining.models import hugging_face

transformers = pytest.importorskip("transformers")
TEXT = {"input_ids": torch.tensor([[1, 5, 7, 2, 9, 3], [4, 4, 8, 1, 0, 2]])}
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
PICTURES = {**{key: value for key, value in SMALL.items() if key != "vocab_size"}, "image_size": 16, "patch_size": 8}
KEY_VALUE = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32}
MLP = "re:.*(intermediate.dense|fc1|c_fc|lin1|gate_proj|up_proj|wi|dense_h_to_4h)"
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL, TEXT, "intermediate_size"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SMALL, TEXT, "intermediate_size"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", SMALL, TEXT, "intermediate_size"),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}, TEXT, "hidden_dim",
    ),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}, TEXT, "n_inner",
    ),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {"vocab_size": 40, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "word_embed_proj_dim": 32, "max_position_embeddings": 32}, TEXT, "ffn_dim",
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", KEY_VALUE, TEXT, "intermediate_size"),
    "mistral": ("MistralConfig", "MistralForCausalLM", KEY_VALUE, TEXT, "intermediate_size"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", KEY_VALUE, TEXT, "intermediate_size"),
    "vit": ("ViTConfig", "ViTForImageClassification", PICTURES, IMAGE, "intermediate_size"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", PICTURES, IMAGE, "intermediate_size"),
}  # fmt: skip


def built(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config, model, options, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval(), inputs


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def pruned(family: str, **rule: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = built(family)
    rule = {"layers": [MLP], "target": {"sparsity": 0.3}, "widths": "uniform", **rule}
    assert Pruning(model, {"rules": [rule]}, example_inputs=inputs).prune() == "removed"
    return model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_loads_the_pruned_model(family: str, tmp_path: Any) -> None:
    model, inputs = pruned(family)
    assert 8 <= getattr(model.config, FAMILIES[family][4]) < 48 if family != "gpt2" else model.config.n_inner < 128
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits_of(again, inputs), logits_of(model, inputs), atol=1e-5)


def test_the_pruners_state_in_the_weights_is_no_layer(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As in our callbacks: equal widths are said by the config, and others by their numbers."""
    for rule, said in (({"widths": "uniform"}, ""), ({"target": {"sparsity": 0.33}, "scope": "global"}, "48 became ")):
        model, inputs = built("bert")
        config = {"rules": [{"layers": [MLP], "target": {"sparsity": 0.3}, **rule}]}
        pruner = Pruning(model, config, example_inputs=inputs)
        handle = pruner.state_in(model)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert pruner.prune() == "removed"
        assert "layers are gone" not in caplog.text and said in caplog.text and bool(said) == bool(caplog.text)
        if not said:
            handle.remove()
            model.save_pretrained(tmp_path)
            assert torch.allclose(
                logits_of(type(model).from_pretrained(tmp_path).eval(), inputs), logits_of(model, inputs), atol=1e-5
            )


def test_heads_with_a_size_of_their_own(tmp_path: Any) -> None:
    model, inputs = pruned("llama", pattern="head", layers=None, target={"sparsity": 0.5})
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert model.config.head_dim == 8
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits_of(again, inputs), logits_of(model, inputs), atol=1e-5)


def test_layers_that_went_are_no_matter_of_widths(caplog: Any) -> None:
    """Under equal widths too the config cannot say which layers are there, and nobody is sent back to equal widths."""
    model, _ = built("bert")
    shorter = copy.deepcopy(model)
    del shorter.bert.encoder.layer[1]
    with caplog.at_level(logging.WARNING):
        hugging_face.follow_configs(shorter)
    (line,) = [one.getMessage() for one in caplog.records]
    assert "(layers are gone)" in line and line.endswith("Use save_pruned(model, path)")


def test_what_a_config_cannot_say_is_said(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        model, _ = pruned("bert", widths="free", target={"sparsity": 0.31})
    widths = {model.bert.encoder.layer[number].intermediate.dense.out_features for number in range(3)}
    assert len(widths) > 1 and model.config.intermediate_size == 48
    (line,) = [one.getMessage() for one in caplog.records if "config cannot say" in one.getMessage()]
    assert "48 became " in line and "save_pruned" in line and "widths: uniform" in line


def test_a_loaded_file_brings_the_config_along(tmp_path: Any) -> None:
    model, inputs = pruned("bert")
    save_pruned(model, tmp_path / "pruned.safetensors")
    again = load_pruned(built("bert")[0], tmp_path / "pruned.safetensors")
    assert again.config.intermediate_size == model.config.intermediate_size < 48
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_layers_of_a_kind_keep_equally_many() -> None:
    sets = (GroupSet("a.0.fc", 0, 4), GroupSet("a.1.fc", 4, 8), GroupSet("b.0.fc", 8, 12))
    keep = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]).bool()
    scores = torch.tensor([3.0, 1, 2, 0, 5, 6, 0, 0, 1, 1, 1, 1])
    expected = [1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert uniform(Grouping("g", (), sets), keep, scores).int().tolist() == expected
