"""The real steps of training: which optimizers a model has, when one of them steps, and when a step did not count.

A real step may have several backward passes (accumulation), several optimizers, and several evaluations of a closure
(LBFGS); a gradient scaler may skip it after an overflow. A regulariser belongs into each real step once, in the scale
that the gradients have then. This module finds those moments through the optimizers' own hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.models.optimizer_state import catch_up, check_fits, latest
from pruningawaretraining.session.optimizer_events import HasApply, OptimizerEvents
from pruningawaretraining.session.step_arguments import Arguments, closure_in

_WATCHED: weakref.WeakSet[Steps] = weakref.WeakSet()
_HOOKS: list[RemovableHandle] = []


def _watch(steps: Steps) -> None:
    """Let the steps of one model see every optimizer that is about to step, for as long as they are there.

    One hook serves all and stays: taken out by the garbage collector it could change PyTorch's hooks while an optimizer
    goes through them.
    """
    _WATCHED.add(steps)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_meet_all))


def _meet_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for steps in list(_WATCHED):
        steps._meet(optimizer)


class Steps:
    """The optimizers of one model and the real steps they make.

    Several optimizers make one real step together: it ends when one of them steps a second time.

    Args:
        model: its parameters tell which optimizers are meant.
        listener: is called at the moments of a step; held weakly.
    """

    def __init__(self, model: nn.Module, listener: OptimizerEvents) -> None:
        self.model = model
        self._listener = weakref.ref(listener)
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._strangers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._groups: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._by_hand = False  # whether this round's gradients have been dealt with by an explicit call
        self._expected: list[int] | None = None  # the weights' versions when a round was first left to hooks
        self._round: set[int] = set()  # optimizers that have stepped in this round
        self._done: set[int] = set()  # parameters dealt with in this round
        self._all_done = False  # whether every parameter has been dealt with in this round
        self._rounds = 0
        self.paused = False  # whether optimizers step without a training step, as checkpoints let them to make state
        self._skipped: Tensor | int = 0  # rounds that did not count, of those of which only the device knows it
        self._unsure = 0  # how many of those there are
        self._last: Tensor | int = 1  # 1 while nothing has counted in the round: none has stepped, or it was skipped
        self.fresh: Tensor | int = 0  # 1 if the last optimizer step is the one that made its round count, else 0
        _watch(self)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that are known and alive."""
        return [optimizer for one in self._optimizers if (optimizer := one()) is not None]

    @property
    def count(self) -> int:
        """How many real steps there have been; those that a gradient scaler skipped are none. Where a fused optimizer
        was to skip them, reading this waits for the device."""
        self._rounds, self._skipped, self._unsure = self._rounds - int(self._skipped), 0, 0
        self._last = int(self._last)
        return self._rounds - (self._last if self._round else 0)

    @count.setter
    def count(self, value: int) -> None:
        self._rounds, self._skipped, self._unsure, self._last = value, 0, 0, 0
        self.end_round()

    @property
    def counts(self) -> range:
        """The values that ``count`` may have, as far as that is known without waiting for the device."""
        last = self._last if self._round else 0
        unsure = self._unsure + isinstance(last, Tensor)
        most = self._rounds - (0 if isinstance(last, Tensor) else last)
        return range(most - unsure, most + 1)

    def end_round(self) -> None:
        """The next optimizer step begins a real step: after masks or the model have changed."""
        if self._round and isinstance(self._last, Tensor):
            self._skipped, self._unsure = self._skipped + self._last, self._unsure + 1
        elif self._round:
            self._rounds -= int(self._last)
        self._round, self._done, self._all_done, self._last = set(), set(), False, 1
        self._strangers.clear()

    # --- optimizers ---------------------------------------------------------------------------------------------

    def rates(self) -> dict[int, Tensor | float]:
        """Learning rates by the ids of the optimizers' parameters; tensors where an optimizer keeps one."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take part in every step of an optimizer."""
        if any(known is optimizer for known in self.optimizers):
            return
        self._catch_up(optimizer)
        self._optimizers = [one for one in self._optimizers if one() is not None]
        self._optimizers.append(weakref.ref(optimizer))
        this = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
            steps = this()
            return None if steps is None else steps._before(optimizer, args, kwargs)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            steps = this()
            if steps is not None:
                steps._after(optimizer)

        def loading(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            steps = this()
            if steps is not None:
                check_fits(optimizer, state, steps.model)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        optimizer.register_load_state_dict_pre_hook(loading)

    def _catch_up(self, optimizer: torch.optim.Optimizer) -> None:
        """Exchange parameters that a removal has taken out: of an optimizer met later, or of a later group."""
        catch_up(optimizer)
        self._groups[optimizer] = len(optimizer.param_groups)

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Attach an optimizer that is about to step if it has parameters of this model, or had before a removal."""
        if optimizer in self._strangers or any(known is optimizer for known in self.optimizers):
            return
        mine = {id(parameter) for parameter in self.model.parameters()}
        if any(id(latest(parameter)) in mine for group in optimizer.param_groups for parameter in group["params"]):
            self.attach(optimizer)
        else:
            self._strangers.add(optimizer)

    # --- steps --------------------------------------------------------------------------------------------------

    def gradients_by_hand(self) -> None:
        """An explicit call after backward, for loops whose optimizer has no hooks.

        Whether there are hooks shows at the first step, so the first round is left to them. If the weights move and no
        hook has been called, the calls do the work from then on.
        """
        versions = [parameter._version for parameter in self.model.parameters()]
        if self._expected is None:
            self._expected = versions
        if self._expected == versions:
            return
        listener = self._listener()
        assert listener is not None
        listener.on_round()
        listener.on_gradients(1.0, None)
        self._by_hand = True

    @property
    def by_hand(self) -> bool:
        """Whether an explicit call has dealt with the gradients of the coming step."""
        return self._by_hand

    def stepped_by_hand(self) -> None:
        """An explicit call after a step, for loops whose optimizer has no hooks."""
        listener = self._listener()
        assert listener is not None
        for one in listener.masks:
            one.before_step(None)
        self._by_hand = False
        self._rounds += 1
        self.fresh = 1
        _moved(listener)

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Any) -> Arguments | None:
        if self.paused:
            return None
        if len(optimizer.param_groups) != self._groups.get(optimizer):
            self._catch_up(optimizer)
        if not self._round or id(optimizer) in self._round:
            self.end_round()
            self._rounds += 1
            if not self._by_hand:
                self._start()
        self._round.add(id(optimizer))
        closure, replace = closure_in(args, kwargs)
        self._open(optimizer, closure is None)
        if closure is None:
            if not self._by_hand:
                self._deal_with(optimizer)
            return None

        def evaluate() -> Any:
            """Each evaluation makes new gradients, possibly at other weights; the model is masked in it."""
            for one in self._masks:
                one.apply()
            loss = closure()
            self._start()
            self._open(optimizer, True)
            self._done, self._all_done = self._done - _parameters_of(optimizer), False
            self._deal_with(optimizer)
            return loss

        return replace(evaluate)

    def _open(self, optimizer: torch.optim.Optimizer, ready: bool) -> None:
        for one in self._masks:
            one.before_step(optimizer, ready)

    @property
    def _masks(self) -> Sequence[HasApply]:
        listener = self._listener()
        return () if listener is None else listener.masks

    def _start(self) -> None:
        listener = self._listener()
        if listener is not None:
            listener.on_round()

    def _deal_with(self, optimizer: torch.optim.Optimizer) -> None:
        listener = self._listener()
        if listener is None or self._all_done:
            return
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        only = None
        if len(self.optimizers) > 1 or not self._covered_by(optimizer):
            only = _parameters_of(optimizer) - self._done
            self._done |= only
        self._all_done = only is None
        listener.on_gradients(1.0 if scale is None else scale, only)

    def _covered_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has every trainable parameter, so that no other one can be still to come."""
        mine = _parameters_of(optimizer)
        return all(id(parameter) in mine for parameter in self.model.parameters() if parameter.requires_grad)

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self.paused:
            return
        found_inf = getattr(optimizer, "found_inf", None)  # not read here, so that nothing waits for the device
        skipped = 0 if found_inf is None else (found_inf > 0).long().amax()
        before = self._last
        self._last = before * skipped
        self.fresh = before - self._last
        self._by_hand = False
        listener = self._listener()
        if listener is not None:
            alone = len(self.optimizers) == 1 and self._covered_by(optimizer)
            _moved(listener, None if alone else _parameters_of(optimizer))  # others may be needed by a backward pass


def _moved(listener: OptimizerEvents, only: set[int] | None = None) -> None:
    """Weights have moved (of parameters with these ids, or any): apply masks before anything else looks at them."""
    try:
        listener.on_moved()
    finally:
        for one in listener.masks:
            one.after_step(only)
    listener.on_stepped()


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
