"""Attachments: parts of a model, beside the tensors that the groups index, that depend on which groups there are.

Shape suffixes: ``_G`` groups, ``_G1`` groups and one more for "outside", ``_N`` entries of a part.

A norm takes statistics over its channels, an attention block knows how many heads it has, an attribute counts channels,
a residual block goes as a whole. Each kind is one :class:`Attachment`; nothing else has to know which kinds there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pruningawaretraining.models.surgery import Surgery

OwnType = TypeVar("OwnType", bound="Attachment")


class MaskHooks(Protocol):
    """Hooks of one model that let its modules know which groups are masked."""

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        """Take new masks (on the CPU); ``device`` is where the masked weights lie."""

    def release(self) -> None:
        """Take every hook out."""


@dataclass(frozen=True, eq=False)
class OwnCost:
    """The cost of a module beside the layers that the groups index, in proportion to the groups that it keeps.

    Args:
        module: its name.
        groups_N: the group of each of its entries.
        inner: whether layers inside the module that the groups do not index count too.
    """

    module: str
    groups_N: Tensor
    inner: bool = False


@dataclass(frozen=True, eq=False)
class Attachment:
    """Parts of one kind. By default masks and removals do not change them, and they cost nothing themselves.

    Args:
        groups: name of a part -> the group of each of its entries (the number of groups for none).
    """

    groups: Mapping[str, Tensor]

    def renumber(self: OwnType, number_G1: Tensor, size: int) -> OwnType:
        """The parts that are left where the groups are numbered anew.

        Args:
            number_G1: the new number of each group; -1 for those that are gone, ``size`` for outside.
            size: how many groups there are then.
        """
        found = {name: renumbered(groups, number_G1) for name, groups in self.groups.items()}
        return replace(self, groups={name: groups for name, groups in found.items() if bool((groups < size).any())})

    def kept(self, keep_G: Tensor) -> dict[str, Tensor]:
        """For each part, which of its entries are kept, on the CPU."""
        keep_G1 = torch.cat([keep_G.cpu().bool(), torch.ones(1, dtype=torch.bool)])
        return {name: keep_G1[groups.cpu()] for name, groups in self.groups.items()}

    def hooks(self, model: nn.Module) -> MaskHooks | None:
        """Hooks that make a masked model compute what the removed one will; None if zeros do that already."""
        return None

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> Collection[nn.Parameter]:
        """Change the parts of a model, or of a copy, whose tensors have been sliced.

        Returns:
            The parameters that the model no longer has, beside those that were sliced.
        """
        return ()

    def taken_out(self, keep_G: Tensor) -> Collection[str]:
        """Modules that leave the model as a whole, with all their tensors."""
        return ()

    def costs(self) -> Iterable[OwnCost]:
        """The costs of the parts' own computations."""
        return ()

    def graph_problem(self, model: nn.Module) -> str:
        """Why an exported graph of the model cannot be masked, and what is allowed; "" if it can."""
        return ""


def renumbered(groups: Tensor, number_G1: Tensor) -> Tensor:
    """New numbers of groups, without those that are gone (see :meth:`Attachment.renumber`); dimensions of 1 stay."""
    numbers = number_G1[groups.cpu()]
    return numbers[numbers >= 0].reshape(-1, *groups.shape[1:])
