"""The architectures of zoo.py: names, and how each is built without weights, small where its config allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, tuple[str, dict[str, Any], int]] = {}  # name -> library, arguments, image size
Built = tuple[nn.Module, Any, Callable[..., Any] | None]


def _add(library: str, size: int, *names: str, **arguments: Any) -> None:
    SIZES.update(dict.fromkeys(names, (library, arguments, size)))


_add("torchvision", 64, "alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
_add("torchvision", 64, "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "squeezenet1_1")
_add("torchvision", 64, "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "regnet_x_400mf", "densenet121")
_add("torchvision", 64, "shufflenet_v2_x0_5", "convnext_tiny", "googlenet")
_add("torchvision", 299, "inception_v3")
_add("torchvision", 64, "swin_t", "swin_v2_t")
_add("torchvision", 224, "vit_b_32", "maxvit_t")
_add("torchvision segmentation", 64, "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large")
_add("torchvision segmentation", 64, "lraspp_mobilenet_v3_large")
_add("torchvision detection", 128, "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
_add(
    "timm",
    64,
    "resnet26d",
    "resnet50d",
    "seresnet50",
    "ecaresnet50d",
    "skresnet18",
    "res2net50_26w_4s",
    "hrnet_w18_small",
)
_add("timm", 64, "regnetx_002", "regnety_002", "efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small")
_add("timm", 160, "inception_v4")
_add("timm", 64, "ghostnet_100", "dla34", "cspresnet50", "cspdarknet53", "darknet53", "repvgg_a0", "convnextv2_atto")
_add("timm", 64, "convmixer_768_32", "edgenext_xx_small", "fastvit_t8", "poolformer_s12", "mobileone_s0", "rexnet_100")
_add("timm", 64, "tf_efficientnetv2_b0", "nf_resnet26", "resnetv2_50", "dpn68", "xception41", "vovnet39a")
_add(
    "timm",
    224,
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "mixer_s32_224",
    "pvt_v2_b0",
    "swin_tiny_patch4_window7_224",
)
_add(
    "timm",
    224,
    "mobilevit_xxs",
    "levit_128s",
    "coatnet_nano_rw_224",
    "visformer_tiny",
    "cait_xxs24_224",
    "beit_base_patch16_224",
)


IDS = torch.arange(14).reshape(1, 14) % 90
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).sin()
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96}
TEXT = {**ENCODER, "vocab_size": 99}
DECODER = {**TEXT, "use_cache": False}
PATCHES = {**ENCODER, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "use_cache": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
TOKENS = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
PIXELS = {"pixel_values": IMAGE}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, TOKENS),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, TOKENS),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT, TOKENS),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 32}, TOKENS),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 8, "hidden_dim": 96}, TOKENS,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", PATCHES, PIXELS),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PATCHES, PIXELS),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", PATCHES, PIXELS),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        PIXELS,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
            "num_attention_heads": [2, 4], "decoder_hidden_size": 32, "patch_sizes": [7, 3], "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        PIXELS,
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {
            "vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 8, "use_cache": False, "bos_token_id": 1,
            "eos_token_id": 2,
        },
        TOKENS,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER, TOKENS),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {
            "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "ffn_dim": 96,
            "word_embed_proj_dim": 64, "use_cache": False,
        },
        TOKENS,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_key_value_heads": 4}, TOKENS),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "num_key_value_heads": 4}, TOKENS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "num_key_value_heads": 2}, TOKENS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "num_key_value_heads": 2, "head_dim": 16}, TOKENS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "num_key_value_heads": 4, "head_dim": 16}, TOKENS),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**DECODER, "num_key_value_heads": 2, "pad_token_id": 0}, TOKENS),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {
            "vocab_size": 99, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 8,
            "use_cache": False,
        },
        BOTH,
    ),
    "bart": ("BartModel", "BartConfig", SEQ2SEQ, BOTH),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
        {"input_features": IMAGE[:, 0, :8, :20].contiguous(), "decoder_input_ids": IDS[:, :6]},
    ),
}  # fmt: skip
_add("transformers", 0, *TRANSFORMERS)


def build(name: str) -> Built:
    """The model without weights, its example inputs, and how to run it."""
    library, arguments, size = SIZES[name]
    torch.manual_seed(0)
    if library == "transformers":
        import transformers

        model_class, config_class, options, inputs = TRANSFORMERS[name]
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**options)), inputs, None
    image = torch.randn(1, 3, size, size)
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, **arguments), image, None
    from torchvision import models

    if library == "torchvision":
        return models.get_model(name, weights=None, **arguments), image, None
    if library == "torchvision segmentation":
        return models.get_model(name, weights=None, weights_backbone=None), image, None
    return models.get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, size, size), _detect


def _detect(model: nn.Module, images: Tensor) -> Any:
    """The heads of a detector, before boxes are chosen (which depends on the values, not on the widths)."""
    found: Any = model
    return found.head(list(found.backbone(images).values()))
