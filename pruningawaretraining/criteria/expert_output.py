"""Criterion of experts: what they add to the tokens that are routed to them.

Shape suffixes: ``_E`` experts of a block, ``_T`` tokens, one for each expert that they are routed to, ``_TH`` their
features, ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.running_sums import RunningSums
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.patterns.expert import is_of_experts
from pruningawaretraining.registry import lookup, register

OUTPUT = "expert_output"


@register("criterion", "reap", "expert_output")
@dataclass(frozen=True)
class Reap:
    """Router weight times the norm of the expert's output, the mean over the tokens that are routed to it (Lasby et al.
    2025, REAP). An expert that no token is routed to scores 0. For the pattern `expert` alone.

    While it listens, the experts of a block compute twice: their outputs are seen nowhere but in their sum.

    Args:
        normalize: by the "mean" or "max" of the block, so that blocks compare, or "none".
        in_eval: listen in eval mode too (calibration), not only while training.
    """

    needs: ClassVar[Needs] = Needs(kinds=("expert",))

    normalize: str = "mean"
    in_eval: bool = True

    def __post_init__(self) -> None:
        lookup("normalizer", self.normalize, "normalize")

    def collector(self) -> ExpertOutputCollector:
        """A new collector."""
        return ExpertOutputCollector(self.in_eval)

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """See :class:`~pruningawaretraining.criteria.base.Criterion`.

        Raises:
            ConfigError: the groups are something else.
        """
        sizes = {name: shape[1] for name, shape in sums_of(grouping).items()}
        known = [statistics.tensors.get(f"{OUTPUT}.{name}", torch.zeros(size)) for name, size in sizes.items()]
        scores_G = torch.cat([one.cpu().double() for one in known])
        normalize: Callable[[Tensor, Grouping], Tensor] = lookup("normalizer", self.normalize)
        return normalize(scores_G, grouping)


def sums_of(grouping: Grouping) -> dict[str, tuple[int, int]]:
    """Block -> the shape of its sums: of what each expert put out, and of how many tokens it did.

    Raises:
        ConfigError: the groups are something else.
    """
    if not all(is_of_experts(one) for one in grouping.sets):
        raise ConfigError("criterion: 'reap' scores experts. Allowed: with 'expert'")
    return {one.name: (2, one.size) for one in grouping.sets}


class ExpertOutputCollector(RunningSums):
    """Sums of router weight times output norm over the tokens of each expert, and how many tokens there were."""

    def __init__(self, in_eval: bool = True) -> None:
        super().__init__(in_eval)
        self._weights: dict[str, str] = {}

    def attach(self, model: nn.Module, grouping: Grouping) -> None:
        """See :class:`RunningSums`."""
        self._weights = {one.name: one.layers[-1] for one in grouping.sets}
        super().attach(model, grouping)

    def shapes_of(self, grouping: Grouping) -> dict[str, tuple[int, ...]]:
        """See :class:`RunningSums`."""
        return dict(sums_of(grouping))

    def hook(self, model: nn.Module, name: str) -> RemovableHandle:
        """Listen to what the experts of a block are given."""
        hook = _RoutingHook(partial(self._see, name))
        return model.get_submodule(self._weights[name]).register_forward_hook(hook, with_kwargs=True)

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if not self.listens(module):
            return
        tokens, chosen, weights = _routing(name, given)
        index_T, weight_T = chosen.reshape(-1), weights.reshape(-1).double()
        tokens_TH = tokens.reshape(-1, tokens.shape[-1]).repeat_interleave(chosen.shape[-1], 0)
        outputs_TH = module.forward(tokens_TH, index_T[:, None], torch.ones_like(weights).reshape(-1, 1))
        norm_T = outputs_TH.reshape(len(index_T), -1).float().norm(dim=-1).double()
        seen = torch.zeros(self.shapes[name], dtype=torch.float64, device=index_T.device)
        seen[0].index_add_(0, index_T, weight_T * norm_T)
        seen[1].index_add_(0, index_T, torch.ones_like(weight_T))
        self.add(name, seen)

    def tensors(self) -> dict[str, Tensor]:
        """``expert_output.NAME``: for each expert of a block the mean over its tokens, 0 without any."""
        return {f"{OUTPUT}.{name}": row[0] / row[1].clamp(min=1) for name, row in self.all().items()}

    def restrict(self, grouping: Grouping, keep_G: Tensor) -> None:
        """Drop what belongs to removed experts."""
        parts = torch.split(keep_G.cpu(), [shape[1] for shape in self.shapes.values()])
        for sums in (self.own, self.common):
            for name, keep_E in zip(self.shapes, parts, strict=True):
                if name in sums:
                    sums[name] = sums[name][:, keep_E.to(sums[name].device)]
        self.shapes = self.shapes_of(grouping)


def _routing(name: str, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the numbers of the experts that they are routed to, and the weights of these.

    Raises:
        ModelError: the experts are given something else.
    """
    tensors = [one for one in given if isinstance(one, Tensor)]
    numbers = [one for one in tensors if not one.is_floating_point()]
    others = [one for one in tensors if one.is_floating_point()]
    if len(numbers) != 1 or len(others) != 2 or numbers[0].shape != others[1].shape:
        shapes = ", ".join(f"{tuple(one.shape)} {one.dtype}" for one in tensors)
        raise ModelError(
            f"{name}: its experts are given {shapes or 'no tensor'}. 'reap' needs experts that are given "
            "tokens, numbers of experts, and weights of these shapes. Allowed: another criterion, such as magnitude"
        )
    return others[0], numbers[0], others[1]


class _RoutingHook:
    """Forward hook that shows what experts are given; a copy or a saved model keeps one that does nothing."""

    def __init__(self, see: Callable[[nn.Module, tuple[Any, ...]], None] | None = None) -> None:
        self.see = see

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.see is not None:
            self.see(module, (*args, *kwargs.values()))

    def __reduce__(self) -> tuple[type[_RoutingHook], tuple[()]]:
        return _RoutingHook, ()
