"""The second-order criteria as a config names them.

Shape suffixes: ``_G`` groups, ``_M`` gradients.

With data at hand (``one_shot``, or ``pruner.calibrate_with``) they measure curvature at every event and compensate what
stays. Without, and for channels, they score groups by the gradients of masks that training shows, one a step.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining.criteria.base import Needs, Statistics
from pruningawaretraining.criteria.gradient_collectors import MaskGradientCollector
from pruningawaretraining.criteria.magnitude import magnitude_scores
from pruningawaretraining.criteria.second_order.bank import Budget, storage
from pruningawaretraining.criteria.second_order.channels import gate_gradients, gate_scores, readers
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.criteria.second_order.layerwise import FastCapSolver, SparseGptSolver
from pruningawaretraining.criteria.second_order.methods import CapMethod, ObsMethod
from pruningawaretraining.criteria.second_order.solve import BlockMethod, BlockSolver, Choose, Results
from pruningawaretraining.criteria.second_order.weights import PrunableWeight
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.registry import lookup, register

logger = logging.getLogger(__name__)

GRADIENTS, SQUARES = "mask_gradients", "mask_gradient_squares"
"""Keys of :attr:`Statistics.tensors`: gradients by masks of groups, (gradients, groups), and sums of their squares."""
MOST_STEPS, MOST_GROUPS = 256, 4096
"""How many training steps' gradients are kept, and of how many groups at most."""


class Solver(Protocol):
    """Prunes weights at several sparsities from one collection of statistics."""

    def solve(self, fractions: Sequence[float]) -> Results:
        """The weights at each fraction."""


def _check(**limits: tuple[float | int | None, float]) -> None:
    for key, (value, least) in limits.items():
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{key}: {value!r} is not allowed. Allowed: {least:g} or more")
        if isinstance(least, int) and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{key}: {value!r} is not allowed. Allowed: whole numbers, {least} or more")
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{key}: {value!r} is not allowed. Allowed: {least:g} or more")


def _check_places(device: object, folder: object) -> None:
    try:
        torch.device(str(device or "cpu"))
    except RuntimeError as error:
        raise ValueError(
            f"fisher_inv_device: {device!r} is not a device. Allowed: 'cpu', 'cuda', 'cuda:1' ..."
        ) from error
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"traces_backup_dir: {folder!r} is not a folder. Allowed: a path")


@dataclass(frozen=True)
class Sampling:
    """Options of every second-order criterion.

    Args:
        num_grads: gradients behind the curvature.
        micro_batch: samples behind each gradient; None for the loader's batches.
        num_recomputations: rounds, each with fresh curvature; the sparsity rises from one to the next.
        recomputation_schedule: how it rises: a registered schedule.
    """

    needs: ClassVar[Needs] = Needs(kinds=("channel", "tile"), adds_up=True, loss=True)

    num_grads: int = 1024
    micro_batch: int | None = None
    num_recomputations: int = 1
    recomputation_schedule: str = "linear"

    def __post_init__(self) -> None:
        _check(num_grads=(self.num_grads, 1), micro_batch=(self.micro_batch, 1))
        _check(num_recomputations=(self.num_recomputations, 1))
        lookup("schedule", self.recomputation_schedule, "recomputation_schedule")

    def sampled(self, calibration: Calibration) -> Calibration:
        """The same data in micro-batches of this criterion's size."""
        size = calibration.micro_batch if self.micro_batch is None else self.micro_batch
        return replace(calibration, micro_batch=size)

    @property
    def block_size(self) -> int:
        """Entries of a Fisher block."""
        raise NotImplementedError

    def solver(self, weights: Sequence[PrunableWeight], calibration: Calibration, choose: Choose) -> Solver:
        """Ready to prune some weights."""
        raise NotImplementedError

    def measured(self, model: nn.Module, grouping: Grouping, calibration: Calibration) -> dict[str, Tensor]:
        """Gradients of the gates of channels, on given data."""
        return {GRADIENTS: gate_gradients(grouping, self.sampled(calibration), self.num_grads)}

    def score(self, grouping: Grouping, statistics: Statistics) -> Tensor:
        """:func:`gate_scores` of the gradients that were gathered; of too many groups for that, the diagonal's."""
        known = statistics.tensors
        if GRADIENTS in known:
            return gate_scores(known[GRADIENTS], grouping, getattr(self, "damp", 0.0))
        if SQUARES in known:
            return known[SQUARES] / 2
        logger.warning("%s: no gradient has been seen yet; weights are ranked by size", type(self).__name__)
        return magnitude_scores(grouping, 2.0)

    def collector(self) -> MaskGradientCollector:
        """Gathers the gradients of training by the groups' masks, where channels are read."""
        return MaskGradientCollector(min(self.num_grads, MOST_STEPS), MOST_GROUPS, readers)


@dataclass(frozen=True)
class BlockFisher(Sampling):
    """Options of criteria with a Fisher block for every run of weights.

    Args:
        damp: added to the diagonal of the Fisher.
        fisher_block_size: weights in a block; rounded up to whole tiles.
        blocks_in_parallel: blocks that are factored at once; None for what fits in 32 MiB on the CPU, in 512 MiB
            elsewhere.
        fisher_inv_device: device of the Fisher, such as "cpu" or "cuda:1"; None for that of the weights.
        traces_backup_dir: folder to spool the Fisher to, so that it takes no memory.
        max_memory: bytes that the Fisher may take on each rank; what does not fit is gathered in several passes.
    """

    damp: float = 1e-7
    fisher_block_size: int = 50
    blocks_in_parallel: int | None = None
    fisher_inv_device: str | None = None
    traces_backup_dir: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(fisher_block_size=(self.fisher_block_size, 1), blocks_in_parallel=(self.blocks_in_parallel, 1))
        _check(max_memory=(self.max_memory, 1.0))
        _check_places(self.fisher_inv_device, self.traces_backup_dir)
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp: {self.damp!r} is not allowed. Allowed: above 0")

    @property
    def block_size(self) -> int:
        return self.fisher_block_size

    def method(self) -> BlockMethod:
        """The method that scores and updates the blocks."""
        raise NotImplementedError

    def solver(self, weights: Sequence[PrunableWeight], calibration: Calibration, choose: Choose) -> Solver:
        where = storage(self.fisher_inv_device, self.traces_backup_dir)
        budget = Budget(self.num_grads, self.damp, self.max_memory, self.blocks_in_parallel, where)
        return BlockSolver(weights, self.method(), calibration, budget, choose)


@register("criterion", "obs", "obert", "OBS")
@dataclass(frozen=True)
class Obs(BlockFisher):
    """Optimal brain surgeon with a blocked empirical Fisher (Kurtic et al. 2022, oBERT).

    Every tile is scored as if it went alone: ``1/2 w_Q' (F^-1_QQ)^-1 w_Q``.

    Args:
        compensation: how the rest follows: "independent" (oBERT's sum of single corrections), "joint" or "none".
    """

    compensation: str = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("compensation", self.compensation, "compensation")

    def method(self) -> BlockMethod:
        return ObsMethod(self.compensation)


@register("criterion", "cap", "CAP")
@dataclass(frozen=True)
class Cap(BlockFisher):
    """Correlation-aware pruning: greedily within each block, correlations included (Kuznedelev et al. 2023).

    Args:
        merge: how the blocks' orders become one ranking: "running_max" of marginal losses, or "cumulative" losses (as
            published).
    """

    merge: str = "running_max"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("merge", self.merge, "merge")

    def method(self) -> BlockMethod:
        return CapMethod(self.merge)


@register("criterion", "fast_cap", "FastCAP")
@dataclass(frozen=True)
class FastCap(Sampling):
    """One Fisher block a layer, shared by all its blocks, and a column sweep; the same sparsity in every layer.

    Args:
        damp: added to the diagonal, as a fraction of its mean.
        fisher_block_size: weights in a block.
    """

    damp: float = 1e-2
    fisher_block_size: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(damp=(self.damp, 0.0), fisher_block_size=(self.fisher_block_size, 1))

    @property
    def block_size(self) -> int:
        return self.fisher_block_size

    def solver(self, weights: Sequence[PrunableWeight], calibration: Calibration, choose: Choose) -> Solver:
        return FastCapSolver(weights, calibration, self.num_grads, self.damp)


@register("criterion", "sparse_gpt", "SparseGPT", "sparsegpt")
@dataclass(frozen=True)
class SparseGpt(Sampling):
    """Layer by layer, least change of each layer's outputs (Frantar and Alistarh 2023); the same sparsity in every one.

    ``num_grads`` counts micro-batches of inputs here.

    Args:
        damp: added to the diagonal, as a fraction of its mean.
    """

    num_grads: int = 128
    damp: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(damp=(self.damp, 0.0))

    @property
    def block_size(self) -> int:
        return 1

    def solver(self, weights: Sequence[PrunableWeight], calibration: Calibration, choose: Choose) -> Solver:
        return SparseGptSolver(weights, calibration, self.num_grads, self.damp)
