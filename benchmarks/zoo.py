"""Every architecture: groups, time to build them, the MAC target, and whether all checks hold after removal.

Each architecture runs in a process of its own with a time limit. It is built without weights, small where its config
allows, masked and removed to half of its MACs by magnitude, and then checked: the outputs of the masked and the removed
model, analytic against counted MACs, one training step, save and load. An architecture passes when all of them hold;
else the one line says why not. The difference in onnxruntime, or why there was no export, stands beside it.

    pip install timm transformers     # optional: their architectures are left out without them
    python benchmarks/zoo.py [--only NAME ...] [--limit 300] [--onnx torchscript] [--docs-only]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, markdown, save
from torch import Tensor, nn

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import PruningError
from pruningawaretraining.inputs import float_tensors_of, outputs_of

DOCS = Path(__file__).parent.parent / "docs" / "supported-models.md"
TARGET = 0.5
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {}  # name -> library, arguments, image size


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
_add("torchvision detection", 96, "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
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


def build(name: str) -> tuple[nn.Module, Any, Callable[..., Any] | None]:
    """The model without weights, its example inputs, and how to run it."""
    library, arguments, size = SIZES[name]
    torch.manual_seed(0)
    image = torch.randn(1, 3, size, size)
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, **arguments), image, None
    from torchvision import models

    if library == "torchvision":
        return models.get_model(name, weights=None, **arguments), image, None
    if library == "torchvision segmentation":
        return models.get_model(name, weights=None, weights_backbone=None), image, None
    model = models.get_model(name, weights=None, weights_backbone=None)
    return model, [torch.rand(3, size, size)], _detect


def _detect(model: nn.Module, images: list[Tensor]) -> Any:
    """The heads of a detector, before boxes are chosen (which depends on the values, not on the widths)."""
    found: Any = model
    batch, _ = found.transform(images)
    features = list(found.backbone(batch.tensors).values())
    return found.head(features)


def check(name: str, exporter: str) -> dict[str, Any]:
    """One row of the table; raises what goes wrong."""
    model, inputs, forward_fn = build(name)
    dense = count_macs(model, inputs, forward_fn)
    begun = time.process_time()
    config = {"rules": [{"target": {"macs": TARGET}, "start": 0, "final_sparsity": 0.9}]}
    pruner = Pruning(model, config, forward_fn, example_inputs=inputs)
    engine = pruner.engine
    row: dict[str, Any] = {
        "architecture": name,
        "library": SIZES[name][0],
        "sets": len(engine.dense_sets),
        "groups": len(engine.keep_D),
        "seconds to build": round(time.process_time() - begun, 2),
    }
    twin, _, _ = build(name)
    twin.load_state_dict(model.state_dict())
    pruner.prune(model, 0)
    row["MACs kept"] = round(count_macs(model, inputs, forward_fn) / dense, 4)
    row["masked - removed"] = f"{_difference(twin, config, model, inputs, forward_fn):.1e}"
    problems = []
    if not row["MACs kept"] <= TARGET + 5e-5:
        problems.append(f"{row['MACs kept']} of the MACs are kept")
    if pruner.macs.kept != count_macs(model, inputs, forward_fn):
        problems.append("analytic and counted MACs differ")
    problems += _reloaded(name, model, inputs, forward_fn)
    row["ONNX"] = _exported(model, inputs, exporter) if forward_fn is None else "not tried"
    problems += _trained(model, inputs, forward_fn)
    row["result"] = "; ".join(problems) or "pass"
    return row


def _difference(twin: nn.Module, config: Any, removed: nn.Module, inputs: Any, forward_fn: Any) -> float:
    """Largest difference of a masked copy's outputs to the removed model's, as a fraction of the outputs."""
    masked = Pruning(twin, config, forward_fn, example_inputs=inputs)
    engine = masked.engine
    engine.remove = lambda surroundings: None  # type: ignore[method-assign]  # the copy stays masked
    masked.prune(twin, 0)
    pairs = zip(outputs_of(twin, inputs, forward_fn), outputs_of(removed, inputs, forward_fn), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def _trained(model: nn.Module, inputs: Any, forward_fn: Any) -> list[str]:
    """One training step on a batch of two."""
    batch = torch.cat([inputs, inputs]) if isinstance(inputs, Tensor) else inputs
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    found = forward_fn(model, batch) if forward_fn is not None else model(batch)
    sum(tensor.float().square().mean() for tensor in float_tensors_of(found)).backward()
    optimizer.step()
    model.eval()
    return [] if all(bool(torch.isfinite(one).all()) for one in model.parameters()) else ["a step gives NaN"]


def _reloaded(name: str, model: nn.Module, inputs: Any, forward_fn: Any) -> list[str]:
    """Save, load into a fresh dense model, compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.safetensors"
        save_pruned(model, path)
        again = load_pruned(build(name)[0], path)
    pairs = zip(outputs_of(model, inputs, forward_fn), outputs_of(again, inputs, forward_fn), strict=True)
    same = all(bool(torch.equal(a, b)) for a, b in pairs)
    return [] if same else ["the reloaded model differs"]


def _exported(model: nn.Module, inputs: Any, exporter: str) -> str:
    """The ONNX model's difference, as a fraction of the output, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = export_onnx(model, inputs, Path(folder) / "m.onnx", exporter=exporter, dynamic_batch=False)
        except PruningError as error:
            return f"no: {str(error)[:120]}"
    return f"{result.relative_diff:.1e}"


def isolated(name: str, limit: float, exporter: str) -> dict[str, Any]:
    """A row, computed in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--onnx", exporter]
    row = {"architecture": name, "library": SIZES[name][0]}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**row, "result": f"longer than {limit:g} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {**row, "result": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def write_docs(rows: list[dict[str, Any]]) -> None:
    """docs/supported-models.md."""
    passed = sum(row["result"] == "pass" for row in rows)
    text = (__doc__ or "").partition("\n\n")[2].partition("\n\n    pip")[0]
    head = f"# Supported models\n\nWritten by `python benchmarks/zoo.py`. {passed} of {len(rows)} pass.\n\n{text}\n\n"
    DOCS.write_text(head + markdown(rows) + "\n")


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("--onnx", default="torchscript")
    parser.add_argument("--docs-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        print(json.dumps(check(arguments.one, arguments.onnx)))
        return
    path = RESULTS / "zoo.json"
    known = {row["architecture"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for name in [] if arguments.docs_only else arguments.only or SIZES:
        known[name] = isolated(name, arguments.limit, arguments.onnx)
        print(name, known[name]["result"], flush=True)
        rows = [known[one] for one in SIZES if one in known]
        save("zoo", rows, "Architectures", "See docs/supported-models.md.", "python benchmarks/zoo.py")
        write_docs(rows)


if __name__ == "__main__":
    main()
