"""Hooks that replace the output of modules which mix channels, while some of these are masked.

Shape suffixes: ``_C`` channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruningawaretraining.models.surgery import Surgery


class KeptNorm:
    """Forward hook: a norm whose statistics are those of the kept channels, and whose output is 0 elsewhere.

    It only multiplies, so that compiled code stays the same whichever and however many channels are kept.

    Args:
        channels: how many there are.
        device: where they are.

    Attributes:
        keep_C: for each channel, 1 if it is kept, else 0; changed in place.
        saved, behind: see :class:`pruningawaretraining.models.kept_hooks.KeptHook`.
    """

    saved = False
    behind = 0

    def __init__(self, channels: int, device: torch.device) -> None:
        self.keep_C = torch.ones(channels, device=device)

    def take(self, keep_C: Tensor, device: torch.device) -> None:
        """Take new masks, in place."""
        self.keep_C.copy_(keep_C)

    def known(self) -> Tensor | None:
        """Which channels are kept, on the CPU; None before it was told."""
        return self.keep_C.detach().cpu() > 0

    def narrow(self, keep_C: Tensor, surgery: Surgery) -> None:
        """Know of these channels alone."""
        surgery.set_attribute(self, "keep_C", self.keep_C[keep_C.to(self.keep_C.device)])

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output in place of the module's own."""
        raise NotImplementedError

    def _keep(self, x: Tensor) -> Tensor:
        if self.keep_C.device != x.device:
            self.keep_C = self.keep_C.to(x.device)
        return self.keep_C
