"""Registered pieces of one's own that raise or return what cannot be used: one line names them, nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining import Pruning, load_config, one_shot, registry
from pruningawaretraining.config.options import COUPLED, Support
from pruningawaretraining.errors import ConfigError, ExtensionError
from pruningawaretraining.groups.attachment import Attachment
from pruningawaretraining.groups.channel_norms import GroupIndex
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member, concat
from pruningawaretraining.masks.dynamics import Dynamic
from pruningawaretraining.masks.penalties import Regularizer
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.elements import build_grouping, layer_weights

X = torch.linspace(-1, 1, 12).reshape(2, 6)
ELEMENTS, CHANNELS = {"pattern": "unstructured"}, {"pattern": "channel"}


def broken() -> Any:
    raise ZeroDivisionError("no\nluck")


class Criterion:
    def __init__(self, give: Callable[[Any], Any]) -> None:
        self.give = give

    def score(self, grouping: Any, statistics: Any) -> Any:
        return self.give(grouping)


class Pattern:
    def __init__(self, give: Callable[[Any], Any]) -> None:
        self.give = give

    def build(self, model: nn.Module, layers: Any = None, exclude: Any = ()) -> Any:
        return self.give(build_grouping("bad", layer_weights(model, layers, exclude), self._labels))

    @staticmethod
    def _labels(weight: Any) -> Any:
        return (torch.arange(weight.parameter.shape[0]), weight.parameter.shape[0]), (None, 1)


class Beyond(Pattern):
    @staticmethod
    def _labels(weight: Any) -> Any:
        return (torch.arange(weight.parameter.shape[0]), 2), (None, 1)


class Structural:
    support: ClassVar[Support] = COUPLED

    def __init__(self, give: Callable[[], Any]) -> None:
        self.give = give

    def chosen(self, model: nn.Module, layers: Any, exclude: Any = (), key: str = "") -> Any:
        return self.give()

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        return {}


class Units(Structural):
    def chosen(self, model: nn.Module, layers: Any, exclude: Any = (), key: str = "") -> Any:
        return {"0"}

    def head_units(self, model: nn.Module, chosen: set[str]) -> Any:
        return self.give()


class Finds(Units):
    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        return {}

    def find(self, model: nn.Module, chosen: set[str]) -> Any:
        return self.give()


class NoSupport(Pattern):
    support = "channel"


class Elsewhere(Pattern):
    @staticmethod
    def _labels(weight: Any) -> Any:
        return (torch.arange(weight.parameter.shape[0]).float(), weight.parameter.shape[0]), None


class Prepared:
    acts: ClassVar[str] = "gradients"

    def __init__(self, give: Callable[[Any], Any]) -> None:
        self.give = give

    def prepare(self, grouping: Any, saving_G: Any = None) -> Any:
        return self.give(grouping)


class Penalty:
    def __init__(self, give: Callable[[], Any]) -> None:
        self.give = give

    def penalty(self, grouping: Any) -> Any:
        return self.give()


class Shrink:
    def after_step(self, grouping: Any, rate_of: Any) -> None:
        broken()


class Own(Dynamic):
    nested: ClassVar[bool] = False

    def __init__(self, give: Any = lambda event: event.keep_G, step: Any = lambda masks: None) -> None:
        self.give, self.step = give, step

    def choose(self, event: Any, pick: Any) -> Any:
        return self.give(event)

    def stepped(self, masks: Any) -> None:
        self.step(masks)


def with_factors(grouping: Any, factor: Callable[..., Tensor]) -> Regularizer:
    return Regularizer(GroupIndex(grouping, ("out",)), torch.ones(grouping.size), factor)


SCORES, RAISED = (
    "Expected: a vector of {} real numbers, one for each group, with no NaN",
    r"ZeroDivisionError: no\nluck",
)
NUMBER = "Expected: a number in [0, 1], from start to final"
COST = "Expected: a finite number of 0 or more for '0'"
MASKS = "Expected: a bool vector of 168, True for each group that is kept"
SCORED = SCORES.format(168)
CASES: dict[str, tuple[str, Any, dict[str, Any], str, str]] = {
    "scores too few": ("criterion", lambda g: torch.ones(3), ELEMENTS, "a Tensor of shape (3,)", SCORED),
    "scores of no tensor": ("criterion", lambda g: [1.0] * g.size, ELEMENTS, "(list)", SCORED),
    "no scores": ("criterion", lambda g: None, CHANNELS, "returned None", SCORES.format(20)),
    "scores as a matrix": ("criterion", lambda g: torch.ones(g.size, 1), CHANNELS, "(20, 1)", SCORES.format(20)),
    "complex scores": ("criterion", lambda g: torch.ones(g.size) * 1j, ELEMENTS, "torch.complex64", SCORED),
    "scores true or false": ("criterion", lambda g: torch.ones(g.size) > 0, CHANNELS, "bool", SCORES.format(20)),
    "scores without memory": ("criterion", lambda g: torch.ones(g.size, device="meta"), ELEMENTS, "meta", SCORED),
    "scores NaN": ("criterion", lambda g: torch.full((g.size,), torch.nan), ELEMENTS, "NaN for 168 of 168", SCORED),
    "a score NaN": ("criterion", lambda g: torch.ones(g.size).index_fill(0, torch.tensor(2), torch.nan), CHANNELS,
                    "NaN for 1 of 20 groups", SCORES.format(20)),
    "criterion raises": ("criterion", lambda g: broken(), CHANNELS, RAISED, SCORES.format(20)),
    "cost raises": ("cost", lambda *_: broken(), CHANNELS, RAISED, COST),
    "no cost": ("cost", lambda *_: None, CHANNELS, "returned None", COST),
    "cost of a tensor": ("cost", lambda *_: torch.ones(()), CHANNELS, "a Tensor of shape ()", COST),
    "cost below 0": ("cost", lambda *_: -1, CHANNELS, "returned -1 (int)", COST),
    "cost NaN": ("cost", lambda *_: float("nan"), CHANNELS, "returned nan (float)", COST),
    "schedule above 1": ("schedule", lambda t, start, final: 1.5, ELEMENTS, "1.5 at progress 0", NUMBER),
    "schedule below 0": ("schedule", lambda t, start, final: -0.5, CHANNELS, "-0.5 at progress 0", NUMBER),
    "schedule NaN": ("schedule", lambda t, start, final: float("nan"), CHANNELS, "nan at progress", NUMBER),
    "schedule of a text": ("schedule", lambda t, start, final: "half", ELEMENTS, "'half' at progress", NUMBER),
    "no schedule": ("schedule", lambda t, start, final: None, ELEMENTS, "None at progress", NUMBER),
    "schedule raises": ("schedule", lambda t, start, final: broken(), CHANNELS, RAISED, NUMBER),
    "groups overlap": ("pattern", Pattern(lambda g: concat([g, g])), {}, "groups that overlap: 0.weight",
                       "Expected: every weight in one group at most"),
    "labels too large": ("pattern", Beyond(lambda g: g), {},
                         "labels from 0 to 15 of 0.weight along dimension 0, where 0 to 2", "every"),
    "no grouping": ("pattern", Pattern(lambda g: g.members), {}, "(tuple)", "Expected: a Grouping"),
    "pattern raises": ("pattern", Pattern(lambda g: broken()), {}, RAISED, "Expected: a Grouping"),
    "no layers": ("pattern", Structural(lambda: None), {}, "returned None", "Expected: a set of names of layers"),
    "layers that are not there": ("pattern", Structural(lambda: {"9"}), {}, "{'9'}", "a set of names of layers"),
    "choice of layers raises": ("pattern", Structural(broken), {}, RAISED, "a set of names of layers"),
    "no heads": ("pattern", Units(lambda: None), {}, "returned None", "Expected: a dictionary: attention block -> "),
    "heads that are not there": ("pattern", Units(lambda: {"9": "head"}), {}, "{'9': 'head'}", "attention block"),
    "heads raise": ("pattern", Units(broken), {}, RAISED, "Expected: a dictionary"),
    "finds nothing": ("pattern", Finds(lambda: None), {}, "returned None", "Expected: ChannelGroups"),
    "finding raises": ("pattern", Finds(broken), {}, RAISED, "Expected: ChannelGroups"),
    "attached nothing": ("pattern", Finds(lambda: ChannelGroups(Grouping("bad", (), ()), {}, None)), {},  # type: ignore
                         "returned None", "Expected: ChannelGroups with a tuple of Attachments"),
    "labels of fractions": ("pattern", Elsewhere(lambda g: g), {}, "TypeError: labels of 0 are", "a Grouping"),
    "sets side by side": ("pattern", Pattern(lambda g: replace(g, sets=(g.sets[0], g.sets[0], *g.sets[1:]))), {},
                          "sets that do not follow each other", "Expected: every weight"),
    "cost of a text": ("cost", lambda *_: "1", CHANNELS, "returned '1' (str)", COST),
    "scores that are sparse": ("criterion", lambda g: torch.ones(g.size).to_sparse(), ELEMENTS, "a Tensor", SCORED),
    "not prepared": ("regularizer", Prepared(lambda g: None), CHANNELS, "returned None", "20 strengths"),
    "strengths too few": ("regularizer", Prepared(lambda g: Regularizer(GroupIndex(g, ("out",)), torch.ones(3), len)),
                          CHANNELS, "a Tensor of shape (3,)", "20 strengths, one for each group"),
    "factors too many": ("regularizer", Prepared(lambda g: with_factors(g, lambda *_: torch.ones(5))), CHANNELS,
                         "a Tensor of shape (5,)", "Expected: a vector of 20 factors, one for each group"),
    "preparing raises": ("regularizer", Prepared(lambda g: broken()), CHANNELS, RAISED, "20 strengths"),
    "penalty of a vector": ("regularizer", Penalty(lambda: torch.ones(3)), ELEMENTS, "(3,)", "one real number"),
    "penalty of no tensor": ("regularizer", Penalty(lambda: 0.5), ELEMENTS, "0.5 (float)", "one real number"),
    "penalty raises": ("regularizer", Penalty(broken), ELEMENTS, RAISED, "one real number"),
    "shrinking raises": ("regularizer", Shrink(), ELEMENTS, RAISED, "Expected: nothing"),
    "dynamic raises": ("dynamic", Own(lambda event: broken()), ELEMENTS, RAISED, MASKS),
    "masks too few": ("dynamic", Own(lambda event: event.keep_G[:4]), ELEMENTS, "a Tensor of shape (4,)", MASKS),
    "masks of numbers": ("dynamic", Own(lambda event: event.scores_G), ELEMENTS, "torch.float32", MASKS),
    "no masks": ("dynamic", Own(lambda event: None), ELEMENTS, "returned None", MASKS),
    "steps raise": ("dynamic", Own(lambda event: event.keep_G, lambda masks: broken()), ELEMENTS, RAISED, "nothing"),
    "steps exchange too few": ("dynamic", Own(step=lambda masks: masks.exchange(masks.keep_G[1:])), ELEMENTS,
                               "a Tensor of shape (167,)", MASKS),
}  # fmt: skip
"""Case -> kind, what is registered, the rest of the rule, what the message says was returned, and was expected."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Iterator[str]:
    kind, piece, *_ = CASES[request.param]
    registry.names(kind)  # the library's own first
    table = registry._ENTRIES.setdefault(kind, {})
    table["bad"] = Criterion(piece) if kind == "criterion" else piece
    yield request.param
    del table["bad"]


def rule_of(kind: str, extra: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"target": {"sparsity": 0.5}, "end": 2, "application": "mask", **extra}
    if kind == "cost":
        return {**rule, "target": {"bad": 0.5}}
    return {**rule, kind: "bad"}


def train(model: nn.Module, rule: dict[str, Any]) -> None:
    """One epoch of one step, with everything that a loop may call."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=X, optimizer=optimizer)
    (model(X).sum() + pruner.slice_regularize(model)).backward()
    pruner.channel_regularize(model)
    optimizer.step()
    pruner.prune(model, 0)


def test_what_is_returned_is_refused_by_name_and_the_model_is_as_it_was(case: str) -> None:
    kind, _, extra, returned, expected = CASES[case]
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ExtensionError) as caught:
        train(model, rule_of(kind, extra))
    message = str(caught.value)
    assert message.startswith(f"{kind} 'bad': it ") and "\n" not in message
    assert returned in message and expected in message
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Attaching(Structural):
    """The channels of the first layer, with attachments."""

    def __init__(self, *kinds: type[Attachment]) -> None:
        super().__init__(lambda: {"0"})
        self.kinds = kinds

    def find(self, model: nn.Module, chosen: set[str]) -> ChannelGroups:
        groups = torch.arange(16)
        members = (
            Member.along("0.weight", model[0].weight, 0, groups, 16, "out"),
            Member.along("0.bias", model[0].bias, 0, groups, 16, "out"),
            Member.along("2.weight", model[2].weight, 1, groups, 16, "in"),
        )
        attached = tuple(kind({"0": groups}) for kind in self.kinds)
        return ChannelGroups(Grouping("own", members, (GroupSet("0", 0, 16),)), {}, attached)


@pytest.mark.parametrize("method", ["hooks", "remove", "costs", "taken_out", "renumber"])
def test_an_attachment_that_raises_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Mine = type("Mine", (Attachment,), {method: lambda self, *_: broken()})
    registry.names("pattern")
    monkeypatch.setitem(registry._ENTRIES["pattern"], "bad", Attaching(Mine))
    with pytest.raises(ExtensionError, match="attachment 'Mine': it raised ZeroDivisionError"):
        Pruning(net(), {"rules": [{"pattern": "bad", "target": {"sparsity": 0.5}}]}, example_inputs=X).prune()


class Telling:
    """Hooks that remember the masks; they raise where some are masked, if they are to."""

    def __init__(self) -> None:
        self.raises, self.seen = False, list[int]()

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        if self.raises and not bool(keep_G.all()):
            broken()
        self.seen.append(int(keep_G.sum()))

    def release(self) -> None: ...


def test_hooks_of_an_attachment_that_raise_are_named_and_nothing_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Telling(), Telling()
    Good = type("Good", (Attachment,), {"hooks": lambda self, model: first})
    Bad = type("Bad", (Attachment,), {"hooks": lambda self, model: second})
    registry.names("pattern")
    monkeypatch.setitem(registry._ENTRIES["pattern"], "bad", Attaching(Good, Bad))
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rule = {"pattern": "bad", "target": {"sparsity": 0.5}, "application": "mask"}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=X)
    first.seen.clear()
    second.raises = True
    with pytest.raises(
        ExtensionError, match=r"attachment 'Bad': it raised ZeroDivisionError: no.nluck. Expected: nothing"
    ):
        pruner.prune()
    assert first.seen == [8, 16], "told of the masks, and that they are not there"
    assert pruner.sparsity == 0 and all(bool(mask.all()) for mask in pruner.masks.values())
    pruner.apply_masks()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    untouched = net()
    for one in (model, untouched):
        one(X).sum().backward()
    assert torch.equal(model[0].weight.grad, untouched[0].weight.grad)
    with pytest.raises(ExtensionError, match="attachment 'Bad': it raised"):  # masked by the dry run
        Pruning(net(), {"rules": [rule]}, example_inputs=X)


def test_hooks_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Mine = type("Mine", (Attachment,), {"hooks": lambda self, model: model})
    registry.names("pattern")
    monkeypatch.setitem(registry._ENTRIES["pattern"], "bad", Attaching(Mine))
    with pytest.raises(ExtensionError, match=r"attachment 'Mine': it returned .* Expected: MaskHooks .an object with"):
        Pruning(net(), {"rules": [{"pattern": "bad", "target": {"sparsity": 0.5}}]}, example_inputs=X)


@pytest.mark.parametrize("extra", [CHANNELS, ELEMENTS], ids=str)
@pytest.mark.parametrize(
    "entry", [type("Bad", (), {}), lambda grouping: torch.ones(grouping.size)], ids=["class", "function"]
)
def test_a_criterion_without_a_score_is_refused_before_training(
    entry: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.names("criterion")
    monkeypatch.setitem(registry._ENTRIES["criterion"], "bad", dataclass(entry) if isinstance(entry, type) else entry)
    rule, said = {**extra, "criterion": "bad", "target": {"sparsity": 0.5}}, "criterion: 'bad' has no method 'score'"
    with pytest.raises(ConfigError, match=said):
        Pruning(net(), {"rules": [rule]}, example_inputs=X)
    with pytest.raises(ConfigError, match=said):
        one_shot(net(), rule, [(X, torch.zeros(2).long())], nn.functional.cross_entropy)


@pytest.mark.parametrize("give, said", [
    (lambda: None, "it returned None. Expected: a PruningConfig, made by native(rules)"),
    (lambda: {"rules": []}, "(dict). Expected: a PruningConfig"),
    (broken, "it raised ZeroDivisionError"),
])  # fmt: skip
def test_a_dialect_is_named(give: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"keys": ("mine",), "yaml_tags": (), "recognises": lambda self, mapping: "mine" in mapping}
    registry.names("dialect")
    mine = type("Mine", (), {**ways, "translate": lambda self, mapping: give()})()
    monkeypatch.setitem(registry._ENTRIES["dialect"], "bad", mine)
    with pytest.raises(ExtensionError) as raised:
        load_config({"mine": 1})
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind, name", [("cost", "macs"), ("cost", "runtime"), ("pattern", "4x1"), ("dynamic", "ste")])
def test_a_name_with_another_meaning_is_taken(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match="Allowed: another name"):
        registry.register(kind, name)(lambda *_: 1)
    assert name not in registry.names(kind)


def test_a_dynamic_that_chooses_masks_is_refused_for_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Own.removable
    registry.names("dynamic")
    for entry, said in (
        (dataclass(type("Mine", (Own,), {})), "not supported by the pattern 'channel'"),
        (broken, "is not a dynamic"),
    ):
        monkeypatch.setitem(registry._ENTRIES["dynamic"], "bad", entry)
        with pytest.raises(ConfigError, match=said):
            load_config({"rules": [{"dynamic": "bad", "target": {"sparsity": 0.5}}]})


@pytest.mark.parametrize("kind, entry", [("pattern", NoSupport), ("criterion", type("Bad", (), {"needs": "channel"}))])
def test_what_a_piece_declares_is_checked(kind: str, entry: type, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names(kind)
    monkeypatch.setitem(registry._ENTRIES[kind], "bad", entry(len) if kind == "pattern" else entry())
    with pytest.raises(ConfigError, match=f"{kind} 'bad': its .* '?channel"):
        Pruning(net(), {"rules": [{kind: "bad", "target": {"sparsity": 0.5}}]}, example_inputs=X)


class Keeping(Dynamic):
    """Keeps everything."""

    nested: ClassVar[bool] = False

    def choose(self, event: Any, pick: Any) -> Tensor:
        return torch.ones_like(event.keep_G)


class Lifting(Dynamic):
    """Lifts what was masked, though its masks are said to be nested."""

    removable: ClassVar[bool] = False

    def choose(self, event: Any, pick: Any) -> Tensor:
        return ~event.keep_G if event.number else pick()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Keeping, r"returned 128 groups that are kept.*at most 6[0-9] at the last event"),
        (Lifting, r"returned \d+ groups that were masked before.*nested = False"),
    ],
)
def test_a_dynamic_that_misses_its_target_is_named(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("dynamic")
    monkeypatch.setitem(registry._ENTRIES["dynamic"], "own_dynamic", dataclass(frozen=True)(kind))
    model = nn.Sequential(nn.Linear(8, 16))
    rule = {"pattern": "unstructured", "target": {"sparsity": 0.5}, "end": 1, "dynamic": "own_dynamic"}
    pruner = Pruning(model, {"rules": [rule]})
    with pytest.raises(ExtensionError, match=message):
        for epoch in range(2):
            pruner.prune(epoch=epoch)


class Unevenly(Dynamic):
    """As many zeros as are asked for, but not spread over the windows."""

    def choose(self, event: Any, pick: Any) -> Tensor:
        kept = int(pick().sum())
        return torch.arange(event.grouping.size) < kept if event.last else torch.ones_like(event.keep_G)


class Evenly(Dynamic):
    """Other weights than the allocation's: the last two of every window of four."""

    def choose(self, event: Any, pick: Any) -> Tensor:
        return torch.arange(event.grouping.size) % 4 < 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Unevenly,
            r"masks with 2 zeros or more in 16 of the windows of 4 weights. Expected: 2 .* in at least 32 of them",
        ),
        (Evenly, ""),
    ],
)
def test_final_masks_of_a_dynamic_are_looked_at_window_by_window(
    kind: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.names("dynamic")
    monkeypatch.setitem(registry._ENTRIES["dynamic"], "own_dynamic", dataclass(frozen=True)(kind))
    model = nn.Sequential(nn.Linear(8, 16))
    rule = {"pattern": "2:4", "target": {"sparsity": 0.5}, "end": 1, "dynamic": "own_dynamic"}
    pruner = Pruning(model, {"rules": [rule]})
    pruner.prune(epoch=0)
    with pytest.raises(ExtensionError, match=message) if message else nullcontext():
        pruner.prune(epoch=1)
    zeros = (model[0].weight.reshape(-1, 4) == 0).sum(-1)
    assert bool((zeros == (0 if message else 2)).all())


def test_an_allocation_chooses_once_for_a_dynamic_that_asks_for_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Criterion):
        refined = 0

        def refine(self, grouping: Any, keep_G: Tensor, statistics: Any) -> Tensor:
            Counting.refined += 1
            return keep_G

    class Spoiling(Dynamic):
        def choose(self, event: Any, pick: Any) -> Tensor:
            pick().fill_(False)
            return pick()

    for name, entry in (("criterion", Counting(lambda g: torch.arange(g.size).float())), ("dynamic", Spoiling)):
        registry.names(name)
        monkeypatch.setitem(
            registry._ENTRIES[name], "own", entry if name == "criterion" else dataclass(frozen=True)(entry)
        )
    model = nn.Sequential(nn.Linear(8, 16))
    rule = {"pattern": "unstructured", "target": {"sparsity": 0.5}, "criterion": "own", "dynamic": "own"}
    pruner = Pruning(model, {"rules": [rule]})
    pruner.prune(epoch=0)
    assert pruner.sparsity == 0.5 and Counting.refined == 1


def test_a_cost_of_which_a_model_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("cost")
    monkeypatch.setitem(registry._ENTRIES.setdefault("cost", {}), "own_cost", lambda name, module, macs: 0.0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match=r"rules\[0\]\.target\.own_cost: this cost of the model is 0"):
        Pruning(model, {"rules": [{"target": {"own_cost": 0.5}}]}, example_inputs=torch.randn(2, 8))
