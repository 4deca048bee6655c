"""Peak memory of activations: which tensors a forward pass holds at once, and how large they are at any width.

Shape suffixes: ``_G`` groups, ``_S`` sets, ``_N`` candidates, ``_T`` tensors, ``_M`` moments of the forward pass.

One pass in PyTorch eager, in eval mode without gradients, says when every tensor is made and when it is let go. Its
size at other widths is a sum over the sets: a copy that has lost groups of one set alone says how much one of them
counts. Weights do not count, nor does what kernels use for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import ForwardFn, beside, checked_call, evaluating
from pruningawaretraining.models.trees import tensors_of


@dataclass
class Lives:
    """Tensors of a forward pass in order of allocation.

    Attributes:
        bytes_T: size of each.
        born_T, died_T: number of the operation that made it, and of the one before which it was let go.
    """

    bytes_T: list[int] = field(default_factory=list)
    born_T: list[int] = field(default_factory=list)
    died_T: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes at one moment."""
        changes: dict[int, int] = {}
        for size, born, died in zip(self.bytes_T, self.born_T, self.died_T, strict=True):
            changes[born] = changes.get(born, 0) + size
            changes[died] = changes.get(died, 0) - size
        held, most = 0, 0
        for moment in sorted(changes):
            held += changes[moment]
            most = max(most, held)
        return most


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each new storage and when it is freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lives, self.moment = Lives(), 0
        self._known = known
        self._finalizers: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.moment += 1
        for tensor in tensors_of(out):
            self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        number = len(self.lives.bytes_T)
        self.lives.bytes_T.append(storage.nbytes())
        self.lives.born_T.append(self.moment)
        self.lives.died_T.append(-1)

        def gone() -> None:
            self.lives.died_T[number] = self.moment + 1
            self._known.discard(key)

        self._finalizers.append(weakref.finalize(storage, gone))

    def close(self) -> Lives:
        """Close the lifetimes of tensors that live to the end."""
        for one in self._finalizers:
            one.detach()
        self.lives.died_T = [self.moment + 1 if died < 0 else died for died in self.lives.died_T]
        return self.lives


def activation_lives(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> Lives:
    """The tensors of one forward pass in eval mode; inputs, weights and buffers are not among them.

    Raises:
        ModelError: the model rejects the inputs.
    """
    example_inputs = beside(model, example_inputs)  # copies of inputs do not count as activations
    owned = [*model.parameters(), *model.buffers(), *tensors_of(example_inputs)]
    watch = _Watch({one.untyped_storage()._cdata for one in owned})
    with torch.no_grad(), evaluating(model), watch:
        outputs = checked_call(model, example_inputs, forward_fn)
    lives = watch.close()
    del outputs
    return lives


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


class MemoryCost:
    """Peak activation memory as a function of masks: the largest of many sums over sets.

    Args:
        grouping: groups of the dense model.
        constant_M: bytes of each moment that no set changes.
        bytes_MS: bytes that one group of each set counts at each moment.

    Attributes:
        dense: bytes of the dense model.
    """

    def __init__(self, grouping: Grouping, constant_M: Tensor, bytes_MS: Tensor) -> None:
        self._set_ids, self._sets = grouping.set_ids, len(grouping.sets)
        self.constant_M, self.bytes_MS = constant_M, bytes_MS
        self.dense = float(self.of_sets(grouping.set_sizes.double().unsqueeze(0))[0])

    def __call__(self, keep_G: Tensor) -> float:
        """Bytes under a mask."""
        return float(self.of_sets(self._kept(keep_G).unsqueeze(0))[0])

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`."""
        return (kept_NS @ self.bytes_MS.T + self.constant_M).amax(1)

    def neighbours(self) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`: any set may decide which moment is the peak."""
        return torch.ones(self._sets, self._sets, dtype=torch.bool)

    def marginal_G(self, keep_G: Tensor) -> Tensor:
        """At least what adding each group alone would cost (0 for groups that stay)."""
        now_M = self.bytes_MS @ self._kept(keep_G) + self.constant_M
        more_S = (now_M.unsqueeze(1) + self.bytes_MS).amax(0) - now_M.max()
        return more_S[self._set_ids] * ~keep_G.cpu().bool()

    def _kept(self, keep_G: Tensor) -> Tensor:
        kept_S = torch.zeros(self._sets, dtype=torch.float64)
        return kept_S.index_add_(0, self._set_ids, keep_G.detach().cpu().double())


def memory_cost(
    grouping: Grouping,
    without: Callable[[Tensor], nn.Module],
    example_inputs: Any,
    forward_fn: ForwardFn | None = None,
) -> MemoryCost:
    """The peak activation memory of a model as a function of its masks, from one pass for every set.

    Args:
        grouping: groups of the dense model.
        without: a copy of the dense model with the groups of a mask kept.
        example_inputs, forward_fn: how to run it.

    Raises:
        ModelError: the model rejects the inputs.
    """

    def lives(keep_G: Tensor) -> Lives:
        return activation_lives(without(keep_G), example_inputs, forward_fn)

    whole = lives(torch.ones(grouping.size, dtype=torch.bool))
    dense_T = torch.tensor(whole.bytes_T, dtype=torch.float64)
    bytes_TS = torch.zeros(len(dense_T), len(grouping.sets), dtype=torch.float64)
    for number, one in enumerate(grouping.sets):
        keep_G = torch.ones(grouping.size, dtype=torch.bool)
        gone = max(one.size // 2, 1) if one.size > 1 else 0
        keep_G[one.start : one.start + gone] = False
        smaller = lives(keep_G).bytes_T
        if gone and len(smaller) == len(dense_T):
            bytes_TS[:, number] = (dense_T - torch.tensor(smaller, dtype=torch.float64)) / gone
    constant_T = dense_T - bytes_TS @ grouping.set_sizes.double()
    births = torch.tensor(sorted(set(whole.born_T)) or [0])
    born_T, died_T = torch.tensor(whole.born_T), torch.tensor(whole.died_T)
    alive_MT = ((born_T <= births.unsqueeze(1)) & (births.unsqueeze(1) < died_T)).double()
    return MemoryCost(grouping, alive_MT @ constant_T, alive_MT @ bytes_TS)
