"""Experts of transformers models: pruned ones are saved and loaded as any others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.patterns.expert import expert_blocks

transformers = pytest.importorskip("transformers", "5.0", reason="experts are lists of layers before")
TEXT = {"input_ids": torch.tensor([[1, 5, 7, 2, 9, 3], [4, 4, 8, 1, 0, 2]])}
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIX = {"num_experts": 6, "num_experts_per_tok": 2}
INNER = {**SIX, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "olmoe": ("Olmoe", SIX),
    "qwen2_moe": ("Qwen2Moe", {**INNER, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {**INNER, "head_dim": 8}),
    "phimoe": ("Phimoe", {"num_local_experts": 6}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0,
         "head_dim": 8},
    ),
}  # fmt: skip
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def built(family: str, **options: Any) -> nn.Module:
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **options})
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**TEXT).logits
    return found


def pruner_of(model: nn.Module, inputs: Any = TEXT, **rule: Any) -> Pruning:
    rule = {"pattern": "expert", "target": {"sparsity": 0.5}, "widths": "uniform", "end": 1, **rule}
    return Pruning(model, {"rules": [{"schedule": "linear", "start": 0, **rule}]}, example_inputs=inputs)


def sizes(model: nn.Module) -> list[int]:
    return [len(one.module.experts.down_proj) for one in expert_blocks(model)[0]]


@pytest.mark.parametrize("criterion", ["magnitude", "reap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_removed_and_loaded_are_the_same(family: str, criterion: str, tmp_path: Path) -> None:
    model = built(family)
    dense, macs = logits_of(model), count_macs(model, TEXT)
    pruner = pruner_of(model, criterion=criterion, scope="local", target={"sparsity": 0.67})
    logits_of(model)  # for those that listen
    assert pruner.prune(model, 0) == "masked" and sizes(model) == [6, 6] and 0.3 < pruner.sparsity < 0.4
    masked = logits_of(model)
    assert (masked - dense).abs().max() > 0.1
    pruner.remove()
    assert sizes(model) == [4, 4] and torch.allclose(logits_of(model), masked, atol=1e-5)
    assert pruner.macs.kept == count_macs(model, TEXT) == macs - 2 * 2 * 12 * 32
    assert {getattr(model.config, name) for name in COUNTS if hasattr(model.config, name)} == {4}
    assert {vars(one)[key] for one in model.modules() for key in COUNTS if key in vars(one)} == {4}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert sizes(again) == [4, 4] and torch.allclose(logits_of(again), masked, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_trained_with_the_loss_that_balances_experts(family: str) -> None:
    model = built(family, output_router_logits=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = {**TEXT, "output_router_logits": False}
    pruner = pruner_of(model, inputs, criterion="reap", target={"parameters": 0.6}, end=2)
    losses = []
    for epoch in range(4):
        out = model(**TEXT, labels=TEXT["input_ids"])
        losses.append(float(out.aux_loss.detach()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        pruner.prune(model, epoch)
        assert all(bool(one.isfinite().all()) for one in model.parameters())
    (left,) = set(sizes(model))
    assert 2 <= left < 6 and model.num_experts == left
    assert pruner.report().parameters["fraction"] <= 0.6 and all(0 < one < 20 for one in losses)


def test_blocks_that_differ_are_said(caplog: Any) -> None:
    model = built("mixtral")
    pruner_of(model, widths="free", layers=["model.layers.0"], end=0).prune(model, 0)
    assert sizes(model) == [3, 6] and model.num_experts == model.config.num_local_experts == 6
    assert "config cannot say the new sizes" in caplog.text and "widths: uniform" in caplog.text


def test_beside_channels_and_heads() -> None:
    model = built("qwen2_moe")
    dense = copy.deepcopy(model)
    rules = [
        {"pattern": "expert", "target": {"sparsity": 0.5}},
        {"pattern": "head", "target": {"sparsity": 0.5}},
        {"layers": ["re:.*shared_expert.(gate|up)_proj"], "target": {"sparsity": 0.5}},
    ]
    pruner = Pruning(model, {"rules": rules}, example_inputs=TEXT)
    assert pruner.prune(model, 0) == "removed"
    first = model.model.layers[0]
    assert len(first.mlp.experts.down_proj) < 6 and first.mlp.shared_expert.gate_proj.out_features < 16
    assert first.self_attn.o_proj.in_features < dense.model.layers[0].self_attn.o_proj.in_features
    assert pruner.macs.kept == count_macs(model, TEXT)


def test_a_router_with_groups_of_experts_is_refused_by_name() -> None:
    """DeepSeek-V3 reshapes to groups of equal size; with one group alone it is as any other."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    small = {**SMALL, **latent, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8}
    for groups in (2, 1):
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(
            **small, num_experts_per_tok=2, n_group=groups, topk_group=1, first_k_dense_replace=1
        )
        model = transformers.DeepseekV3ForCausalLM(config).eval()
        if groups == 2:
            with pytest.raises(ConfigError, match=r"layers\.1\.mlp: its router chooses among 2 groups of experts"):
                pruner_of(model)
        else:
            assert pruner_of(model, end=0).prune(model, 0) == "removed" and sizes(model) == [4]
