"""Dense values of masked weights that live on, kept aside while the parameters hold what the masks leave.

Shape suffixes: ``_W`` any weight, or this process's part of it.

Between two optimizer steps a parameter is 0 where it is masked, so whatever reads it (the forward pass, an evaluation,
an average, a checkpoint) sees the masked weights. Before a step the values kept aside are added, and after it they are
taken out again. Both are a few elementwise passes over the parameters with masks, without any index and without
waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pruningawaretraining.distributed.fsdp import local_of, part_of, whole_of
from pruningawaretraining.errors import CheckpointError, ConfigError


def check_optimizer(dynamic: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse steps in which masked weights cannot train on.

    Args:
        dynamic: its name.
        optimizer: what is about to step; None for one without step hooks.

    Raises:
        ConfigError: it names the dynamic.
    """
    if optimizer is None:
        raise ConfigError(
            f"dynamic: {dynamic} trains masked weights in the optimizer's step, and this optimizer has no step hooks. "
            "Allowed: a torch.optim.Optimizer, or dynamic: frozen"
        )


class DenseStore:
    """Holds, for every parameter with masks, where it is masked and the values that it would have there.

    Attributes:
        is_open: whether the parameters hold their dense values now.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._parameters: list[Tensor] = []
        self._masked: list[Tensor] = []  # 1 where masked, 0 elsewhere
        self._aside: list[Tensor] = []  # the dense value where masked, 0 elsewhere

    @torch.no_grad()
    def follow(self, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take new masks.

        Args:
            factors: parameters, each with a factor that broadcasts to its local part: 0 where masked, 1 elsewhere. A
                parameter with several factors is masked where any of them is 0.
        """
        keep: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter, factor in factors:
            known_W = keep.setdefault(id(parameter), (parameter, torch.ones_like(local_of(parameter).detach())))[1]
            known_W.mul_(factor.to(known_W.device, known_W.dtype))
        self._parameters = [parameter for parameter, _ in keep.values()]
        self._masked = [1 - keep_W for _, keep_W in keep.values()]
        self._aside = [torch.zeros_like(keep_W) for _, keep_W in keep.values()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the parameters, which are 0 where they are masked, hold their dense values."""
        self.is_open = True
        if self._parameters:
            self._move()
            torch._foreach_add_(self._locals(), self._aside)

    @torch.no_grad()
    def take_out(self) -> None:
        """Keep the values of masked entries aside; the parameters are to be masked after that."""
        self.is_open = False
        if self._parameters:
            self._move()
            torch._foreach_copy_(self._aside, self._locals())
            torch._foreach_mul_(self._aside, self._masked)

    @torch.no_grad()
    def pull(self, decay: float, optimizer: torch.optim.Optimizer) -> None:
        """Add ``decay`` times the dense value of masked entries to their gradient.

        Args:
            decay: the factor.
            optimizer: whose parameters are meant.
        """
        self._move()
        only = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        both = [
            (local_of(parameter.grad), aside_W)
            for parameter, aside_W in zip(self._parameters, self._aside, strict=True)
            if id(parameter) in only and parameter.grad is not None and parameter.grad.layout is torch.strided
        ]
        if both:
            decayed = torch._foreach_mul([aside_W for _, aside_W in both], decay)
            scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
            if scale is not None:
                decayed = torch._foreach_mul(decayed, scale)
            torch._foreach_add_([gradient_W for gradient_W, _ in both], decayed)

    def _locals(self) -> list[Tensor]:
        return [local_of(parameter).detach() for parameter in self._parameters]

    def _move(self) -> None:
        """Follow parameters that have been moved to another device or dtype."""
        for number, parameter in enumerate(self._parameters):
            aside_W = self._aside[number]
            if aside_W.device != parameter.device or aside_W.dtype is not parameter.dtype:
                self._aside[number] = aside_W.to(parameter.device, parameter.dtype)
                self._masked[number] = self._masked[number].to(parameter.device, parameter.dtype)

    # --- state --------------------------------------------------------------------------------------------------

    def packed(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """The dense values of masked entries, in the order of the weight, by name; of weights that are spread over
        processes gathered, so that each has to call it.

        Args:
            names: id of a parameter -> its name.
        """
        rows = zip(self._parameters, self._aside, self._masked, strict=True)
        return {
            names[id(one)]: whole_of(one, aside_W)[whole_of(one, masked_W) != 0].cpu().clone()
            for one, aside_W, masked_W in rows
        }

    @torch.no_grad()
    def load(self, packed: Mapping[str, Tensor], names: Mapping[int, str]) -> None:
        """Take the values that :meth:`packed` gave, for the same masks.

        Raises:
            CheckpointError: they are of other masks.
        """
        for parameter, aside_W, masked_W in zip(self._parameters, self._aside, self._masked, strict=True):
            name, chosen_W = names[id(parameter)], whole_of(parameter, masked_W) != 0
            values = packed.get(name)
            if values is None or values.numel() != int(chosen_W.sum()):
                raise CheckpointError(f"state: the dense values of {name} are not those of its masks")
            found_W = torch.zeros_like(chosen_W, dtype=aside_W.dtype)
            found_W.masked_scatter_(chosen_W, values.to(aside_W.device, aside_W.dtype))
            aside_W.copy_(part_of(parameter, found_W))
