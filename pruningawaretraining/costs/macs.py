"""Multiply-accumulate operations: counted once for the dense model, then known for any set of masks.

Shape suffixes: ``_G`` groups, ``_L`` layers, ``_N`` channel entries of all layers in a row.

A layer's MACs are linear in its kept output channels and in its kept input channels (a depthwise convolution has only
outputs), so ``kept = dense * out / out0 * in / in0`` is exact after removal, and costs one gather and one sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruningawaretraining.costs.own import own_macs
from pruningawaretraining.groups.attachment import OwnCost
from pruningawaretraining.groups.grouping import Grouping, Member
from pruningawaretraining.groups.products import Product
from pruningawaretraining.models.calling import ForwardFn, checked_call, evaluating, spelled_out
from pruningawaretraining.patterns.structures import is_block


class _Everywhere:
    """In place of PyTorch's tracker of modules, which is not needed here: it is slow, and under ``no_grad`` it raises
    at modules that are called with a view of a parameter."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Counter(FlopCounterMode):
    """Counts for the model as a whole."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _Everywhere()


def count_macs(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> int:
    """Count the multiply-accumulate operations of one forward pass (matrix products and convolutions).

    Args:
        model: the model; it is run once in eval mode, and left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. The count is for the whole
            batch.
        forward_fn: how to call the model, if not as ``model(*inputs)``.

    Raises:
        ModelError: the model rejects the inputs.
    """
    return macs_per_layer(model, example_inputs, forward_fn).get("", 0)


def macs_per_layer(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> dict[str, int]:
    """MACs of every module by name, its children included; the whole model has the name "".

    Args and raises: as :func:`count_macs`.
    """
    counter = _Counter()
    named = dict.fromkeys((name for name, _ in model.named_modules()), 0)
    with spelled_out(model), torch.no_grad(), evaluating(model), counter, _counted_by_module(model, counter, named):
        checked_call(model, example_inputs, forward_fn)
    return {**named, "": counter.get_total_flops() // 2}


@contextmanager
def _counted_by_module(model: nn.Module, counter: FlopCounterMode, named: dict[str, int]) -> Iterator[None]:
    """Add what each module computes, its children included, to ``named``; a function may call them in any order."""
    before: dict[str, list[int]] = {name: [] for name in named}

    def begin(name: str, *_: Any) -> None:
        before[name].append(counter.get_total_flops())

    def end(name: str, *_: Any) -> None:
        named[name] += (counter.get_total_flops() - before[name].pop()) // 2

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(begin, name)).remove)
            hooks.callback(module.register_forward_hook(partial(end, name)).remove)
        yield


@dataclass(frozen=True, eq=False)
class _Side:
    """One channel dimension of many layers: which layer each entry belongs to, and the group that holds it."""

    layers_N: Tensor
    groups_N: Tensor
    widths_L: Tensor

    @classmethod
    def of(cls, dimensions: Sequence[tuple[int, Tensor]], layers: int, outside: int) -> _Side:
        widths_L = torch.zeros(layers, dtype=torch.float64)
        numbers, groups = [], []
        for layer, entries in dimensions:
            widths_L[layer] = len(entries)
            numbers.append(torch.full((len(entries),), layer))
            groups.append(entries)
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(torch.cat([empty, *numbers]), torch.cat([empty, *groups]).clamp(max=outside), widths_L)

    def kept_L(self, keep_G1: Tensor) -> Tensor:
        """Kept fraction of the dimension for every layer (1 where a layer has no such dimension)."""
        kept = torch.zeros_like(self.widths_L).index_add_(0, self.layers_N, keep_G1[self.groups_N])
        return torch.where(self.widths_L > 0, kept / self.widths_L.clamp(min=1), 1.0)


@dataclass(frozen=True, eq=False)
class LinearCost:
    """A cost that is a sum over layers of ``base * kept outputs * kept inputs``, plus what masks do not change; a layer
    in a residual block that is a group beside channels costs nothing without it.

    Args:
        dense: the cost of the dense model.
        names: the layers (or parameters) that the grouping touches.
        base_L: their dense costs.
        out, in_: their output and input channels.
        size: number of groups.
        block_L: the group of the residual block that a layer lies in, ``size`` for none; None where there are no such.
    """

    dense: float
    names: tuple[str, ...]
    base_L: Tensor
    out: _Side
    in_: _Side
    size: int
    block_L: Tensor | None = None

    def there_L(self, keep_G1: Tensor) -> Tensor:
        """1 for layers whose block stays, 0 for the others."""
        return torch.ones_like(self.base_L) if self.block_L is None else keep_G1[self.block_L]

    @cached_property
    def constant(self) -> float:
        """The part of the cost that no mask changes."""
        return self.dense - float(self.base_L.sum())

    def layers(self, keep_G: Tensor) -> Tensor:
        """The cost of each touched layer under a mask (vector, in the order of ``names``)."""
        keep_G1 = self._extended(keep_G)
        return self.base_L * self.out.kept_L(keep_G1) * self.in_.kept_L(keep_G1) * self.there_L(keep_G1)

    def __call__(self, keep_G: Tensor) -> float:
        """The cost under a mask.

        Args:
            keep_G: for each group, True (1) if it stays.
        """
        return self.constant + float(self.layers(keep_G).sum())

    def marginal_G(self, keep_G: Tensor) -> Tensor:
        """Exact cost of adding each group alone, with the others unchanged (0 for kept groups)."""
        linear_G, square_G, kept_G = self._terms(keep_G)
        return (linear_G + square_G) * ~kept_G

    def saving_G(self, keep_G: Tensor) -> Tensor:
        """Exact saving of removing each group alone, with the others unchanged (0 for removed groups)."""
        linear_G, square_G, kept_G = self._terms(keep_G)
        return (linear_G - square_G) * kept_G

    def _terms(self, keep_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and second order change of the cost with each group, and which groups stay."""
        keep_G1 = self._extended(keep_G)
        out_L, in_L = self.out.kept_L(keep_G1), self.in_.kept_L(keep_G1)
        there_L = self.there_L(keep_G1)
        per_out_L = self.base_L * there_L / self.out.widths_L.clamp(min=1)
        per_in_L = self.base_L * there_L / self.in_.widths_L.clamp(min=1)
        gain = torch.zeros(self.size + 1, dtype=torch.float64)
        gain.index_add_(0, self.out.groups_N, (per_out_L * in_L)[self.out.layers_N])
        gain.index_add_(0, self.in_.groups_N, (per_in_L * out_L)[self.in_.layers_N])
        if self.block_L is not None:
            gain.index_add_(0, self.block_L, self.base_L * out_L * in_L)
        square = torch.zeros(self.size, dtype=torch.float64)
        for layer, base, counts_G in self._both_sides:  # a group on both sides of one layer
            square += base * float(there_L[layer]) * counts_G
        return gain[:-1], square, keep_G1[:-1] > 0

    @cached_property
    def _both_sides(self) -> list[tuple[int, float, Tensor]]:
        found = []
        shared = torch.isin(self.out.groups_N, self.in_.groups_N) & (self.out.groups_N < self.size)
        for layer in torch.unique(self.out.layers_N[shared]).tolist():
            out_G = torch.bincount(self.out.groups_N[self.out.layers_N == layer], minlength=self.size + 1)[: self.size]
            in_G = torch.bincount(self.in_.groups_N[self.in_.layers_N == layer], minlength=self.size + 1)[: self.size]
            product = (out_G * in_G).double()
            if bool(product.any()):
                widths = float(self.out.widths_L[layer] * self.in_.widths_L[layer])
                found.append((layer, float(self.base_L[layer]) / widths, product))
        return found

    def _extended(self, keep_G: Tensor) -> Tensor:
        return torch.cat([keep_G.detach().cpu().double(), torch.ones(1, dtype=torch.float64)])


def macs_cost(grouping: Grouping, per_layer: Mapping[str, float], own: Iterable[OwnCost] = ()) -> LinearCost:
    """The MACs of a model as a function of its channel masks.

    Args:
        grouping: the model's channels.
        per_layer: dense MACs by module name, from :func:`macs_per_layer`, or costs from :func:`weighted`.
        own: what modules compute beside the layers that the grouping touches.
    """
    weights = [member for member in grouping.of_role("out", "in").members if member.name.endswith(".weight")]
    bases = {member.name: float(per_layer.get(member.name.removesuffix(".weight"), 0)) for member in weights}
    outputs, inputs = _dimensions(weights)
    own, rows_of = list(own), dict(outputs)
    groups_of = {one.module: one.groups_N.cpu() for one in own if not one.inner}
    for name, groups_N in groups_of.items():
        bases[name] = float(own_macs(name, per_layer))
        outputs.append((name, groups_N))
    for number, one in enumerate(_counted(grouping.products, per_layer)):
        name, weight, own_N = f"{one.layer}@{number}", f"{one.layer}.weight", groups_of.get(one.layer)
        out_N, in_N = (own_N if side is None else side for side in (one.out_N, one.in_N))
        if out_N is None and weight in rows_of:  # a router, which has a row for each expert
            out_N = rows_of[weight]
            bases[weight] -= one.macs
        bases[name] = float(one.macs)
        outputs += [(name, out_N.cpu())] if out_N is not None else []
        inputs += [(name, in_N.cpu())] if in_N is not None else []
        if own_N is not None:  # what is left of the module's own is in proportion to its groups alone
            bases[one.layer] -= one.macs
    for whole in (cost for cost in own if cost.inner):
        known = sum(base for layer, base in bases.items() if layer.startswith(f"{whole.module}."))
        bases[whole.module] = float(per_layer.get(whole.module, 0)) - known
        outputs.append((whole.module, whole.groups_N.cpu()))
    return _linear_cost(outputs, inputs, bases, float(per_layer.get("", 0)), grouping)


def _counted(products: Sequence[Product], per_layer: Mapping[str, float]) -> list[Product]:
    """The products of modules of which all are in the count."""
    sums: dict[str, int] = {}
    for one in products:
        sums[one.layer] = sums.get(one.layer, 0) + one.macs
    return [one for one in products if sums[one.layer] <= own_macs(one.layer, per_layer)]


def parameters_cost(grouping: Grouping, model: nn.Module) -> LinearCost:
    """The number of parameters of a model as a function of its channel masks."""
    learned = {name for name, _ in model.named_parameters()}
    members = [member for member in grouping.members if member.name in learned]
    bases = {member.name: float(member.parameter.numel()) for member in members}
    total = float(sum(parameter.numel() for parameter in model.parameters()))
    return _linear_cost(*_dimensions([one for one in members if one.role != "block"]), bases, total, grouping)


Dimensions = list[tuple[str, Tensor]]  # name of a tensor, and the group of every entry of one of its dimensions


def _dimensions(members: Sequence[Member]) -> tuple[Dimensions, Dimensions]:
    """Output and input dimensions."""
    outputs: Dimensions = []
    inputs: Dimensions = []
    made: dict[str, int] = {}  # the dimension of its outputs
    for member in members:
        assert member.slots is not None
        dim = next(index for index, label in enumerate(member.labels) if label is not None)
        # groups in two dimensions: channels of a raw parameter, or the experts of one that reads channels
        again = member.name in made and (member.role in ("raw", "made", "read") or made[member.name] != dim)
        if member.role == "in" or again:
            inputs.append((member.name, member.slots.cpu()))
        else:
            outputs.append((member.name, member.slots.cpu()))
            made.setdefault(member.name, dim)
    return outputs, inputs


def _linear_cost(
    outputs: Dimensions, inputs: Dimensions, bases: dict[str, float], dense: float, grouping: Grouping
) -> LinearCost:
    size, numbers = grouping.size, {name: index for index, name in enumerate(bases)}
    blocks = {f"{one.name}.": one.start for one in grouping.sets if is_block(one)}
    block_L = [next((group for one, group in blocks.items() if name.startswith(one)), size) for name in bases]
    return LinearCost(
        dense,
        tuple(name.removesuffix(".weight") for name in bases),
        torch.tensor(list(bases.values()), dtype=torch.float64),
        _Side.of([(numbers[name], entries) for name, entries in outputs], len(bases), size),
        _Side.of([(numbers[name], entries) for name, entries in inputs], len(bases), size),
        size,
        torch.tensor(block_L, dtype=torch.int64) if blocks else None,
    )
