"""Checkpoints of any training, one in memory at a time: which files they are, and the tensors in one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import read_safetensors, read_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "ema", "training")
"""Keys under which trainers keep the state dict of the model; "training" is what our own runs write."""


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, in the order of the numbers in their names: ``epoch_2.pt`` before ``epoch_10.pt``.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise CheckpointError(f"{str(folder)!r} holds no checkpoint. Allowed: files that end in {', '.join(SUFFIXES)}")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A key that sorts the numbers in a name as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def epochs_of(paths: Sequence[Path]) -> list[int]:
    """The epoch of each checkpoint: the last number in its name, or its position where names have no such order."""
    numbers = [re.findall(r"\d+", path.stem) for path in paths]
    if all(numbers):
        last = [int(found[-1]) for found in numbers]
        if all(left < right for left, right in zip(last, last[1:], strict=False)):
            return last
    return list(range(len(paths)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; the tensors stay on the disk until they are read, where the format allows it.

    Weights that ``torch.nn.utils.prune`` keeps as ``NAME_orig`` and ``NAME_mask`` are multiplied.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    allowed = "whole files of torch.save or safetensors"
    whole = path.suffix == ".safetensors"
    values = read_safetensors(path, "", allowed)[0] if whole else read_torch(path, "", allowed, mapped=True)
    found = _inside(values)
    if found is None:
        raise CheckpointError(f"{str(path)!r} holds no state dict. Allowed: tensors by name, or under {NESTS}")
    return _masked(found)


def _inside(values: Any) -> dict[str, Tensor] | None:
    """The innermost mapping of names to tensors."""
    if not isinstance(values, Mapping):
        return None
    for key in NESTS:
        found = _inside(values.get(key))
        if found is not None:
            return found
    tensors = {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors if any("." in key or key.endswith(("weight", "_orig")) for key in tensors) else None


def _masked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        base = name.removesuffix("_orig")
        if base != name and f"{base}_mask" in weights:
            found[base] = value * weights[f"{base}_mask"]
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in weights):
            found[name] = value
    return found
