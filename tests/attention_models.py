"""Small models with attention of every kind that heads are pruned in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pruningawaretraining.runtimes.exporter_choice import usual_exporter

IDS = torch.arange(14).reshape(2, 7) % 90
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 99, "use_cache": False}
TRACED_MASK = pytest.mark.skipif(usual_exporter() != "dynamo", reason="tracing fixes the batch in transformers' masks")
Built = tuple[nn.Module, Any]


def _hf(model: str, config: str, inputs: dict[str, Tensor], least: str = "4", **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        transformers = pytest.importorskip("transformers", least)
        return getattr(transformers, model)(getattr(transformers, config)(**options)), inputs

    return build


def _swin(block: str, merging: str) -> Callable[[], Built]:
    def build() -> Built:
        from torchvision.models import swin_transformer as swin

        kinds = {"block": getattr(swin, block), "downsample_layer": getattr(swin, merging)}
        model = swin.SwinTransformer(
            [2, 2], 16, [2, 2], [2, 4], [3, 4], num_classes=5, stochastic_depth_prob=0.0, **kinds
        )
        return model, IMAGES[:, :, :26, :30]

    return build


def _encoder() -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.linspace(-1, 1, 320).reshape(2, 5, 32)


def _translator() -> Built:
    inputs = torch.linspace(-1, 1, 320).reshape(2, 5, 32), torch.linspace(1, 0, 256).reshape(2, 4, 32)
    return nn.Transformer(32, 4, 1, 1, 48, batch_first=True), inputs


def _timm(name: str, **options: Any) -> Callable[[], Built]:
    return lambda: (timm.create_model(name, img_size=32, num_classes=5, **options), IMAGES)


MODELS: dict[str, Callable[[], Built]] = {
    "encoder": _encoder,
    "translator": _translator,
    "vision_transformer": lambda: (torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=5), IMAGES),
    "timm_vit": _timm("vit_tiny_patch16_224", patch_size=8, embed_dim=48, num_heads=4, depth=2),
    "timm_swin": _timm(
        "swin_tiny_patch4_window7_224", patch_size=2, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "swin_v1": _swin("SwinTransformerBlock", "PatchMerging"),
    "swin_v2": _swin("SwinTransformerBlockV2", "PatchMergingV2"),
    "bert": _hf("BertForSequenceClassification", "BertConfig", {"input_ids": IDS}, **TEXT),
    "distilbert": _hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", {"input_ids": IDS},
        vocab_size=99, dim=64, n_layers=2, n_heads=8, hidden_dim=96, least="5",
    ),
    "vit": _hf(
        "ViTForImageClassification", "ViTConfig", {"pixel_values": IMAGES}, **SMALL, image_size=32, patch_size=8
    ),
    "swin": _hf(
        "SwinForImageClassification", "SwinConfig", {"pixel_values": IMAGES},
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4,
    ),
    "gpt2": _hf(
        "GPT2LMHeadModel", "GPT2Config", {"input_ids": IDS},
        vocab_size=99, n_embd=64, n_layer=2, n_head=8, use_cache=False, bos_token_id=1, eos_token_id=2,
    ),
    "llama": _hf("LlamaForCausalLM", "LlamaConfig", {"input_ids": IDS}, **TEXT, num_key_value_heads=4),
    "qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", {"input_ids": IDS}, **TEXT, num_key_value_heads=2),
    "neox": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", {"input_ids": IDS}, **TEXT),
    "t5": _hf(
        "T5ForConditionalGeneration", "T5Config", {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        vocab_size=99, d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=8, use_cache=False,
    ),
    "whisper": _hf(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {"input_features": IMAGES[:, 0, :8, :20].contiguous(), "decoder_input_ids": IDS[:, :4]},
        vocab_size=99, num_mel_bins=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=96, decoder_ffn_dim=96, d_model=64, max_source_positions=10,
        max_target_positions=12, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    ),
}  # fmt: skip


def build(name: str) -> Built:
    """A model in eval mode and inputs for it; weights from a seed."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if not bool(parameter.any()):  # zero until it is trained: a classifier, a bias of positions
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs
