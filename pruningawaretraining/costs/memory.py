"""Peak memory of activations: which tensors a forward pass holds at once, and how large they are at any width.

Shape suffixes: ``_G`` groups, ``_S`` sets, ``_N`` candidates, ``_T`` tensors, ``_M`` moments of the forward pass.

One pass in PyTorch eager, in eval mode without gradients, says when every tensor is made and when it is let go. Its
size at other widths is a sum over the sets: a copy that has lost groups of one set alone says how much one of them
counts. A residual block that is out hands on its input: the moments inside it do not take place, and its output is the
same tensor as its input. Weights do not count, nor does what kernels use for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.costs.lives import Lives, activation_lives
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import ForwardFn


def peak_activation_bytes(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> int:
    """The most bytes that activations take at one moment of a forward pass (PyTorch eager, eval mode, no gradients).

    Args:
        model: the model; it runs once and is left as it was.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        forward_fn: how to call the model, if not as ``model(*inputs)``.

    Raises:
        ModelError: the model rejects the inputs.
    """
    return activation_lives(model, example_inputs, forward_fn).peak


@dataclass(frozen=True, eq=False)
class BlockLife:
    """The change of memory at every moment once a residual block is removed.

    Attributes:
        number: of its set.
        before: place in the list of the block whose output it is given, or None.
        given_M, made_M: whether its input, and its output, are held; an input of the model always is.
        constant, bytes_S: bytes of its output that no set changes, and that one group of each set counts.
        inside_M: whether a moment is inside it.
    """

    number: int
    before: int | None
    given_M: Tensor
    made_M: Tensor
    constant: float
    bytes_S: Tensor
    inside_M: Tensor


class MemoryCost:
    """Peak activation memory as a function of masks: the largest of many sums over sets.

    Args:
        grouping: groups of the dense model.
        constant_M: bytes of each moment that no set changes.
        bytes_MS: bytes that one group of each set counts at each moment.
        blocks: the calls of residual blocks, in order.

    Attributes:
        dense: bytes of the dense model.
    """

    timed: ClassVar[bool] = False

    def __init__(
        self, grouping: Grouping, constant_M: Tensor, bytes_MS: Tensor, blocks: Sequence[BlockLife] = ()
    ) -> None:
        self._set_ids, self._sets = grouping.set_ids, len(grouping.sets)
        self.constant_M, self.bytes_MS, self.blocks = constant_M, bytes_MS, tuple(blocks)
        self.dense = float(self.of_sets(grouping.set_sizes.double().unsqueeze(0))[0])

    def __call__(self, keep_G: Tensor) -> float:
        """Bytes under a mask."""
        return float(self.of_sets(self._kept(keep_G).unsqueeze(0))[0])

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`."""
        bytes_NM = kept_NS @ self.bytes_MS.T + self.constant_M
        passed: list[Tensor] = []  # of each block: it is out, and what stands for its output is held (N x M)
        for block in self.blocks:
            out_N1 = kept_NS[:, block.number].unsqueeze(1) == 0
            held_NM = block.given_M if block.before is None else block.given_M | passed[block.before]
            once_N1 = (kept_NS @ block.bytes_S + block.constant).unsqueeze(1)
            bytes_NM = bytes_NM - once_N1 * (out_N1 & block.made_M & held_NM)
            bytes_NM = bytes_NM.masked_fill(out_N1 & block.inside_M, 0.0)
            passed.append(out_N1 & held_NM)
        return bytes_NM.amax(1)

    def neighbours(self) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`: any set may decide which moment is the peak."""
        return torch.ones(self._sets, self._sets, dtype=torch.bool)

    def marginal_G(self, keep_G: Tensor) -> Tensor:
        """What adding each group alone would cost (0 for groups that stay)."""
        kept_S = self._kept(keep_G)
        more_S = self.of_sets(kept_S + torch.eye(self._sets)) - self.of_sets(kept_S.unsqueeze(0))
        return more_S[self._set_ids] * ~keep_G.cpu().bool()

    def _kept(self, keep_G: Tensor) -> Tensor:
        kept_S = torch.zeros(self._sets, dtype=torch.float64)
        return kept_S.index_add_(0, self._set_ids, keep_G.detach().cpu().double())


def memory_cost(
    grouping: Grouping,
    without: Callable[[Tensor], nn.Module],
    example_inputs: Any,
    forward_fn: ForwardFn | None = None,
    blocks: Mapping[int, Iterable[str]] | None = None,
) -> MemoryCost:
    """The peak activation memory of a model as a function of its masks, from one pass for every set.

    Args:
        grouping: groups of the dense model.
        without: a copy of the dense model with the groups of a mask kept.
        example_inputs, forward_fn: how to run it.
        blocks: number of a set that is a residual block -> the modules that go with it.

    Raises:
        ModelError: the model rejects the inputs.
    """
    numbers = {name: number for number, names in (blocks or {}).items() for name in names}

    def lives(keep_G: Tensor) -> Lives:
        return activation_lives(without(keep_G), example_inputs, forward_fn, numbers)

    whole = lives(torch.ones(grouping.size, dtype=torch.bool))
    dense_T = torch.tensor(whole.bytes_T, dtype=torch.float64)
    bytes_TS = torch.zeros(len(dense_T), len(grouping.sets), dtype=torch.float64)
    for number, one in enumerate(grouping.sets):
        gone = min(one.size // 2, one.size - one.least)
        if gone <= 0:
            continue
        keep_G = torch.ones(grouping.size, dtype=torch.bool)
        keep_G[one.start : one.start + gone] = False
        smaller = lives(keep_G).bytes_T
        if len(smaller) == len(dense_T):
            bytes_TS[:, number] = (dense_T - torch.tensor(smaller, dtype=torch.float64)) / gone
    constant_T = dense_T - bytes_TS @ grouping.set_sizes.double()
    births = torch.tensor(sorted(set(whole.born_T)) or [0])
    born_T, died_T = torch.tensor(whole.born_T), torch.tensor(whole.died_T)
    alive_MT = (born_T <= births.unsqueeze(1)) & (births.unsqueeze(1) < died_T)
    held_MT = alive_MT.double()
    found = _blocks(whole, numbers, births, alive_MT, constant_T, bytes_TS)
    return MemoryCost(grouping, held_MT @ constant_T, held_MT @ bytes_TS, found)


def _blocks(
    lives: Lives, numbers: Mapping[str, int], births_M: Tensor, alive_MT: Tensor, constant_T: Tensor, bytes_TS: Tensor
) -> list[BlockLife]:
    """The calls of blocks that make a tensor of their own."""
    calls = [call for call in lives.calls if call.made is not None and call.made != call.given]
    places = {call.made: place for place, call in enumerate(calls)}
    return [
        BlockLife(
            numbers[call.name],
            places.get(call.given),
            torch.ones(len(births_M), dtype=torch.bool) if call.given is None else alive_MT[:, call.given],
            alive_MT[:, call.made],
            float(constant_T[call.made]),
            bytes_TS[call.made],
            (call.begun < births_M) & (births_M <= call.ended),
        )
        for call in calls
    ]
