"""Criterion of whole blocks: the change of their input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.running_sums import RunningSums
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.skipped_blocks import input_of
from pruningawaretraining.patterns.depth import is_of_blocks
from pruningawaretraining.registry import register

CHANGE = "block_change"


@register("criterion", "block_change", "block_influence")
@dataclass(frozen=True)
class BlockChange:
    """``1 - cos(x, y)`` of a residual block's input and output, the mean over positions (Men et al. 2024, ShortGPT).

    For the pattern `depth` alone.

    Args:
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    needs: ClassVar[Needs] = Needs(kinds=("block",))

    in_eval: bool = True

    def collector(self) -> BlockChangeCollector:
        """A new collector."""
        return BlockChangeCollector(self.in_eval)

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`.

        Raises:
            ConfigError: the groups are no blocks.
        """
        names = block_names(grouping)
        return torch.stack([statistics.tensors[f"{CHANGE}.{name}"].cpu() for name in names])


def block_names(grouping: Grouping) -> list[str]:
    """The block that each group is.

    Raises:
        ConfigError: the groups are something else.
    """
    if not all(is_of_blocks(one) for one in grouping.sets):
        raise ConfigError("criterion: 'block_change' scores whole blocks. Allowed: with 'depth'")
    return [name for one in grouping.sets for name in one.layers]


class BlockChangeCollector(RunningSums):
    """Sums of ``1 - cos`` over the inputs of blocks, and how many inputs there were."""

    def shapes_of(self, grouping: Grouping) -> dict[str, tuple[int, ...]]:
        """See :class:`RunningSums`."""
        return dict.fromkeys(block_names(grouping), (2,))

    def hook(self, model: nn.Module, name: str) -> RemovableHandle:
        """See :class:`RunningSums`."""
        hook = _ChangeHook(partial(self._see, name))
        return model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if x.numel() == 0 or not self.listens(module):
            return
        dim = _channel_dim(module, x)
        change = 1.0 - functional.cosine_similarity(x.float(), y.float(), dim=dim)
        count = change.new_full((), change.numel(), dtype=torch.float64)
        self.add(name, torch.stack([change.sum().double(), count]))

    def all(self) -> dict[str, Tensor]:
        """The sums of every block that has been called."""
        return {name: row for name, row in super().all().items() if float(row[1]) > 0}

    def tensors(self) -> dict[str, Tensor]:
        """``block_change.NAME`` of every block."""
        return {f"{CHANGE}.{name}": row[0] / row[1] for name, row in self.all().items()}

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Drop what belongs to removed blocks."""
        self.shapes = self.shapes_of(grouping)
        self.own = {name: row for name, row in self.own.items() if name in self.shapes}
        self.common = {name: row for name, row in self.common.items() if name in self.shapes}


class _ChangeHook:
    """Forward hook that shows a block's input and output; a copy or a saved model keeps one that does nothing."""

    def __init__(self, see: Any = None) -> None:
        self.see = see

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.see is not None:
            self.see(module, input_of(args, kwargs), output[0] if isinstance(output, tuple) else output)

    def __reduce__(self) -> tuple[type[_ChangeHook], tuple[()]]:
        return _ChangeHook, ()


def _channel_dim(module: nn.Module, x: Tensor) -> int:
    """The dimension of features: the second of images in a convolutional block, the last of anything else."""
    convolves = any(isinstance(one, nn.modules.conv._ConvNd) for one in module.modules())
    return 1 if convolves and x.dim() > 2 else -1
