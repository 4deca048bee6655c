"""What happens around a training must not make the books untrue: interrupts at any line, what loops keep beside the
model, and what writes weights or loads states behind the pruner's back."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_books import INPUTS, RULES, assert_masked, begun, build, step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pruningawaretraining
from pruningawaretraining import Pruning
from pruningawaretraining.errors import CheckpointError, ConfigError

NOW = {"target": {"sparsity": 0.5}}

# --- all or nothing, at every line ----------------------------------------------------------------------------------

ROOT = f"{Path(pruningawaretraining.__file__).parent}/"
Line = tuple[str, int]
PARTS = {
    "channel": [{"target": {"sparsity": 0.5}, "end": 2}],
    "channel and 2:4": [
        {"target": {"sparsity": 0.25}, "end": 2},
        {"pattern": "2:4", "target": {"sparsity": 0.5}, "end": 4},
    ],
    "every event removes": [{"target": {"sparsity": 0.5}, "start": 1, "end": 4, "application": "remove"}],
}


class Training:
    """A training with an optimizer and an average, just before an event that removes channels."""

    def __init__(self, rules: str, by_hand: bool) -> None:
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.average, self.by_hand = AveragedModel(self.model), by_hand
        self.pruner = Pruning(
            self.model,
            {"rules": PARTS[rules]},
            example_inputs=INPUTS,
            optimizer=self.optimizer,
            ema=self.average,
        )
        for epoch in range(2):
            self.pruner.prune(self.model, epoch)
            self.step()

    def step(self) -> None:
        step(self.model, self.optimizer)
        self.average.update_parameters(self.model)

    def act(self) -> None:
        if self.by_hand:
            self.pruner.remove()
        else:
            self.pruner.prune(self.model, 2)

    def shape(self) -> Any:
        """What a removal changes, and must change together."""
        names = {id(one): name for name, one in self.model.named_parameters()}
        state = {names[id(one)]: kept["momentum_buffer"].shape for one, kept in self.optimizer.state.items()}
        return (
            {name: one.shape for name, one in self.model.state_dict().items()},
            {name: one.shape for name, one in self.average.module.state_dict().items()},
            [[names[id(one)] for one in group["params"]] for group in self.optimizer.param_groups],
            state,
            [getattr(one, "out_channels", None) for one in self.model.modules()],
        )

    def hooks(self) -> Any:
        modules = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in self.model.modules()]
        return modules, [len(one._post_accumulate_grad_hooks or ()) for one in self.model.parameters()]

    def books(self) -> Any:
        masks = {name: keep.tolist() for name, keep in self.pruner.masks.items()}
        return self.pruner.phase, self.pruner.macs, masks, [vars(one.state) for one in self.pruner.engine.rules]

    def values(self) -> dict[str, Tensor]:
        momenta = {str(n): state["momentum_buffer"] for n, state in self.optimizer.state_dict()["state"].items()}
        return {**self.model.state_dict(), **momenta}

    def finish(self) -> Any:
        """Train on, to the end."""
        self.step()
        for epoch in range(2, 6):
            self.pruner.prune(self.model, epoch)
            self.step()
            if self.pruner.report().masked:
                assert_masked(self.pruner, self.model)
        self.pruner.remove()
        self.pruner.on_train_end()
        return self.pruner.phase, self.pruner.report().masked


def traced(act: Callable[[], None], at: tuple[Line, int] | None = None) -> Counter[Line]:
    """Run and count the lines of this package; raise KeyboardInterrupt when a line is reached for the n-th time."""
    seen: Counter[Line] = Counter()

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            line = (frame.f_code.co_filename.removeprefix(ROOT), frame.f_lineno)
            seen[line] += 1
            if at is not None and (line, seen[line]) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        wanted = frame.f_code.co_filename
        return on_line if wanted.startswith(ROOT) and (at is None or wanted == ROOT + at[0][0]) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        act()
    finally:
        sys.settrace(before)
    return seen


def moments(lines: Counter[Line], every: int) -> Iterator[tuple[Line, int]]:
    """The first and the last time of each line, or of every n-th one."""
    for line in sorted(lines)[::every]:
        yield from {(line, 1), (line, lines[line])}


def interrupt_everywhere(rules: str, by_hand: bool, every: int) -> int:
    training = Training(rules, by_hand)
    before, lines = (training.shape(), training.hooks()), traced(training.act)
    after, books = training.shape(), training.books()
    assert after != before[0]
    tried = 0
    for at in moments(lines, every):
        training = Training(rules, by_hand)
        values = {name: one.clone() for name, one in training.values().items()}
        open_books = training.books()
        with pytest.raises(KeyboardInterrupt):
            traced(training.act, at)
        if training.shape() == before[0]:
            assert training.books()[0] == open_books[0], at
            assert [one["event"] for one in training.books()[3]] == [one["event"] for one in open_books[3]], at
            for name, one in training.values().items():  # as it was, but for what is masked by now
                assert bool(((one == values[name]) | (one == 0)).all()), (at, name)
            assert training.hooks()[0] == before[1][0], at
        else:
            assert training.shape() == after, at
            assert training.books()[0] == books[0], at
        if training.pruner.report().masked:
            assert_masked(training.pruner, training.model)
            assert_masked(training.pruner, training.average.module)
        assert training.finish() == ("done", 0), at
        tried += 1
    return tried


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_interrupt_at_some_lines_of_a_removal_is_all_or_nothing(by_hand: bool) -> None:
    assert interrupt_everywhere("channel", by_hand, 149) > 10


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("rules", PARTS)
def test_an_interrupt_at_every_line_of_a_removal_is_all_or_nothing(rules: str, by_hand: bool) -> None:
    if by_hand and rules == "every event removes":
        pytest.skip("nothing is masked and not removed")
    assert interrupt_everywhere(rules, by_hand, 1) > 1000


def test_a_refused_removal_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that the loop catches does not end the rule without its removal."""
    training = Training("channel", False)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("pruningawaretraining.engine.removal.forget_compiled", full)
        with pytest.raises(torch.OutOfMemoryError):
            training.pruner.prune(training.model, 2)
    assert training.pruner.phase == "prune" and training.model[0].out_channels == 8
    training.step()
    assert training.pruner.prune(training.model, 3) == "removed"
    assert training.pruner.phase == "finetune" and training.model[0].out_channels < 8
    training.step()


@pytest.mark.parametrize("place", ["compensate", "recalibrate_norms", "same_buffers"])
def test_an_interrupted_compensation_moves_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rule = {"target": {"sparsity": 0.5}, "compensation": "least_squares"}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    pruner.calibrate_with([(INPUTS, torch.zeros(2, 4))], nn.functional.mse_loss)
    step(model, optimizer)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with monkeypatch.context() as patch:
        real = getattr(sys.modules["pruningawaretraining.engine.coupled"], place)

        def after(*args: Any) -> None:
            real(*args)
            raise KeyboardInterrupt

        patch.setattr(f"pruningawaretraining.engine.coupled.{place}", after)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(model, 0)
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, before[name], rtol=0, atol=0)
    assert pruner.sparsity == 0 and pruner.phase == "regularize"
    assert pruner.prune(model, 0) == "removed" and pruner.phase == "finetune"


# --- averages in lists, dicts and objects ---------------------------------------------------------------------------


class Bag:
    """Holds whatever it is given."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda make: Bag(emas=[make()]),
    "two in a list": lambda make: Bag(emas=[make(), make()]),
    "a dict": lambda make: {"slow": make(), "fast": make()},
    "a tuple of a list": lambda make: ([make()], 1),
    "of a trainer": lambda make: Bag(trainer=Bag(ema=make())),
    "of a callback": lambda make: Bag(callbacks=[Bag(ema=make())]),
    "of a module": lambda make: Averaging(make()),
}


class Averaging(nn.Module):
    """A module that has an average, as those of Lightning do."""

    def __init__(self, average: nn.Module) -> None:
        super().__init__()
        self.ema = average


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("pattern", ["channel", "2:4"])
def test_an_average_that_anything_holds_is_found(holder: str, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model, averages = build(), list[AveragedModel]()

    def make() -> AveragedModel:
        averages.append(AveragedModel(model))
        return averages[-1]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, {"rules": [{**RULES[pattern], "end": 3}]}, example_inputs=INPUTS, optimizer=optimizer)
    held = HOLDERS[holder](make)
    followed, averages = [*averages], []  # what the loop holds alone
    for epoch in range(5):
        pruner.prune(model, epoch)
        step(model, optimizer)
        for one in followed:
            one.update_parameters(model)
            assert [each.shape for each in one.module.parameters()] == [each.shape for each in model.parameters()]
            if pruner.report().masked or pattern == "2:4":
                assert_masked(pruner, one.module)
    assert (model[0].out_channels < 8) == (pattern == "channel")
    told = [one.getMessage() for one in caplog.records if one.getMessage().startswith("ema: ")]
    assert len(told) == 1 and "To say so: ema=" in told[0], told
    del held


def test_averages_in_a_list_of_several_models_with_pruners_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    models = [build(), build()]
    pruners = [Pruning(one, {"rules": [NOW]}, example_inputs=INPUTS) for one in models]
    emas = [AveragedModel(one) for one in models]
    pruners[0].prune(models[0], 0)
    assert [one.module[0].out_channels for one in emas] == [8, 8]
    assert "pruner.attach_ema(emas[0] or emas[1])" in caplog.text


def test_copies_that_are_left_behind_are_named_with_the_line_to_write(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS)
    kept = {"ema": copy.deepcopy(model)}  # updated by hand: nothing says that it is an average
    pruner.prune(model, 0)
    assert "it follows no more" in caplog.text and "pruner.attach_ema(kept['ema'])" in caplog.text
    del kept


class Shadow:
    """An average in a list or dict of tensors."""

    def __init__(self, model: nn.Module, named: bool) -> None:
        copies = {name: one.detach().clone() for name, one in model.named_parameters()}
        self.shadow = copies if named else list(copies.values())


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_that_a_removal_leaves_behind_are_named(
    named: bool, frozen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    model[4].requires_grad_(not frozen)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=optimizer)
    ema, clipped = Shadow(model, named), [one for one in model.parameters() if one.requires_grad]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    pruner.prune(model, 0)
    told = [one.getMessage() for one in caplog.records if one.getMessage().startswith("removal: tensors")]
    assert len(told) == 1 and "ema.shadow" in told[0] and "clipped" in told[0] and "state" not in told[0]
    assert "param_groups" not in told[0] and len(clipped) and state

    again = build()
    caplog.clear()
    quiet = Pruning(again, {"rules": [NOW]}, example_inputs=INPUTS)
    box = Bag(ema=Shadow(again, named))
    quiet.after_removal = lambda: vars(box).update(ema=Shadow(again, named))
    del ema, clipped
    quiet.prune(again, 0)
    assert "removal: tensors" not in caplog.text


# --- what writes weights after a step -------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """As many are written: super().__init__() is not called, so no hook sees its step."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults
        self.slow = [one.detach().clone() for group in base.param_groups for one in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:  # that of the base class would fail
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)
        with torch.no_grad():
            for one, kept in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                one.copy_(kept.lerp_(one, 0.5))


@pytest.mark.parametrize("given", ["wrapper", "base", "none"])
@pytest.mark.parametrize("pattern", RULES)
def test_a_lookahead_that_no_hook_sees_is_named_at_the_next_step(
    pattern: str, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapper = Lookahead(base)
    optimizer = {"wrapper": wrapper, "base": base, "none": None}[given]
    pruner = Pruning(model, {"rules": [RULES[pattern]]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(6):
        step(model, wrapper)
        pruner.prune(model, epoch)
    caplog.clear()
    step(model, wrapper)
    step(model, wrapper)
    step(model, wrapper)
    told = [one.getMessage() for one in caplog.records]
    assert len(told) == 1 and "Lookahead that does not call super().__init__()" in told[0], told
    pruner.apply_masks()
    assert_masked(pruner, model)


@pytest.mark.parametrize("pattern", RULES)
def test_writes_that_leave_masked_weights_alone_are_not_named(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, pruner = begun(pattern)
    caplog.clear()
    for _ in range(6):
        with torch.no_grad():
            for one in model.parameters():
                one.clamp_(-1, 1)
        step(model, optimizer)
        assert_masked(pruner, model)
    assert [one for one in caplog.records if "masked weights" in one.getMessage()] == []
    model.load_state_dict(build().state_dict())
    step(model, optimizer)  # and yet what is loaded is masked before it is trained
    assert_masked(pruner, model)


# --- optimizers whose groups or state come later --------------------------------------------------------------------


def test_a_group_of_parameters_from_before_a_removal_follows_it() -> None:
    model = build()
    old = list(model.parameters())
    optimizer = torch.optim.SGD(old[2:], lr=0.05, momentum=0.9)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=optimizer)
    step(model, optimizer)
    pruner.prune(model, 0)
    optimizer.add_param_group({"params": old[:2], "lr": 0.01})
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    held = [id(one) for group in optimizer.param_groups for one in group["params"]]
    assert sorted(held) == sorted(id(one) for one in model.parameters())
    assert not torch.equal(before, model[0].weight)
    optimizer.add_param_group({"params": old[2:3]})
    with pytest.raises(ConfigError, match=r"optimizer: SGD has a parameter in two groups"):
        step(model, optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adadelta"])
def test_an_optimizers_state_of_before_a_removal_is_refused(name: str) -> None:
    model = build()
    options = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=optimizer)
    step(model, optimizer)
    dense = copy.deepcopy(optimizer.state_dict())
    pruner.prune(model, 0)
    step(model, optimizer)
    small = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"optimizer: \w+ of 0.weight has the shape \(8, 4, 3, 3\)"):
        optimizer.load_state_dict(dense)
    now = optimizer.state_dict()["state"]
    for number, known in small["state"].items():
        assert all(torch.equal(torch.as_tensor(known[key]), torch.as_tensor(now[number][key])) for key in known)
    optimizer.load_state_dict(small)
    step(model, optimizer)
