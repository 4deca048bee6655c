"""The regularisers of active rules: on the gradients, in the loss, or on the weights after a step.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.config.options import acts_of, type_of
from pruningawaretraining.engine.coupled import CoupledGroups
from pruningawaretraining.engine.coupled_rules import CoupledRule
from pruningawaretraining.engine.weight_rules import WeightRule
from pruningawaretraining.engine.weights import WeightGroups
from pruningawaretraining.masks.penalties import Regularizer, prepare
from pruningawaretraining.registry import build, calling, check_returned


class ActivePenalties:
    """Prepares the regularisers of a model's rules once, and applies them while the rules work.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forget()

    def forget(self) -> None:
        """Groups or tensors have changed: prepare again at the next use."""
        self._prepared: list[tuple[CoupledRule, Any, Regularizer, Tensor]] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # for each regulariser: all masks, and its own
        self._inside: dict[str, tuple[str, Any]] = {}  # rule inside layers -> where it acts, and it

    def of_gradients(self, coupled: CoupledGroups) -> list[tuple[Regularizer, Tensor]]:
        """Each regulariser of the gradients whose rule works, with its factors at these weights; not while a
        member is fine-tuned."""
        found = []
        for one, options, ready, mine_G in self._ready(coupled):
            if one.works and not one.state.holds and ready.acts:
                keep_G = self._keep_for(coupled, ready, mine_G) if coupled.masks.active else None
                with calling(
                    "regularizer", options, f"a vector of {len(ready.strength_G)} factors, one for each group"
                ):
                    factor_G = ready.factors(keep_G)
                found.append((ready, factor_G))
        return found

    def _ready(self, coupled: CoupledGroups) -> list[tuple[CoupledRule, Any, Regularizer, Tensor]]:
        if self._prepared is None:
            self._prepared, self._kept = [], {}
            saving_G = coupled.macs_cost.saving_G(coupled.keep_D)[coupled.live_D]
            for one in coupled.rules:
                if one.rule.regularizer is not None and one.rule.enabled:
                    mine_G = torch.nonzero(torch.isin(coupled.live_D, one.groups_D)).flatten()
                    options = build("regularizer", one.rule.regularizer, f"{one.key}.regularizer")
                    grouping = coupled.found.grouping.select_sets(one.sets)
                    self._prepared.append((one, options, prepare(options, grouping, saving_G[mine_G]), mine_G))
        return self._prepared

    def _keep_for(self, coupled: CoupledGroups, ready: Regularizer, mine_G: Tensor) -> Tensor:
        keep_G = coupled.masks.keep_on(ready.index.device)
        if len(mine_G) == len(keep_G):
            return keep_G
        known = self._kept.get(id(ready))
        if known is None or known[0] is not keep_G:
            known = self._kept[id(ready)] = (keep_G, keep_G[mine_G.to(keep_G.device)])
        return known[1]

    def of_loss(self, weights: WeightGroups | None) -> Tensor:
        """The differentiable penalty of every rule that has one and works; 0 without any."""
        total = torch.zeros((), device=next((p.device for p in self.model.parameters()), torch.device("cpu")))
        for one, options in self._acting(weights, "loss"):
            expected = "a tensor with one real number"
            with calling("regularizer", options, expected):
                penalty = options.penalty(one.grouping)
            good = isinstance(penalty, Tensor) and penalty.numel() == 1 and penalty.is_floating_point()
            check_returned(good and penalty.device.type != "meta", "regularizer", options, penalty, expected)
            total = total + penalty.reshape(()).to(total.device)
        return total

    def shrink(
        self, weights: WeightGroups, fresh: Tensor | int, rates: Callable[[], Mapping[int, Tensor | float]]
    ) -> None:
        """Shrink weights after a step, by each parameter's learning rate.

        Args:
            weights: the groups.
            fresh: 1 if the optimizer's step makes a real step, else 0.
            rates: gives learning rates by the ids of parameters.
        """
        shrinking = list(self._acting(weights, "weights"))
        if not shrinking or not (isinstance(fresh, Tensor) or fresh):
            return
        rate = rates()
        for one, options in shrinking:
            with calling("regularizer", options, "nothing: it changes the weights"):
                options.after_step(one.grouping, lambda parameter: rate.get(id(parameter), 0.0) * fresh)

    def _acting(self, weights: WeightGroups | None, acts: str) -> Iterator[tuple[WeightRule, Any]]:
        """The regularisers that act there, of rules that work."""
        for one in () if weights is None else weights.rules:
            spec = one.rule.regularizer
            if spec is None or not one.works:
                continue
            if one.key not in self._inside:
                options = build("regularizer", spec, f"{one.key}.regularizer")
                self._inside[one.key] = acts_of(type_of("regularizer", spec)), options
            where, options = self._inside[one.key]
            if where == acts:
                yield one, options
