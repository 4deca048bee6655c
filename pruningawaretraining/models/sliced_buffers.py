"""Buffers that no state dict has (``persistent=False``) and that a removal sliced: a file has to keep their values."""

from __future__ import annotations

from torch import Tensor, nn

from pruningawaretraining.models.surgery import Surgery

SLICED = "_pruned_buffers"
"""Where a module has the names of its buffers that are in no state dict and were sliced."""


def note_sliced(module: nn.Module, attribute: str, surgery: Surgery) -> None:
    """Remember that a buffer was sliced, if no state dict has it."""
    if attribute not in module._non_persistent_buffers_set:
        return
    before = tuple(vars(module).get(SLICED, ()))
    vars(module)[SLICED] = tuple(dict.fromkeys((*before, attribute)))
    surgery.when_undone(lambda: vars(module).update({SLICED: before}) if before else vars(module).pop(SLICED, None))


def sliced_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those buffers of a model, by their qualified names."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name in vars(module).get(SLICED, ())
        if (buffer := module._buffers.get(name)) is not None
    }
