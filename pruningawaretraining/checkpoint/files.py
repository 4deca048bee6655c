"""Files of pruned models: safetensors with a JSON description, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pruningawaretraining.checkpoint.records import check_record
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import BROKEN, parse_json, read_safetensors
from pruningawaretraining.patterns.projections import HEADS, KEY_VALUE_HEADS, REPETITIONS, WIDTHS

KEY = "pruningawaretraining"
ATTRIBUTES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "normalized_shape", "num_parameters", "embedding_dim", "embed_dim", "head_dim", "hidden_dim", "attention_head_size",
    "hidden_size", "input_size", "intermediate_size", "kdim", "vdim", "nf", "nx",
    *HEADS, *KEY_VALUE_HEADS, *REPETITIONS, *WIDTHS,
)  # fmt: skip
"""Attributes of layers that follow a removal."""

PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def write_file(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    """safetensors' own writer, but equal contents give equal bytes: it leaves the order of the metadata to chance."""
    save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(written) <= size:
            file.seek(8)
            file.write(written.ljust(size))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file of ``save_pruned``.

    Raises:
        CheckpointError: there is no such file, it is truncated, or it is not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"path: there is no file {str(path)!r}")
    try:
        tensors, metadata = read_safetensors(path, "path", "a whole file of save_pruned")
    except CheckpointError as error:
        if path.suffix not in PYTORCH_SUFFIXES:
            raise
        raise CheckpointError(
            f"path: {str(path)!r} was not written by save_pruned; for a state dict of torch.save use "
            "load_state_dict_pruned(model, torch.load(path, weights_only=True))"
        ) from error
    if KEY not in metadata:
        raise CheckpointError(f"path: {str(path)!r} was not written by save_pruned; use load_state_dict_pruned for it")
    description = parse_json(metadata[KEY], path, "path: its description")
    try:
        tensors.update({alias: tensors[name] for alias, name in description["aliases"].items()})
        for attributes in description["modules"].values():
            if not attributes.keys() <= set(ATTRIBUTES) or not all(map(_is_width, attributes.values())):
                raise ValueError(f"{attributes} are no widths")
        for attributes in description.setdefault("counted", {}).values():
            if not all(map(_is_name, attributes)) or not all(map(_is_width, attributes.values())):
                raise ValueError(f"{attributes} are no widths")
        if not all(map(_is_number, description.setdefault("passed", {}).values())):
            raise ValueError(f"{description['passed']} are no blocks")
        if not all(map(_is_mask, description.setdefault("masked", {}).values())):
            raise ValueError(f"{description['masked']} are no masks")
        if not all(isinstance(one, str) for one in description.setdefault("buffers", [])):
            raise ValueError(f"{description['buffers']} are no names of buffers")
        description["record"].keys()
        check_record(description["record"])
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"path: the description in {str(path)!r} is damaged: {reason}") from error
    return tensors, description


def _is_name(value: Any) -> bool:
    """Whether a text may be the name of an attribute of a user's module."""
    return isinstance(value, str) and value.isidentifier() and not value.startswith("_")


def _is_mask(value: Any) -> bool:
    """Whether a value of a description says which entries of a module are kept."""
    size, kept = value["size"], value["kept"]
    numbers = all(map(_is_number, (size, value["behind"], *kept))) and value["behind"] >= 0
    inside = numbers and 0 < len(kept) <= size and all(0 <= one < size for one in kept)
    return value["of"] in ("channels", "experts", "reductions") and inside


def _is_width(value: Any) -> bool:
    """Whether a value of a description is one number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
