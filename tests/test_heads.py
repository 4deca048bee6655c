"""Attention heads: which weights are a head, and that a model without some of them is what masking them made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from attention_models import IDS, MODELS, TRACED_MASK, build
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models.calling import call, outputs_of
from pruningawaretraining.models.pruned_attention import PrunedMultiheadAttention
from pruningawaretraining.models.pruned_window_attention import PrunedWindowAttention
from pruningawaretraining.patterns.attention import attention_blocks
from pruningawaretraining.patterns.head import Heads, find_heads

BOTH = {"type": "channel", "heads": True}


def pruner_of(model: nn.Module, inputs: Any, pattern: Any = "head", **rule: Any) -> Pruning:
    rule = {"target": {"sparsity": 0.5}, "scope": "local", **rule}
    return Pruning(model, {"rules": [{"pattern": pattern, **rule}]}, example_inputs=inputs)


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    scale = max(float(one.abs().max()) for one in first)
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True)) / scale


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["head", BOTH], ids=["heads", "heads and channels"])
def test_masked_equals_removed_and_analytic_macs_equal_counted_ones(name: str, pattern: Any, tmp_path: Path) -> None:
    model, inputs = build(name)
    target = {"sparsity": 0.5} if pattern == "head" else {"macs": 0.6}
    pruner = pruner_of(model, inputs, pattern, target=target, start=1, end=2, scope="global")
    pruner.prune(epoch=1)
    engine = pruner.channel_pruner
    masked, expected = outputs_of(model, inputs), engine.macs_cost(engine.keep_D)
    parameters = engine.parameters_cost(engine.keep_D)
    pruner.remove()
    removed = outputs_of(model, inputs)
    assert 0 < pruner.sparsity < 1
    assert largest_difference(masked, removed) <= 1e-5
    assert expected == pytest.approx(count_macs(model, inputs), abs=0.5) and expected < engine.macs_cost.dense
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(build(name)[0], tmp_path / "model.safetensors").eval()
    assert largest_difference(removed, outputs_of(loaded, inputs)) == 0.0
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sum(one.square().mean() for one in _floats(call(model, inputs))).backward()
    optimizer.step()
    moved = [bool((one != two).any()) for one, two in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def _floats(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, dict) else [outputs]
    return [one for one in values if isinstance(one, Tensor) and one.is_floating_point()]


@pytest.mark.parametrize(
    "name", ["vision_transformer", "timm_vit", "encoder", "bert", pytest.param("llama", marks=TRACED_MASK)]
)
def test_the_removed_model_exports(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    pruner = pruner_of(model, inputs)
    pruner.prune(epoch=0)
    assert export_onnx(model, inputs, tmp_path / "model.onnx").max_abs_diff <= 1e-4


@pytest.mark.parametrize(
    ("unit", "rows", "keys", "columns", "attributes"),
    [
        ("group", (0, 16), (0, 8), (0, 16), {"num_key_value_groups": 2}),
        ("query", (0, 8, 16, 24, 32, 40, 48, 56), None, None, {"num_key_value_groups": 2}),
    ],
)
def test_what_a_group_is_under_grouped_queries(
    unit: str, rows: tuple[int, ...], keys: Any, columns: Any, attributes: dict[str, int]
) -> None:
    """Llama with 8 query heads of 8 and 4 key-value heads: group 0 in rows of q, rows of k, columns of o."""
    model, _ = build("llama")
    found = find_heads(model, {"model.layers.0.self_attn": unit})
    grouping, (heads,) = found.grouping, found.attachments
    assert isinstance(heads, Heads) and heads.groups["model.layers.0.self_attn"].tolist() == list(range(grouping.size))
    labels = {member.name.split("self_attn.")[1]: member.slots for member in grouping.members}
    first = {name: torch.nonzero(slots == 0).flatten().tolist() for name, slots in labels.items() if slots is not None}
    assert not found.skipped
    if unit == "group":
        assert grouping.size == 4
        assert first == {
            "q_proj.weight": list(range(16)),
            "k_proj.weight": list(range(8)),
            "v_proj.weight": list(range(8)),
            "o_proj.weight": list(range(16)),
        }
        assert heads.attributes["model.layers.0.self_attn"] == ()
    else:
        every_other = [16 * group + entry for group in range(4) for entry in range(8)]
        assert grouping.size == 2
        assert first == {"q_proj.weight": every_other, "o_proj.weight": every_other}
        assert heads.attributes["model.layers.0.self_attn"] == ("num_key_value_groups",)


@pytest.mark.parametrize("unit", ["group", "query"])
def test_a_decoder_with_grouped_queries_loses_either(unit: str) -> None:
    model, inputs = build("llama")
    pruner = pruner_of(model, inputs, {"type": "head", "unit": unit})
    pruner.prune(epoch=0)
    attention = model.model.layers[0].self_attn
    widths = attention.q_proj.out_features, attention.k_proj.out_features, attention.num_key_value_groups
    assert widths == {"group": (32, 16, 2), "query": (32, 32, 1)}[unit]
    assert attention.scaling == 8**-0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "causal", "float", "padding", "both", "for every head"])
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
def test_a_pruned_multihead_attention_takes_what_pytorchs_takes(
    options: dict[str, Any], mask: str, weights: str
) -> None:
    """With all heads kept it computes what ``nn.MultiheadAttention`` does."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, 4, **options).eval()
    pruned = PrunedMultiheadAttention.of(dense)
    dims = (2, 5) if options.get("batch_first") else (5, 2)
    query = torch.randn(*dims, 16)
    key, value = (torch.randn(*dims, options.get(one, 16)) for one in ("kdim", "vdim"))
    causal, padding = torch.ones(5, 5).triu(1).bool(), torch.tensor([[False] * 4 + [True], [False] * 5])
    every_head = torch.randn(8, 5, 5)
    given: dict[str, Any] = {
        "none": {},
        "causal": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(5, 5)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "for every head": {"attn_mask": every_head},
    }[mask]
    given |= {"need_weights": weights != "none", "average_attn_weights": weights != "each"}
    expected, expected_weights = dense(query, key, value, **given)
    actual, actual_weights = pruned(query, key, value, **given)
    assert torch.allclose(expected, actual, atol=1e-6)
    if expected_weights is None:
        assert actual_weights is None
    else:
        assert torch.allclose(expected_weights, actual_weights, atol=1e-6)


@pytest.mark.parametrize("second", [False, True], ids=["Swin", "Swin V2"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (3, 4)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0], [1, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_pruned_window_attention_computes_what_torchvisions_does(
    second: bool, size: tuple[int, int], shift: list[int], bias: bool
) -> None:
    torch.manual_seed(0)
    kind = ShiftedWindowAttentionV2 if second else ShiftedWindowAttention
    dense = kind(16, [3, 4], shift, 4, qkv_bias=bias).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, *size, 16)
    assert torch.allclose(dense(x), PrunedWindowAttention.of(dense)(x), atol=1e-5)


def test_unbatched_inputs_and_a_mask_for_heads_that_are_gone() -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, 4).eval()
    pruned = PrunedMultiheadAttention.of(dense)
    x = torch.randn(5, 16)
    assert torch.allclose(dense(x, x, x)[0], pruned(x, x, x)[0], atol=1e-6)
    assert dense(x, x, x)[1].shape == pruned(x, x, x)[1].shape
    pruned.num_heads = 3
    with pytest.raises(ValueError, match="for 4 heads, and 3 are left"):
        pruned(x[:, None], x[:, None], x[:, None], attn_mask=torch.zeros(4, 5, 5))


def test_the_weakest_head_goes_and_the_optimizer_stays_alive() -> None:
    model, inputs = build("encoder")
    attention = model.layers[0].self_attn
    with torch.no_grad():
        for part in range(3):
            attention.in_proj_weight[32 * part + 8 : 32 * part + 16] *= 0.1
    optimizer = torch.optim.Adam(model.parameters())
    model(inputs).square().mean().backward()
    optimizer.step()
    rule = {"pattern": "head", "layers": ["layers.0"], "target": {"sparsity": 0.25}}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs, optimizer=optimizer)
    pruner.prune(epoch=0)
    assert pruner.masks["layers.0.self_attn"].tolist() == [True, False, True, True]
    removed = model.layers[0].self_attn
    assert (removed.num_heads, removed.in_proj_weight.shape, removed.out_proj.weight.shape) == (3, (72, 32), (32, 24))
    assert isinstance(removed, PrunedMultiheadAttention) and not isinstance(
        model.layers[1].self_attn, PrunedMultiheadAttention
    )
    assert {id(one) for one in model.parameters()} == {id(one) for one in optimizer.param_groups[0]["params"]}
    assert optimizer.state[removed.in_proj_weight]["exp_avg"].shape == (72, 32)


def test_a_resumed_run_has_the_same_heads() -> None:
    model, inputs = build("vision_transformer")
    pruner = pruner_of(model, inputs, start=0, end=2)
    for epoch in range(3):
        pruner.prune(epoch=epoch)
    state, weights = pruner.state_dict(), model.state_dict()
    again, _ = build("vision_transformer")
    resumed = pruner_of(again, inputs, start=0, end=2)
    resumed.load_state_dict(state)
    again.load_state_dict(weights)
    assert largest_difference(outputs_of(model, inputs), outputs_of(again, inputs)) == 0.0


def test_heads_that_share_a_position_bias_go_together() -> None:
    model, inputs = build("t5")
    pruner = pruner_of(model, inputs)
    assert [len(mask) for mask in pruner.masks.values()] == [8, 8, 8]
    pruner.prune(epoch=0)
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 4)
    assert model.encoder.block[1].layer[0].SelfAttention.n_heads == 4


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": ["layers.7"]}, "layers.7"),
        ({"pattern": {"type": "head", "unit": "qery"}}, "query"),
        ({"layers": ["layers.0.linear1"]}, "selects no attention block.*Allowed: layers.0.self_attn"),
    ],
)
def test_what_cannot_be_meant_is_refused(rule: dict[str, Any], message: str) -> None:
    model, inputs = build("encoder")
    with pytest.raises((ConfigError, ModelError), match=message):
        Pruning(model, {"rules": [{"pattern": "head", "target": {"sparsity": 0.5}, **rule}]}, example_inputs=inputs)


class Misread(nn.Module):
    """It looks like a block with query, key and value one after the other, and has those of each head together."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (self.num_heads, 12)).transpose(1, 2).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def test_heads_in_another_order_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Misread(), nn.Linear(16, 3)), torch.randn(2, 5, 16)
    before = outputs_of(model, inputs)
    with pytest.raises(ModelError, match="0: removed, some of it would leave another model than masked"):
        pruner_of(model, inputs)
    assert largest_difference(before, outputs_of(model, inputs)) == 0.0


class WidthInCode(Misread):
    """The mixed heads are reshaped to the width of the input, as in timm's BEiT."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


def test_a_block_that_cannot_do_with_fewer_heads_is_left_out_by_name() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="0: without some of its heads the model does not run"):
        pruner_of(nn.Sequential(WidthInCode(), nn.Linear(16, 3)), torch.randn(2, 5, 16))


def test_a_shared_block_is_refused_and_a_block_that_is_used_twice_is_not() -> None:
    first, second = Misread(), Misread()
    second.qkv.weight = first.qkv.weight
    blocks, unread = attention_blocks(nn.Sequential(first, second))
    assert not blocks and "shared with another module" in unread["0"]
    blocks, unread = attention_blocks(nn.Sequential(first, first))
    assert [one.name for one in blocks] == ["0"] or "shared" in unread["0"]


def test_generation_goes_on_with_fewer_heads() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=96,
        num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    pruner = pruner_of(model, {"input_ids": IDS, "use_cache": False})
    pruner.prune(epoch=0)
    with torch.no_grad():
        cached = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
        plain = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_intels_mha_masks_heads_by_steps_and_removes_them() -> None:
    """Their flat YAML form: SNIP-momentum, sparsity 0.5 from step 2 to 8; the exponential schedule over 16 heads."""
    model, inputs = build("bert")
    config = {
        "target_sparsity": 0.5,
        "pattern": "mha",
        "pruning_type": "snip_momentum",
        "start_step": 2,
        "end_step": 8,
        "pruning_frequency": 2,
    }
    pruner = Pruning(model, config, example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner.on_train_begin()
    kept = []
    for step in range(10):
        pruner.on_step_begin(step)
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_after_optimizer_step()
        kept.append(sum(int(mask.sum()) for mask in pruner.masks.values()))
    assert kept == [16, 16, 16, 16, 13, 13, 11, 8, 8, 8]  # events at 0, 1/3, 2/3 and 1 of the way, exponentially
    blocks = [layer.attention.self for layer in model.bert.encoder.layer]
    assert sum(block.num_attention_heads for block in blocks) == 8
    assert all(block.all_head_size == block.query.out_features == 8 * block.num_attention_heads for block in blocks)


def test_a_transformer_encoder_without_some_heads_takes_a_padding_mask_in_inference(tmp_path: Path) -> None:
    model, inputs = build("encoder")
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        pruner = pruner_of(model, inputs, start=0, end=1)
        pruner.prune(epoch=0)
        pruner.remove()
        found = model.eval()(inputs, src_key_padding_mask=padding)
        save_pruned(model, tmp_path / "model.safetensors")
        loaded = load_pruned(build("encoder")[0], tmp_path / "model.safetensors").eval()
        assert torch.equal(found, loaded(inputs, src_key_padding_mask=padding))
        shorter = model(inputs[:1, :3])
    assert torch.allclose(found[:1, :3], shorter, atol=1e-6)


def test_channels_beside_heads_of_projections_that_the_block_computes_itself_are_counted() -> None:
    """torchvision's Swin calls its projections as functions: their MACs go with the stream and with the heads."""
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 4], [2, 2], num_classes=4).eval()
    images = torch.randn(1, 3, 16, 16)
    dense = count_macs(model, images)
    rule = {"pattern": {"type": "channel", "heads": True}, "target": {"macs": 0.5}, "start": 0, "end": 0}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=images)
    assert {"features.0.0", "features.1.0.attn"} <= set(pruner.masks)
    pruner.prune(model, 0)
    channels = pruner.channel_pruner
    assert round(channels.macs_cost(channels.keep_D)) == count_macs(model, images) <= 0.5 * dense
    assert count_macs(model, images) > 0.4 * dense


def swin(version: int) -> nn.Module:
    torch.manual_seed(0)
    made = torchvision.models.swin_transformer
    options = {"block": made.SwinTransformerBlockV2, "downsample_layer": made.PatchMergingV2} if version == 2 else {}
    return made.SwinTransformer([2, 2], 12, [1, 1], [2, 2], [2, 2], num_classes=3, **options).eval()


@pytest.mark.parametrize("version", [1, 2])
def test_a_stream_that_gets_narrower_leaves_the_heads_whole(version: int, tmp_path: Path) -> None:
    """Blocks whose code takes the width of all heads to be that of the inputs, where no head goes."""
    model, inputs = swin(version), torch.randn(1, 3, 16, 16)
    rule = {"pattern": {"type": "channel", "heads": True}, "target": {"sparsity": 0.5}, "start": 9}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs)
    masked: list[Tensor] = []
    pruner.before_removal = lambda: masked.append(model(inputs).detach())
    pruner.remove_channels({"features.0.0": [0, 1, 3]})
    assert pruner.report().masked == 0 and model.features[0][0].out_channels == 9
    torch.testing.assert_close(model(inputs), masked[0], rtol=0, atol=1e-5)
    save_pruned(model, tmp_path / "pruned.safetensors")
    loaded = load_pruned(swin(version), tmp_path / "pruned.safetensors")
    assert torch.equal(loaded(inputs), model(inputs))
