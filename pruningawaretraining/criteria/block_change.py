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
from pruningawaretraining.distributed.collectives import totals, world_size
from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import in_backward, is_probing
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


class BlockChangeCollector:
    """Means of ``1 - cos`` over the inputs of blocks.

    With several processes each sees its own part of a batch. Their statistics are combined at events.

    Args:
        in_eval: see :class:`BlockChange`.
    """

    def __init__(self, in_eval: bool = True) -> None:
        self.in_eval = in_eval
        self.own: dict[str, Tensor] = {}  # sum and number of changes: of this process, since the last event
        self.common: dict[str, Tensor] = {}  # of all processes, up to then
        self._names: list[str] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """Put a forward hook on every block.

        Raises:
            ConfigError: the groups are no blocks.
        """
        self.detach()
        self._names, modules = block_names(grouping), dict(model.named_modules())
        for name in self._names:
            hook = _ChangeHook(partial(self._see, name))
            self._handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if not (module.training or self.in_eval) or x.numel() == 0 or is_probing() or in_backward():
            return
        dim = _channel_dim(module, x)
        change = 1.0 - functional.cosine_similarity(x.float(), y.float(), dim=dim)
        seen = torch.stack([change.sum().double(), change.new_full((), change.numel(), dtype=torch.float64)])
        known = self.own.get(name)
        self.own[name] = seen if known is None else known.to(seen.device).add_(seen)

    def agree(self) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`: one flat all-reduce of two numbers a block."""
        if world_size() == 1 or not self._names:
            return
        none = torch.zeros(2, dtype=torch.float64)
        rows = totals([self.own.get(name, none) for name in self._names])
        self.common = {
            name: self.common.get(name, none).to(row.device) + row for name, row in zip(self._names, rows, strict=True)
        }
        self.own = {}

    def _all(self) -> dict[str, Tensor]:
        """Statistics of every block that has been called."""
        found = dict(self.common)
        for name, own in self.own.items():
            found[name] = own + found[name].to(own.device) if name in found else own
        return {name: row for name, row in found.items() if float(row[1]) > 0}

    def on_before_step(self, grouping: Grouping, scale: Tensor | float = 1.0) -> None:
        """Do nothing before a step."""

    def tensors(self) -> dict[str, Tensor]:
        """``block_change.NAME`` of every block."""
        known = self._all()
        return {f"{CHANGE}.{name}": row[0] / row[1] for name, row in known.items()}

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Drop what belongs to removed blocks."""
        self._names = block_names(grouping)
        self.own = {name: row for name, row in self.own.items() if name in self._names}
        self.common = {name: row for name, row in self.common.items() if name in self._names}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data: of all processes up to the last event, and of this one since then."""
        return {name: row.clone() for name, row in self._all().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~pruningawaretraining.criteria.base.Collector`."""
        unknown = sorted(set(state) - set(self._names))
        if unknown and self._names:
            raise CheckpointError(f"state: changes of {unknown[0]!r}, which is not a remaining block")
        loaded = {name: row.clone() for name, row in state.items()}
        self.own, self.common = (loaded, {}) if world_size() == 1 else ({}, loaded)


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
