"""A structure that the package does not know: a pattern with an attachment of its own, both defined in this module.

Shape suffixes: ``_R`` ranks of one layer.

A layer of low rank divides by its rank, so it has to know how many are left: zeros alone would leave another model. Its
pattern and attachment are masked, removed, renumbered, counted, saved and reloaded as those of the package are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, load_pruned, one_shot, register, registry, save_pruned
from pruningawaretraining.config.options import COUPLED, Support
from pruningawaretraining.costs.macs import count_macs
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.attachment import Attachment, OwnCost
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.models.module_widths import set_count
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.selection import select

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Module):
    """A linear layer in two factors; what it computes is divided by its rank."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Parameter(torch.randn(rank, inputs))
        self.up = nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.down), self.up) / self.rank


class RankHooks:
    """A masked layer divides by the rank that it keeps."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.kept = ranks, dict.fromkeys(ranks.groups, 0)
        self.handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in ranks.groups]

    def _hook(self, name: str) -> Any:
        return lambda module, inputs, output: output * (module.rank / (self.kept[name] or module.rank))

    def mask(self, keep_G: Tensor, device: torch.device) -> None:
        self.kept = {name: int(keep_R.sum()) for name, keep_R in self.ranks.kept(keep_G).items()}

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Ranks(Attachment):
    """The ranks of layers."""

    def hooks(self, model: nn.Module) -> RankHooks:
        return RankHooks(model, self)

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Any) -> tuple[nn.Parameter, ...]:
        for name, keep_R in self.kept(keep_G).items():
            set_count(model.get_submodule(name), "rank", int(keep_R.sum()), surgery)
        return ()

    def costs(self) -> list[OwnCost]:
        return [OwnCost(name, groups_R) for name, groups_R in self.groups.items()]

    def graph_problem(self, model: nn.Module) -> str:
        return "a rank is divided by in the graph"


@dataclass(frozen=True)
class Rank:
    """Whole ranks of layers of low rank."""

    support: ClassVar[Support] = COUPLED

    def chosen(self, model: nn.Module, layers: Any, exclude: Any = (), key: str = "") -> set[str]:
        names = [name for name, one in model.named_modules() if isinstance(one, LowRank)]
        return select(model, layers, names, "layers") - select(model, list(exclude), names, "exclude")

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        return {}

    def find(self, model: nn.Module, chosen: set[str]) -> ChannelGroups:
        layers = {name: one for name, one in model.named_modules() if name in chosen and isinstance(one, LowRank)}
        total, start = sum(one.rank for one in layers.values()), 0
        members, sets, groups = [], [], {}
        for name, one in layers.items():
            groups[name] = groups_R = torch.arange(start, start + one.rank)
            members.append(Member.along(f"{name}.down", one.down, 0, groups_R, total, "out"))
            members.append(Member.along(f"{name}.up", one.up, 1, groups_R, total, "in"))
            sets.append(GroupSet(name, start, start + one.rank, 1, "rank", (name,)))
            start += one.rank
        return ChannelGroups(Grouping("rank", tuple(members), tuple(sets)), {}, (Ranks(groups),))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register("pattern", "rank")(Rank)
    yield
    del registry._ENTRIES["pattern"]["rank"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LowRank(6, 12, 8), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6), LowRank(6, 2, 4)).eval()


def pruner_of(model: nn.Module, *rules: dict[str, Any], **options: Any) -> Pruning:
    given = [{"pattern": "rank", "target": {"sparsity": 0.5}, **rule} for rule in rules or ({},)]
    return Pruning(model, {"rules": given}, example_inputs=X, **options)


def found_sets(pruner: Pruning) -> tuple[GroupSet, ...]:
    sets: tuple[GroupSet, ...] = pruner.channel_pruner.found.grouping.sets
    return sets


def expected_of(model: nn.Sequential, kept: dict[str, Tensor]) -> Tensor:
    """What the model computes without some ranks, by hand."""
    first, last = model[0], model[4]
    hidden = X @ (first.up[:, kept["0"]] @ first.down[kept["0"]]).T / int(kept["0"].sum())
    hidden = model[3](torch.relu(model[1](hidden)))
    result: Tensor = hidden @ (last.up[:, kept["4"]] @ last.down[kept["4"]]).T / int(kept["4"].sum())
    return result


def test_masked_it_computes_what_it_will_removed() -> None:
    model, dense = net(), net()
    pruner = pruner_of(model, {"application": "mask"})
    pruner.prune(model, 0)
    masks = {name: keep.clone() for name, keep in pruner.masks.items()}
    assert sum(int(keep.sum()) for keep in masks.values()) == 6
    expected = expected_of(dense, masks)
    assert torch.allclose(model(X), expected, atol=1e-6)
    analytic = pruner.macs.kept
    pruner.remove()
    assert torch.allclose(model(X), expected, atol=1e-6)
    assert {name: model.get_submodule(name).rank for name in masks} == {k: int(m.sum()) for k, m in masks.items()}
    assert analytic == pruner.macs.kept == count_macs(model, X) < count_macs(dense, X)
    assert pruner.report().parameters["kept"] == sum(one.numel() for one in model.parameters())


def test_groups_are_renumbered_after_each_removal() -> None:
    model, dense = net(), net()
    pruner = pruner_of(model, {"end": 3})
    for epoch in range(4):
        pruner.prune(model, epoch)
        (ranks,) = [one for one in pruner.channel_pruner.found.attachments if isinstance(one, Ranks)]
        sizes = {name: len(groups) for name, groups in ranks.groups.items()}
        assert sizes == {name: model.get_submodule(name).rank for name in sizes}
        assert torch.cat(list(ranks.groups.values())).tolist() == list(range(sum(sizes.values())))
        assert torch.allclose(model(X), expected_of(dense, pruner.masks), atol=1e-6)
    assert sum(sizes.values()) == 6


def test_a_target_of_macs_counts_its_own_cost() -> None:
    model = net()
    dense = count_macs(model, X)
    pruner_of(model, {"target": {"macs": 0.75}}).prune(model, 0)
    kept, one_more = count_macs(model, X), min((6 + 12) * len(X), (6 + 2) * len(X))
    assert 0.75 * dense - one_more <= kept <= 0.75 * dense


def test_it_stands_beside_channels() -> None:
    model = net()
    pruner = pruner_of(model, {"layers": ["0", "4"]}, {"pattern": "channel", "layers": ["1", "3"]})
    assert {"1": 10, "0": 8, "4": 4}.items() <= {one.name: one.size for one in found_sets(pruner)}.items()
    assert pruner.prune(model, 0) == "removed"
    kept = {name: int(keep.sum()) for name, keep in pruner.masks.items()}
    assert (model[0].rank, model[4].rank, model[1].out_features) == (kept["0"], kept["4"], kept["1"])
    assert kept["0"] + kept["4"] == 6 and kept["1"] < 10
    assert pruner.macs.kept == count_macs(model, X)


def test_moving_averages_know_it_too() -> None:
    model = net()
    average = copy.deepcopy(model)
    pruner = pruner_of(model, {"application": "mask"}, ema=average)
    pruner.prune(model, 0)
    assert torch.allclose(average(X), model(X), atol=1e-6)
    pruner.remove()
    assert average[0].rank == model[0].rank and torch.allclose(average(X), model(X), atol=1e-6)


def test_it_is_saved_and_reloaded(tmp_path: Path) -> None:
    model = net()
    pruner = pruner_of(model)
    pruner.prune(model, 0)
    loaded = load_pruned(net(), save_pruned(model, tmp_path / "ranks.safetensors"))
    assert loaded[0].rank == model[0].rank and torch.equal(loaded(X), model(X))  # type: ignore[index]
    again = net()
    pruner_of(again).load_state_dict(pruner.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))


def test_in_one_shot() -> None:
    data = [(X, torch.tensor([0, 1, 0]))]
    found = one_shot(net(), {"pattern": "rank"}, data, functional.cross_entropy, [0.5])[0.5]
    assert found[0].rank + found[4].rank == 6  # type: ignore[index]


def test_a_graph_that_cannot_be_masked_is_refused() -> None:
    model = net()
    with pytest.raises(ModelError, match="graph: a rank is divided by in the graph"):
        pruner_of(model).follow(torch.export.export(model, (X,)).module())
