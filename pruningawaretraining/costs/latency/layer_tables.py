"""How long one layer takes at any width: measured on a grid of widths, and what odd widths cost on top.

Shape suffixes: ``_O`` output widths of the grid, ``_I`` its input widths.

Kernels work on blocks of channels, so time is a staircase: a convolution with 63 inputs can take half as long again as
one with 64. The grid holds round widths, with straight lines between them; what a width costs beyond that line is
measured once for every remainder (of 8 or 16) along each side, next to the dense width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from pruningawaretraining.costs.latency.layer_shapes import LayerShape
from pruningawaretraining.costs.latency.layer_timers import Timer, time_modules
from pruningawaretraining.registry import lookup, names
from pruningawaretraining.runtimes.runtime import Runtime

FRACTIONS = (1.0, 0.75, 0.5, 0.25)
BLOCK, SMALL_BLOCK, SMALL = 16, 8, 64
VERSION = 3  # of how a table is measured: a change makes tables on disk count as absent


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Milliseconds of one layer over its widths.

    Attributes:
        outputs_O, inputs_I: the grid, ascending.
        ms_OI: times on it.
        odd_out, odd_in: factor for each remainder of a width, the period being their length (1 for round widths).
    """

    outputs_O: tuple[int, ...]
    inputs_I: tuple[int, ...]
    ms_OI: tuple[tuple[float, ...], ...]
    odd_out: tuple[float, ...] = (1.0,)
    odd_in: tuple[float, ...] = (1.0,)

    def __call__(self, outputs: float, inputs_: float) -> float:
        """Milliseconds at some widths."""
        straight = _bilinear(self, outputs, inputs_)
        return (
            straight * self.odd_out[round(outputs) % len(self.odd_out)] * self.odd_in[round(inputs_) % len(self.odd_in)]
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerTable:
        """The opposite of :meth:`to_json`."""
        plain = {key: tuple(one) for key, one in values.items()}
        plain["ms_OI"] = tuple(tuple(row) for row in values["ms_OI"])
        return cls(**plain)


def _bilinear(table: LayerTable, outputs: float, inputs_: float) -> float:
    rows = [float(numpy.interp(inputs_, table.inputs_I, row)) for row in table.ms_OI]
    return float(numpy.interp(outputs, table.outputs_O, rows))


def axis(width: int) -> tuple[int, ...]:
    """Round widths from the dense one down, ascending."""
    if width < SMALL:
        wanted = {width, *range(SMALL_BLOCK, width, SMALL_BLOCK), *([4] if width > 4 else [])}
    else:
        wanted = {width, SMALL_BLOCK}
        wanted |= {max(round(fraction * width / BLOCK), 1) * BLOCK for fraction in FRACTIONS[1:]}
        wanted |= {(width - 1) // BLOCK * BLOCK}
    return tuple(sorted(one for one in wanted if one <= width))


def _odd(width: int) -> list[int]:
    """Widths of every remainder, next to the dense width."""
    block = SMALL_BLOCK if width < SMALL else BLOCK
    base = (width - 1) // block * block
    if base < 1 or width < 2 * block:
        return []
    return [base - block + remainder for remainder in range(1, block)]


def measure_table(shape: LayerShape, runtime: Runtime, name: str, threads: int) -> LayerTable:
    """Time a layer on its grid.

    Args:
        shape: the layer.
        runtime, name: where, and its registered name.
        threads: threads within an operator.

    Raises:
        ConfigError, ModelError: the runtime is not there, or cannot run it.
    """
    timer: Timer = lookup("layer_timer", name) if name in names("layer_timer") else time_modules
    dense = (shape.outputs, shape.inputs)
    if shape.kind == "grouped":  # widths of tied groups: time as multiply-accumulates go
        ms = timer(shape, [dense], runtime, threads)[0]
        return LayerTable((0, dense[0]), (0, dense[1]), ((0.0, 0.0), (0.0, ms)))
    if shape.kind == "depthwise":
        return _measure_line(shape, timer, runtime, threads)
    outputs, inputs_ = axis(dense[0]), axis(dense[1])
    odd_out, odd_in = _odd(dense[0]), _odd(dense[1])
    points = [(o, i) for o in outputs for i in inputs_]
    extra = [(o, dense[1]) for o in odd_out] + [(dense[0], i) for i in odd_in]
    times = timer(shape, points + extra, runtime, threads)
    grid = [tuple(times[row * len(inputs_) : (row + 1) * len(inputs_)]) for row in range(len(outputs))]
    table = LayerTable(outputs, inputs_, tuple(grid))
    beyond = [ms / max(_bilinear(table, *at), 1e-9) for at, ms in zip(extra, times[len(points) :], strict=True)]
    return dataclasses.replace(
        table, odd_out=_factors(odd_out, beyond[: len(odd_out)]), odd_in=_factors(odd_in, beyond[len(odd_out) :])
    )


def _measure_line(shape: LayerShape, timer: Timer, runtime: Runtime, threads: int) -> LayerTable:
    """A depthwise convolution has one width."""
    widths, odd = axis(shape.outputs), _odd(shape.outputs)
    times = timer(shape, [(width, width) for width in (*widths, *odd)], runtime, threads)
    table = LayerTable(widths, (shape.inputs,), tuple((ms,) for ms in times[: len(widths)]))
    beyond = [
        ms / max(_bilinear(table, at, shape.inputs), 1e-9) for at, ms in zip(odd, times[len(widths) :], strict=True)
    ]
    return dataclasses.replace(table, odd_out=_factors(odd, beyond))


def _factors(widths: Sequence[int], beyond: Sequence[float]) -> tuple[float, ...]:
    """Factor for each remainder; small differences are noise."""
    if not widths:
        return (1.0,)
    period = len(widths) + 1
    found = {width % period: ratio for width, ratio in zip(widths, beyond, strict=True)}
    return tuple(1.0 if abs(found.get(one, 1.0) - 1) < 0.03 else max(found[one], 0.9) for one in range(period))
