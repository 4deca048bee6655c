"""An optimizer around another: shared param groups and state, phases, copies and state dicts."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pruningawaretraining.errors import CheckpointError, ConfigError
from pruningawaretraining.proximal.latent import reads_param_groups
from pruningawaretraining.proximal.options import number, stable_name, whole
from pruningawaretraining.proximal.prox_groups import ParamGroup, Unit, build_units, check_frozen, watched
from pruningawaretraining.proximal.state import (
    TYPES,
    pack_groups,
    restore_own,
    strip_own,
    unpack_counters,
    unpack_groups,
)

NEVER = sys.maxsize


class Wrapper(Optimizer):
    """The part of :class:`PruneOptimizer` besides its step; see there for the arguments."""

    def __init__(
        self,
        base_optimizer: Optimizer,
        warmup_steps: int = 0,
        healing_start_step: int | None = None,
        reg_lambda: float = 0.0,
        redirect: bool | None = None,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise ConfigError(f"base_optimizer: {type(base_optimizer).__name__} is not a torch.optim.Optimizer")
        self.warmup_steps = whole(warmup_steps, "warmup_steps", 0)
        healing = NEVER if healing_start_step is None else healing_start_step
        self.healing_start_step = whole(healing, "healing_start_step")
        if self.warmup_steps >= self.healing_start_step:
            raise ConfigError(
                f"healing_start_step: {healing_start_step} is not after the warm-up. Allowed: above warmup_steps "
                f"({warmup_steps})"
            )
        number(reg_lambda, "reg_lambda", 0)
        self.num_steps = 0
        self.default_lambda = reg_lambda
        self.redirect = reads_param_groups(base_optimizer) if redirect is None else redirect
        super().__init__([{"params": []}], base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self._units: list[Unit] = []
        self._watched: list[dict[str, Any]] = []
        self._refresh()

    # The param groups and state are the base optimizer's own. They do not exist yet while Optimizer.__init__ runs.

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The base optimizer's param groups."""
        return self.base_optimizer.param_groups if "base_optimizer" in self.__dict__ else []

    @param_groups.setter
    def param_groups(self, value: list[ParamGroup]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state, with our "latent", "mask" and "rank" of regularised weights."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.state = value

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base_optimizer", "warmup_steps", "healing_start_step", "num_steps", "default_lambda", "redirect")
        return {"defaults": self.defaults, **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._units, self._watched = [], []
        self._refresh()

    def __repr__(self) -> str:
        inner = "\n  ".join(repr(self.base_optimizer).splitlines())
        return (
            f"{type(self).__name__} (warmup_steps={self.warmup_steps}, healing_start_step="
            f"{'never' if self.healing_start_step == NEVER else self.healing_start_step}\n  {inner}\n)"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, at any time; its gamma starts at 0.

        Raises:
            ConfigError: an option that cannot be used; the optimizer is then as it was.
        """
        if "base_optimizer" not in self.__dict__:
            return
        self.base_optimizer.add_param_group(param_group)
        try:
            self._refresh()
        except ConfigError:
            self.param_groups.pop()
            raise

    def regularized_param_groups(self) -> list[ParamGroup]:
        """The param groups with a ``prox_type``."""
        return [group for group in self.param_groups if group.get("prox_type") is not None]

    def _refresh(self) -> None:
        """Build the units anew if param groups were added.

        Raises:
            ConfigError: an option has changed since the optimizer was made.
        """
        groups, others = self.param_groups, [*self.base_optimizer.defaults, "initial_lr"]
        for group in groups:
            if group.get("prox_type") is not None:
                group.setdefault("reg_lambda", self.default_lambda)
                group.setdefault("prox_gamma" if "gamma" in others else "gamma", 0.0)
        now = watched(groups, others)
        if now != self._watched:
            check_frozen(self._watched, now)
            base = type(self.base_optimizer).__name__
            self._units = build_units(groups, others, self.healing_start_step != NEVER, base)
            self._watched = now

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimizers: tensors and plain data only.

        Counters, warm-up, healing, gamma and lambda are in the param groups; the latents, masks and ranks are in the
        state of their parameters.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state: dict[str, Any] = self.base_optimizer.state_dict()
        counters = {
            "num_steps": self.num_steps,
            "warmup_steps": self.warmup_steps,
            "healing_start_step": self.healing_start_step,
        }
        state["param_groups"] = pack_groups(state["param_groups"], counters, stable_name)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another optimizer of the same param groups was; a plain state of the base optimizer is taken
        as that of step 0.

        Raises:
            CheckpointError: the groups do not fit.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise CheckpointError(
                f"param_groups: the state has {len(state_dict['param_groups'])}, the optimizer {len(self.param_groups)}"
            )
        counters = unpack_counters(state_dict["param_groups"])
        types = [{key: group[key] for key in TYPES if key in group} for group in self.param_groups]
        groups = unpack_groups(state_dict["param_groups"], self.param_groups, stable_name)
        plain, own = strip_own(state_dict["state"])
        self.base_optimizer.load_state_dict({**state_dict, "state": plain, "param_groups": groups})
        for group, live in zip(self.param_groups, types, strict=True):
            group.update(live)
        restore_own(self.state, own, groups, self.param_groups)
        self.num_steps = counters.get("num_steps", 0)
        self.warmup_steps = counters.get("warmup_steps", self.warmup_steps)
        self.healing_start_step = counters.get("healing_start_step", self.healing_start_step)
        self._watched = []
        self._refresh()
        for post_load in self._optimizer_load_state_dict_post_hooks.values():
            post_load(self)
