"""ultralytics: a YOLOv8n that finds rectangles loses half of its MACs while it is trained, on images made on the spot.

pip install 'pruningawaretraining[ultralytics]'
python examples/yolo_rectangles.py --dense                       # the control: the same training without pruning
python examples/yolo_rectangles.py
python examples/yolo_rectangles.py --resume                      # goes on from the last checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from ultralytics import YOLO

from pruningawaretraining.integrations.ultralytics import PruningCallback

RULE = {
    "regularizer": {"type": "growing_l2", "strength": 1e-3},
    "start": 5, "end": 30, "target": {"macs": 0.5}, "exclude": [r"re:model\.22\..*"],
}  # fmt: skip
NAMES = ("red", "green")


def make_images(folder: Path, size: int, counts: dict[str, int]) -> Path:
    """Write images with one to three rectangles each, in two colours on noise, as ultralytics reads them."""
    source, half = torch.Generator().manual_seed(0), size // 2
    for part, count in counts.items():
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, lines = torch.rand(size, size, 3, generator=source) * 80, []
            for cell in torch.randperm(4, generator=source)[: 1 + number % 3].tolist():  # quarters: none covers another
                width, height = torch.randint(size // 8, half, (2,), generator=source).tolist()
                room = torch.rand(2, generator=source) * torch.tensor([half - width, half - height])
                left, top = int(room[0]) + cell % 2 * half, int(room[1]) + cell // 2 * half
                colour = int(torch.randint(0, 2, (), generator=source))
                image[top : top + height, left : left + width, colour] = 200.0
                box = (left + width / 2, top + height / 2, width, height)
                lines.append(" ".join([str(colour), *(f"{one / size:.5f}" for one in box)]))
            Image.fromarray(image.to(torch.uint8).numpy()).save(folder / "images" / part / f"{number}.png")
            (folder / "labels" / part / f"{number}.txt").write_text("\n".join(lines) + "\n")
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(NAMES))
    path = folder / "data.yaml"
    path.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return path


def main(arguments: list[str] | None = None) -> Any:
    """Parse, train, measure, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=160, help="side of the images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--dense", action="store_true", help="train without pruning, to compare")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/yolo"))
    args = parser.parse_args(arguments)
    name = "dense" if args.dense else "pruned"
    weights = args.out / name / "weights"
    model = YOLO(str(weights / "last.pt") if args.resume else "yolov8n.yaml")
    options: dict[str, Any] = {
        "data": str(make_images(args.out / "data", args.size, {"train": args.images, "val": args.images // 2})),
        "epochs": args.epochs, "imgsz": args.size, "batch": 8, "nbs": 8, "seed": args.seed, "workers": 0,
        "project": str(args.out.resolve()), "name": name, "exist_ok": True, "plots": False, "amp": False,
    }  # fmt: skip
    callback = None if args.dense else PruningCallback({"rules": [RULE]}).add_to(model)
    if args.resume:
        options = {"resume": True}
        if callback is not None:
            options["trainer"] = callback.trainer(model)
    model.train(**options)
    best = YOLO(str(weights / "best.pt"))
    found = best.val(data=str(args.out / "data" / "data.yaml"), imgsz=args.size, plots=False).box.map
    macs = 1.0 if callback is None else callback.pruner.macs.fraction
    print(f"{name}: mAP50-95 {found:.4f}, {macs:.4f} of the MACs, {best.export(format='onnx', imgsz=args.size)}")
    return callback


if __name__ == "__main__":
    main()
