"""A pruned transformers model is loaded by from_pretrained alone, or a warning says that it cannot be."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_pruned, save_pruned, shortened
from pruningawaretraining.errors import CheckpointError

transformers = pytest.importorskip("transformers")
TEXT = {"input_ids": torch.tensor([[1, 5, 7, 2, 9, 3], [4, 4, 8, 1, 0, 2]])}
BOTH = {**TEXT, "decoder_input_ids": TEXT["input_ids"]}
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}
KEYS = {**WORDS, **SMALL, "num_key_value_heads": 3, "max_position_embeddings": 32}
PIXELS = {**SMALL, "image_size": 16, "patch_size": 8}
T5 = {**WORDS, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6}
BART = {
    **WORDS, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {**KEYS, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "bert": ("Bert", "ForSequenceClassification", {**WORDS, **SMALL}, TEXT),
    "roberta": ("Roberta", "ForMaskedLM", {**WORDS, **SMALL}, TEXT),
    "distilbert": (
        "DistilBert", "ForMaskedLM", {**WORDS, "dim": 48, "hidden_dim": 64, "n_layers": 2, "n_heads": 6}, TEXT,
    ),
    "vit": ("ViT", "ForImageClassification", PIXELS, IMAGE),
    "deit": ("DeiT", "ForImageClassification", PIXELS, IMAGE),
    "dinov2": ("Dinov2", "ForImageClassification", {**PIXELS, "mlp_ratio": 2}, IMAGE),
    "siglip": ("Siglip", "VisionModel", PIXELS, IMAGE),
    "gpt2": (
        "GPT2", "LMHeadModel",
        {**WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 32, "n_inner": 64}, TEXT,
    ),
    "opt": (
        "OPT", "ForCausalLM",
        {**WORDS, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
         "word_embed_proj_dim": 48, "max_position_embeddings": 32}, TEXT,
    ),
    "llama": ("Llama", "ForCausalLM", KEYS, TEXT),
    "mistral": ("Mistral", "ForCausalLM", KEYS, TEXT),
    "qwen2": ("Qwen2", "ForCausalLM", {**KEYS, "use_sliding_window": True, "max_window_layers": 1}, TEXT),
    "t5": ("T5", "ForConditionalGeneration", T5, BOTH),
    "t5_gated": ("T5", "ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, BOTH),
    "bart": ("Bart", "ForConditionalGeneration", BART, BOTH),
    "mixtral": ("Mixtral", "ForCausalLM", EXPERTS, TEXT),
    "olmoe": ("Olmoe", "ForCausalLM", EXPERTS, TEXT),
}  # fmt: skip
MLP = r"re:.*(intermediate\.dense|fc1|c_fc|lin1|gate_proj|up_proj|wi|wi_0|wi_1)"
RULES: dict[str, dict[str, Any]] = {
    "mlp": {"layers": [MLP], "target": {"sparsity": 0.4}},
    "macs": {"layers": [MLP], "target": {"macs": 0.9}},
    "heads": {"pattern": "head", "target": {"sparsity": 0.34}},
    "all": {"pattern": {"type": "channel", "heads": True}, "target": {"sparsity": 0.4}},
    "layers": {"pattern": "depth", "target": {"sparsity": 0.5}},
}
NOT_SAID = {
    # the config has one size for two things, or none for what went
    *((name, "heads") for name in ("bert", "roberta", "distilbert", "siglip", "gpt2", "opt", "bart")),
    ("dinov2", "mlp"), ("dinov2", "macs"), ("dinov2", "layers"), ("t5", "layers"), ("t5_gated", "layers"),
}  # fmt: skip
NOT_FOUND = {("mixtral", "mlp"), ("olmoe", "mlp"), ("olmoe", "heads")}
"""All that is selected is in stacked experts; OLMoE's norm of queries hinders heads."""
FEW = {"macs": ("siglip", "t5", "t5_gated", "gpt2"), "all": ("bert", "vit", "llama", "t5_gated")}
"""What takes longer, with some of the families."""
QUICK = ("bert", "gpt2", "llama", "t5_gated")
CASES = [
    pytest.param(family, what, marks=[] if family in QUICK else [pytest.mark.slow])
    for what in RULES
    for family in FEW.get(what, FAMILIES)
    if (family, what) not in NOT_FOUND
]
"""All together take minutes; those that are not quick are marked slow."""


def built(family: str, **options: Any) -> nn.Module:
    name, task, own, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}VisionConfig" if task == "VisionModel" else f"{name}Config")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name + task)(config(**{**own, **options})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.2)
    return model


def outputs_of(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**FAMILIES[family][3])[0]
    return found


def pruned(family: str, what: str, *, options: Any = None, **rule: Any) -> tuple[nn.Module, Pruning]:
    model = built(family, **(options or {}))
    rule = {**RULES[what], **({} if what == "layers" else {"widths": "uniform"}), **rule}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=FAMILIES[family][3])
    assert pruner.prune() == "removed"
    return model, pruner


@pytest.mark.parametrize(("family", "what"), CASES)
def test_loaded_alone_or_said(family: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pruningawaretraining"):
        model, _ = pruned(family, what)
    said = [one.getMessage() for one in caplog.records if "from_pretrained" in one.getMessage()]
    assert what == "all" or len(said) == ((family, what) in NOT_SAID or what == "layers")
    if (family, what) in NOT_SAID or (what == "all" and said):
        assert "save_pruned(model, path)" in said[0] and "uniform" not in said[0] and "shortened" not in said[0]
        with pytest.raises(CheckpointError, match="cannot say what is left"):
            shortened(model)
        return
    assert all("random weights. Use shortened(model).save_pretrained(folder)" in one for one in said)
    (shortened(model) if what == "layers" else model).save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = outputs_of(model, family)
    assert torch.allclose(outputs_of(again.eval(), family), expected, atol=1e-5 * float(expected.abs().max()))


def test_the_warning_names_the_layers_and_asks_for_nothing_that_depth_refuses(caplog: Any) -> None:
    pruned("bert", "layers")
    (line,) = [one.getMessage() for one in caplog.records if "from_pretrained" in one.getMessage()]
    assert "bert.encoder.layer." in line and " is gone" in line and "widths" not in line


def test_a_shortened_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model, _ = pruned("gpt2", "layers")
    model.transformer.wte.weight.requires_grad_(False)
    model.half().train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    states = torch.get_rng_state(), random.getstate()
    made = shortened(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert len(made.transformer.h) == made.config.n_layer == 1 and model.config.to_dict() == config
    assert made.training and {one.dtype for one in made.parameters()} == {torch.float16}
    assert made.lm_head.weight is made.transformer.wte.weight and not made.lm_head.weight.requires_grad
    with torch.no_grad():
        for value in made.parameters():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_pruned_again_saved_and_used_with_a_cache(tmp_path: Path) -> None:
    model, _ = pruned("llama", "layers", options={"num_hidden_layers": 3})
    made = shortened(model)
    assert [layer.self_attn.layer_idx for layer in made.model.layers] == [0, 1]
    words = TEXT["input_ids"]
    assert torch.equal(made.generate(words, max_new_tokens=4), model.generate(words, max_new_tokens=4))
    rule = {**RULES["mlp"], "widths": "uniform"}
    assert Pruning(made, {"rules": [rule]}, example_inputs=TEXT).prune() == "removed"
    save_pruned(made, tmp_path / "file.safetensors")
    again = load_pruned(built("llama", num_hidden_layers=2), tmp_path / "file.safetensors")
    assert torch.equal(outputs_of(again, "llama"), outputs_of(made, "llama"))


def test_lists_in_the_config_lose_the_entries_of_the_same_layers() -> None:
    model = built("qwen2", num_hidden_layers=3)
    kinds = list(model.config.layer_types)
    pruner = Pruning(model, {"rules": [RULES["layers"]]}, example_inputs=TEXT)
    pruner.prune()
    kept = [number for number, layer in enumerate(model.model.layers) if len(list(layer.parameters()))]
    made = shortened(model)
    assert len(set(kinds)) == 2 and made.config.layer_types == [kinds[number] for number in kept]
    assert [layer.self_attn.layer_type for layer in made.model.layers] == made.config.layer_types


def test_widths_and_layers_that_went_one_after_the_other(tmp_path: Path) -> None:
    model, _ = pruned("bert", "layers")
    rule = {**RULES["mlp"], "widths": "uniform"}
    Pruning(model, {"rules": [rule]}, example_inputs=TEXT).prune()
    assert 8 <= model.config.intermediate_size < 64 and model.config.num_hidden_layers == 2
    shortened(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 1
    assert torch.allclose(outputs_of(again, "bert"), outputs_of(model, "bert"), atol=1e-5)


def test_what_cannot_be_shortened_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="Linear has no config"):
        shortened(nn.Linear(2, 2))
    model = built("bert", num_hidden_layers=3)
    rule = {**RULES["layers"], "start": 0, "end": 2}
    Pruning(model, {"rules": [{**rule, "target": {"sparsity": 0.67}}]}, example_inputs=TEXT).prune(epoch=1)
    with pytest.raises(CheckpointError, match=r"is masked and not removed. Allowed: pruner.remove\(\) first"):
        shortened(model)
    options = {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}
    model, _ = pruned("gpt2", "layers", options=options, exclude=["transformer.h.2"])
    with pytest.raises(CheckpointError, match="has scaling = .*it would have"):
        shortened(model)
