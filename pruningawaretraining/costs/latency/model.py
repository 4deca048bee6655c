"""Latency as a function of masks: tables of single layers, fitted to end-to-end measurements of a few pruned copies.

Shape suffixes: ``_N`` candidates, ``_S`` sets, ``_L`` layers, ``_G`` groups, ``_K`` grid points, ``_A`` anchors.

    predicted = correction * (fixed + per_number * numbers written + layers * sum of the layers' tables)

The three coefficients are fitted on anchors (the dense model and copies at other widths), never below 0, by relative
error. The correction is what the last measured copy took over what was predicted for it. Nothing is run in between, so
that a search may ask thousands of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from pruningawaretraining.costs.latency.layer_shapes import LayerShape
from pruningawaretraining.costs.latency.layer_tables import LayerTable
from pruningawaretraining.costs.macs import LinearCost
from pruningawaretraining.costs.widths import Widths
from pruningawaretraining.groups.grouping import Grouping

PERIOD = 16
PRIOR = 0.1  # how much an anchor weighs that says: layers take what their tables say


class _Tables:
    """The tables of many layers, side by side, for many widths at once."""

    def __init__(self, tables: Sequence[LayerTable]) -> None:
        rows, columns = [_line(one.outputs_O) for one in tables], [_line(one.inputs_I) for one in tables]
        self.out_LK, self.in_LK = _padded(rows), _padded(columns)
        self.out_last_L = torch.tensor([len(one) - 1 for one in rows])
        self.in_last_L = torch.tensor([len(one) - 1 for one in columns])
        shape = (len(tables), self.out_LK.shape[1], self.in_LK.shape[1])
        self.ms_LKK = torch.zeros(shape, dtype=torch.float64)
        for number, one in enumerate(tables):
            grid = torch.tensor(one.ms_OI, dtype=torch.float64)
            grid = grid.expand(max(len(grid), 2), max(grid.shape[1], 2)) if 1 in grid.shape else grid
            self.ms_LKK[number, : grid.shape[0], : grid.shape[1]] = grid
        self.odd_out_LP = torch.tensor([_periodic(one.odd_out) for one in tables], dtype=torch.float64)
        self.odd_in_LP = torch.tensor([_periodic(one.odd_in) for one in tables], dtype=torch.float64)

    def __call__(self, out_NL: Tensor, in_NL: Tensor) -> Tensor:
        """Milliseconds of every layer (N x L)."""
        low_o, part_o = _place(self.out_LK, self.out_last_L, out_NL)
        low_i, part_i = _place(self.in_LK, self.in_last_L, in_NL)
        layer = torch.arange(out_NL.shape[1]).expand_as(low_o)
        near = self.ms_LKK[layer, low_o, low_i] * (1 - part_i) + self.ms_LKK[layer, low_o, low_i + 1] * part_i
        far = self.ms_LKK[layer, low_o + 1, low_i] * (1 - part_i) + self.ms_LKK[layer, low_o + 1, low_i + 1] * part_i
        straight = near * (1 - part_o) + far * part_o
        odd_out = self.odd_out_LP[layer, out_NL.round().long() % PERIOD]
        return straight * odd_out * self.odd_in_LP[layer, in_NL.round().long() % PERIOD]


def _line(widths: Sequence[int]) -> list[float]:
    return [float(one) for one in widths] if len(widths) > 1 else [float(widths[0]), float(widths[0]) + 1]


def _padded(lines: Sequence[Sequence[float]]) -> Tensor:
    longest = max((len(line) for line in lines), default=2)
    return torch.tensor([[*line, *[torch.inf] * (longest - len(line))] for line in lines], dtype=torch.float64)


def _periodic(factors: Sequence[float]) -> list[float]:
    if PERIOD % len(factors):
        raise ValueError(f"{len(factors)} factors do not repeat within {PERIOD}")
    return [factors[number % len(factors)] for number in range(PERIOD)]


def _place(grid_LK: Tensor, last_L: Tensor, width_NL: Tensor) -> tuple[Tensor, Tensor]:
    """The grid point below each width and the fraction of the way to the next; clamped to the grid."""
    above = torch.searchsorted(grid_LK, width_NL.T.contiguous(), right=True).T
    low = torch.minimum((above - 1).clamp(min=0), last_L - 1)
    layer = torch.arange(width_NL.shape[1]).expand_as(low)
    start, end = grid_LK[layer, low], grid_LK[layer, low + 1]
    return low, ((width_NL - start) / (end - start)).clamp(0, 1)


@dataclass(frozen=True)
class Fit:
    """The coefficients of a model's latency.

    Attributes:
        fixed: milliseconds that no width changes.
        per_number: for each number that layers write.
        layers: factor of the layers' tables.
        correction: factor of all.
    """

    fixed: float
    per_number: float
    layers: float
    correction: float = 1.0


def fit(numbers_A: Sequence[float], tables_A: Sequence[float], ms_A: Sequence[float]) -> Fit:
    """Fit the coefficients on anchors, by relative error.

    Args:
        numbers_A: numbers that the layers of each anchor write.
        tables_A: sums of their tables.
        ms_A: what was measured.
    """
    from scipy.optimize import nnls  # takes 0.3 s to import, and few runs measure latency

    scale = max(*numbers_A, 1.0)
    rows = [
        [1.0 / ms, number / scale / ms, table / ms] for number, table, ms in zip(numbers_A, tables_A, ms_A, strict=True)
    ]
    found, _ = nnls(numpy.array([*rows, [0.0, 0.0, PRIOR]]), numpy.array([*[1.0] * len(rows), PRIOR]))
    return Fit(float(found[0]), float(found[1]) / scale, float(found[2]))


class LatencyCost:
    """Milliseconds of one forward pass as a function of the masks.

    Args:
        grouping: the groups of the dense model.
        macs: its MACs, which know the layers' widths.
        shapes, tables: of every layer that is timed, by name.

    Attributes:
        fitted: the coefficients; replaced by :meth:`anchor` and :meth:`correct`.
        dense: of the dense model.
    """

    timed: ClassVar[bool] = True

    def __init__(
        self,
        grouping: Grouping,
        macs: LinearCost,
        shapes: Mapping[str, LayerShape],
        tables: Mapping[str, LayerTable],
    ) -> None:
        self.names = [name for name in macs.names if name in shapes]
        self._chosen = torch.tensor([macs.names.index(name) for name in self.names], dtype=torch.int64)
        self._all = Widths.of(macs, grouping)
        self._macs, self._size = macs, grouping.size
        self._set_ids, self._sets = grouping.set_ids, len(grouping.sets)
        self._tables = _Tables([tables[name] for name in self.names])
        self._positions_L = torch.tensor([shapes[name].positions for name in self.names], dtype=torch.float64)
        self._dense_out_L = torch.tensor([shapes[name].outputs for name in self.names], dtype=torch.float64)
        self._dense_in_L = torch.tensor([shapes[name].inputs for name in self.names], dtype=torch.float64)
        self._groups_L = self._channels_of_inputs(shapes)
        self.fitted = Fit(0.0, 0.0, 1.0)

    def _channels_of_inputs(self, shapes: Mapping[str, LayerShape]) -> Tensor:
        """Input channels for each column of a weight: more than 1 in grouped convolutions."""
        columns = [max(shapes[name].groups, 1) if shapes[name].kind == "grouped" else 1 for name in self.names]
        return torch.tensor(columns, dtype=torch.float64)

    @property
    def dense(self) -> float:
        """Predicted milliseconds of the dense model."""
        return self(torch.ones(self._size, dtype=torch.bool))

    def __call__(self, keep_G: Tensor) -> float:
        """Milliseconds under a mask."""
        keep_G1 = torch.cat([keep_G.detach().cpu().double(), torch.ones(1, dtype=torch.float64)])
        return float(self._of_widths(*self._widths(keep_G), self._macs.there_L(keep_G1)[self._chosen])[0])

    def of_sets(self, kept_NS: Tensor) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`."""
        out_NL, in_NL = self._all.outputs(kept_NS)[:, self._chosen], self._all.inputs(kept_NS)[:, self._chosen]
        return self._of_widths(*self._completed(out_NL, in_NL), self._all.there(kept_NS)[:, self._chosen])

    def neighbours(self) -> Tensor:
        """See :class:`~pruningawaretraining.costs.widths.SetCost`."""
        return self._all.neighbours()

    def marginal_G(self, keep_G: Tensor) -> Tensor:
        """Cost of adding each group alone, with the others unchanged (0 for kept groups)."""
        kept_S = torch.zeros(self._sets, dtype=torch.float64)
        kept_S.index_add_(0, self._set_ids, keep_G.detach().cpu().double())
        more_SS = torch.cat([kept_S.unsqueeze(0), kept_S + torch.eye(self._sets, dtype=torch.float64)])
        cost = self.of_sets(more_SS)
        return (cost[1:] - cost[0])[self._set_ids] * ~keep_G.cpu().bool()

    def layers(self, keep_G: Tensor) -> dict[str, float]:
        """Milliseconds of every layer that is timed, from the tables."""
        times_L = self._tables(*self._widths(keep_G))[0] * self.fitted.layers * self.fitted.correction
        return dict(zip(self.names, times_L.tolist(), strict=True))

    def anchor(self, keeps_A: Sequence[Tensor], ms_A: Sequence[float]) -> None:
        """Fit the coefficients to measured copies.

        Args:
            keeps_A: masks of the copies.
            ms_A: what they took.
        """
        widths = [self._widths(keep_G) for keep_G in keeps_A]
        numbers = [float(self._numbers(out_NL)[0]) for out_NL, _ in widths]
        tables = [float(self._tables(*one).sum()) for one in widths]
        self.fitted = fit(numbers, tables, ms_A)

    @property
    def correction(self) -> float:
        """The factor of every prediction that the last measured copy has left."""
        return self.fitted.correction

    def correct(self, keep_G: Tensor, ms: float) -> None:
        """Correct the prediction for these masks to the measurement."""
        known = self.fitted
        self.fitted = Fit(known.fixed, known.per_number, known.layers, known.correction * ms / self(keep_G))

    def _widths(self, keep_G: Tensor) -> tuple[Tensor, Tensor]:
        keep_G1 = torch.cat([keep_G.detach().cpu().double(), torch.ones(1, dtype=torch.float64)])
        sides = []
        for side in (self._macs.out, self._macs.in_):
            kept_L = side.kept_L(keep_G1) * side.widths_L
            sides.append(kept_L[self._chosen].unsqueeze(0))
        return self._completed(sides[0], sides[1])

    def _completed(self, out_NL: Tensor, in_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in dense widths of layers outside the groups, and count channels of grouped convolutions in full."""
        out_NL = torch.where(self._macs.out.widths_L[self._chosen] > 0, out_NL, self._dense_out_L)
        known = self._macs.in_.widths_L[self._chosen] > 0
        return out_NL, torch.where(known, in_NL * self._groups_L, self._dense_in_L)

    def _numbers(self, out_NL: Tensor) -> Tensor:
        return (out_NL * self._positions_L).sum(1)

    def _of_widths(self, out_NL: Tensor, in_NL: Tensor, there_NL: Tensor) -> Tensor:
        known, layers_N = self.fitted, (self._tables(out_NL, in_NL) * there_NL).sum(1)
        varied_N = known.per_number * self._numbers(out_NL * there_NL) + known.layers * layers_N
        return known.correction * (known.fixed + varied_N)
