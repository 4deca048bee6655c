"""PruneOptimizer: sparsity by proximal steps around any optimizer.

The model's weights are the proximal image of latent weights. Gradients are taken at the weights, the base optimizer
updates the latents, and the latents are never shrunk (dual averaging): the threshold grows with gamma, the sum of
learning rates since the warm-up. (Xiao 2010, "Dual averaging methods for regularized stochastic learning and online
optimization".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pruningawaretraining.errors import ConfigError
from pruningawaretraining.proximal.coupled import CoupledGrouper
from pruningawaretraining.proximal.healing import hold_ranks, mask_base_state, mask_gradients, mask_of, mask_weights
from pruningawaretraining.proximal.latent import (
    CopyIn,
    LatentBinding,
    ParamSlot,
    Redirect,
    copy_all,
    give_own,
    latents_of,
    take_own,
)
from pruningawaretraining.proximal.low_rank import Factors, SpectralGrouper
from pruningawaretraining.proximal.metrics import Reached, measure, weight_factors, weight_sparsity
from pruningawaretraining.proximal.options import gamma_key
from pruningawaretraining.proximal.plans import NormPlan
from pruningawaretraining.proximal.prox_groups import ParamGroup, Plan, Unit
from pruningawaretraining.proximal.spectral_plan import SpectralPlan
from pruningawaretraining.proximal.wrapper import Wrapper

Closure = Callable[[], Any]
Work: TypeAlias = tuple[Unit, list[ParamSlot], list[Tensor]]
"""A unit with the weights that take part in a step, and their latents."""


class PruneOptimizer(Wrapper):
    """Wraps an optimizer whose param groups say how to prune.

    A param group with a ``prox_type`` is regularised. Keys: ``group_type`` and ``prox_type`` (a short name, a dotted
    path of which the last part counts, or a class), ``reg_lambda``, ``prox_freq``, ``gamma_index_slope``, and what the
    types take: ``k``, ``num_heads``, ``npack``, ``pack_dim``, ``min_sparsity`` (with ``min_sparsity_schedule``: True
    for the cubic ramp, or a registered schedule), ``n_nonzero``, ``score_type``, ``prox_through_heal``. Where the base
    optimizer has such a key itself (schedule-free ones count steps in ``k``), ``prox_k`` and the like.

    With n steps so far: below ``warmup_steps`` the base optimizer steps alone; then every step updates the latents and
    writes their proximal image into the weights; from ``healing_start_step`` on weights that are 0 stay 0, and the
    others train on.

    Args:
        base_optimizer: any optimizer. Its param groups and state are shared, not copied.
        warmup_steps: steps before the first proximal one.
        healing_start_step: step from which the zeros are frozen; None (or sys.maxsize) for never.
        reg_lambda: strength of the regularisation, for groups that do not say.
        redirect: whether the base optimizer reads its weights from ``param_groups`` at every step, which saves four
            passes over them; None assumes so for the optimizers of ``torch.optim``.

    Raises:
        ConfigError: an option that cannot be used; it names the group and the key.

    Hooks registered on this optimizer see the weights after the proximal step; hooks that were registered on the base
    optimizer see its own step.
    """

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss and its gradients; it always sees the pruned weights.

        Returns:
            The closure's result, or None.
        """
        self._refresh()
        if self.num_steps < self.warmup_steps or not self._units:
            loss = self._base_step(closure)
        elif self.num_steps < self.healing_start_step:
            loss = self._proximal_step(closure)
        else:
            loss = self._healing_step(closure)
        self.num_steps += 1
        return loss

    def _base_step(self, closure: Closure | None) -> Any:
        return self.base_optimizer.step() if closure is None else self.base_optimizer.step(closure)

    def _proximal_step(self, closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(unit, *self._active(unit)) for unit in self._units]
        places = [place for _, found, _ in work for place in found]
        latents = [latent for _, _, found in work for latent in found]
        way = (Redirect if self.redirect else CopyIn)(self.base_optimizer, places, latents)
        again = None if closure is None else self._reevaluation(closure, loss, way, work)
        way.enter()
        try:
            result = self._base_step(again)
        finally:
            way.leave()
        for group in self.regularized_param_groups():
            advance(group)
        for unit, found, own in work:
            self._prox(unit, found, own)
        return loss if result is None else result

    def _reevaluation(self, closure: Closure, first: Any, way: LatentBinding, work: Sequence[Work]) -> Closure:
        """The closure of the base optimizer: the first time the loss is known, and after that (line search)
        the latents have moved and the model gets their image."""
        calls = 0

        def again() -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return first
            way.leave()
            try:
                for unit, found, own in work:
                    self._prox(unit, found, own)
                with torch.enable_grad():
                    return closure()
            finally:
                way.enter()

        return again

    def _active(self, unit: Unit) -> tuple[list[ParamSlot], list[Tensor]]:
        """The weights that take part in this step, those with a gradient, and their latents."""
        places = self._with_gradient(unit)
        return places, latents_of(self.state, places)

    def _with_gradient(self, unit: Unit) -> list[ParamSlot]:
        return [place for place in unit.places(self.param_groups) if place.weight.grad is not None]

    def _prox(self, unit: Unit, places: Sequence[ParamSlot], latents: Sequence[Tensor]) -> None:
        """Write the proximal image of the latents into the weights."""
        if not places:
            return
        if not unit.options.due(self.num_steps, self.warmup_steps, self.healing_start_step):
            copy_all([place.weight for place in places], latents)
            return
        plan = unit.plan(places, latents)
        plan.run(unit.scale(self.param_groups), self._fraction(unit))
        if isinstance(plan, SpectralPlan):
            for place, rank in zip(places, plan.ranks, strict=True):
                self.state[place.weight]["rank"] = rank

    # Coupled groups

    def _unit_of(self, grouper: CoupledGrouper) -> Unit:
        self._refresh()
        for unit in self._units:
            if unit.options.grouper is grouper:
                return unit
        raise ConfigError(f"grouper: {grouper!r} is the group_type of no param group")

    def groups_of(self, grouper: CoupledGrouper) -> list[ParamGroup]:
        """The param groups that share a coupled grouper.

        Raises:
            ConfigError: no param group has a coupled grouper.
        """
        return [self.param_groups[number] for number in self._unit_of(grouper).indices]

    @torch.no_grad()
    def threshold_norms(self, grouper: CoupledGrouper) -> Tensor:
        """For each group the smallest ``reg_lambda * gamma`` that zeroes it: the latents' norm over tau.

        Raises:
            ConfigError: no param group has this grouper.
        """
        unit = self._unit_of(grouper)
        return cast(NormPlan, self._latent_plan(unit)[1]).ratios_G()

    @torch.no_grad()
    def reproject(self, grouper: CoupledGrouper) -> None:
        """Write the proximal image of the latents into the weights again, after a change of lambda.

        Raises:
            ConfigError: no param group has this grouper.
        """
        unit = self._unit_of(grouper)
        self._latent_plan(unit)[1].run(unit.scale(self.param_groups), self._fraction(unit))

    def _latent_plan(self, unit: Unit) -> tuple[list[ParamSlot], Plan]:
        places = [place for place in unit.places(self.param_groups) if "latent" in self.state.get(place.weight, {})]
        if not places:
            raise ConfigError("grouper: its weights have no latents: no proximal step yet, or healing has begun")
        return places, unit.plan(places, [self.state[place.weight]["latent"] for place in places])

    def _fraction(self, unit: Unit) -> float:
        return unit.options.fraction(self.num_steps, self.warmup_steps, self.healing_start_step)

    def _healing_step(self, closure: Closure | None) -> Any:
        places = [place for unit in self._units for place in unit.places(self.param_groups)]
        weights = [place.weight for place in places]
        began = ["mask" in self.state[weight] for weight in weights]
        masks = [mask_of(self.state[weight], weight) for weight in weights]

        def masked() -> Any:
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            mask_gradients(weights, masks)
            return loss

        own = take_own(self.state, weights)
        fresh = [(one, mask) for one, mask, had in zip(weights, masks, began, strict=True) if not had]
        mask_base_state(self.base_optimizer, fresh)
        try:
            if closure is None:
                mask_gradients(weights, masks)
            loss = self._base_step(None if closure is None else masked)
        finally:
            give_own(self.state, weights, own)
        mask_weights(weights, masks)
        for unit in self._units:
            if unit.options.holds_rank and unit.options.due(self.num_steps, self.warmup_steps, self.healing_start_step):
                hold_ranks(unit, self._with_gradient(unit), self.state)
        return loss

    # Metrics; reading them waits for the device.

    @property
    def relative_sparsity(self) -> float:
        """Fraction of the regularised weights' elements that is 0, counted now; a weight of low rank counts by what its
        factors save."""
        return self._measured().sparsity

    @property
    def relative_factored_frac(self) -> float:
        """Size of the factors of the low-rank weights, as a fraction of the weights; 0 without such weights."""
        return self._measured().factored

    def parameter_sparsity(self) -> dict[str, float]:
        """Fraction of zeros of every regularised weight, by name (or place in the param groups)."""
        places = [place for unit in self._units for place in unit.places(self.param_groups)]
        return {place.name: weight_sparsity(place.weight) for place in places}

    def _measured(self) -> Reached:
        return measure(self._units, self.param_groups, self.state)

    @torch.no_grad()
    def low_rank_factors(self, weight: Tensor) -> list[Factors]:
        """The factors of a weight with an SVD grouper, one for each packed matrix, from which to build the small layer.

        Args:
            weight: a parameter of a param group with an SVD grouper.

        Raises:
            ConfigError: it has none.
        """
        for unit in self._units:
            for place in unit.places(self.param_groups):
                if place.weight is weight and isinstance(unit.options.grouper, SpectralGrouper):
                    step = (max(0, self.num_steps - 1), self.warmup_steps, self.healing_start_step)
                    fraction = unit.options.fraction(*step)
                    return weight_factors(unit, place, self.state.get(weight, {}), self.param_groups, fraction)
        raise ConfigError(f"weight: the tensor of shape {tuple(weight.shape)} is in no param group with an SVD grouper")


def advanced(gamma: float | Tensor, lr: float | Tensor) -> float | Tensor:
    """The sum of learning rates: a plain float, or a double-precision scalar on the device of a tensor ``lr``."""
    return gamma + (wide(lr) if isinstance(lr, Tensor) else float(lr))


def advance(group: ParamGroup) -> None:
    """Add a param group's learning rate to its gamma: in place where both are tensors, so that replays of a captured
    step go on from where the last one was."""
    key, lr = gamma_key(group), group["lr"]
    gamma = group[key]
    if isinstance(gamma, Tensor) and isinstance(lr, Tensor) and gamma.device == lr.device:
        gamma.add_(wide(lr))
    else:
        group[key] = advanced(gamma, lr)


def wide(lr: Tensor) -> Tensor:
    """A learning rate as a scalar in double precision, where the device has it."""
    return lr.detach().reshape(()).to(torch.float32 if lr.device.type == "mps" else torch.float64)
