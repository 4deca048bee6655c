"""Single passes over a weight on the CPU, compiled if numba is installed (``pip install pruningawaretraining[fast]``).

PyTorch has no operation that sums a matrix's squares along both dimensions in one pass, that adds a matrix scaled along
both, that clears chosen entries in place, or that shrinks rows by their norms: from its own, several passes are made,
and these wait for memory. Nor has it one that ranks within many short rows. Everything here is float32, contiguous and
on the CPU; without numba :func:`kernels` is None, and callers use PyTorch's operations.

Shape suffixes: ``_ON`` a weight as a matrix of its first dimension and all the others, ``_O``, ``_N`` along these;
``_PRQ`` a weight seen as places that are chosen one by one (P, Q) and, between them, alike (R); ``_NM`` windows of M.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """The compiled passes; arguments are numpy arrays, an empty one stands for a dimension that does not count.

    Attributes:
        add_square_sums: ``(w_ON, sums_O, sums_N)``: add the squares to the sums along both dimensions.
        add_scaled: ``(g_ON, w_ON, factor_O, factor_N)``: ``g += w * (factor_O + factor_N)``.
        shrink_rows: ``(source_ON, target_ON, threshold_O)``: shorten every row by a threshold, to 0 at least.
        clear_chosen: ``(w_PRQ, chosen_PQ)``: set the chosen entries (uint8) to 0 at every R; returns how many were not.
        find_lowest: ``(values_NM, count, found_NM)``: True for the lowest of every row, the first among equals.
    """

    add_square_sums: Kernel
    add_scaled: Kernel
    shrink_rows: Kernel
    clear_chosen: Kernel
    find_lowest: Kernel


def _add_square_sums(w_ON: Any, sums_O: Any, sums_N: Any) -> None:
    """Four rows at a time, each from a quarter of its own: the sums of the columns are then read and written a quarter
    as often, and memory is read in four straight lines."""
    rows, quarter = w_ON.shape[0], w_ON.shape[0] // 4
    for o in range(quarter):
        a, b, c, d = w_ON[o], w_ON[o + quarter], w_ON[o + 2 * quarter], w_ON[o + 3 * quarter]
        total_a = a[0] * 0
        total_b, total_c, total_d = total_a, total_a, total_a
        if len(sums_N) > 0:
            for n in range(w_ON.shape[1]):
                square_a, square_b, square_c, square_d = a[n] * a[n], b[n] * b[n], c[n] * c[n], d[n] * d[n]
                total_a += square_a
                total_b += square_b
                total_c += square_c
                total_d += square_d
                sums_N[n] += square_a + square_b + square_c + square_d
        else:
            for n in range(w_ON.shape[1]):
                total_a += a[n] * a[n]
                total_b += b[n] * b[n]
                total_c += c[n] * c[n]
                total_d += d[n] * d[n]
        if len(sums_O) > 0:
            sums_O[o] += total_a
            sums_O[o + quarter] += total_b
            sums_O[o + 2 * quarter] += total_c
            sums_O[o + 3 * quarter] += total_d
    for o in range(4 * quarter, rows):
        for n in range(w_ON.shape[1]):
            if len(sums_O) > 0:
                sums_O[o] += w_ON[o, n] * w_ON[o, n]
            if len(sums_N) > 0:
                sums_N[n] += w_ON[o, n] * w_ON[o, n]


def _add_scaled(g_ON: Any, w_ON: Any, factor_O: Any, factor_N: Any) -> None:
    """Two rows at a time, each from a half of its own, and what is left of an odd number of rows."""
    half, zero = w_ON.shape[0] // 2, w_ON[0, 0] * 0
    for o in range(half):
        a, b, to_a, to_b, along_a, along_b = w_ON[o], w_ON[o + half], g_ON[o], g_ON[o + half], zero, zero
        if len(factor_O) > 0:
            along_a, along_b = factor_O[o], factor_O[o + half]
        if len(factor_N) > 0:
            for n in range(w_ON.shape[1]):
                to_a[n] += a[n] * (along_a + factor_N[n])
                to_b[n] += b[n] * (along_b + factor_N[n])
        else:
            for n in range(w_ON.shape[1]):
                to_a[n] += a[n] * along_a
                to_b[n] += b[n] * along_b
    for o in range(2 * half, w_ON.shape[0]):
        for n in range(w_ON.shape[1]):
            if len(factor_O) > 0:
                g_ON[o, n] += w_ON[o, n] * factor_O[o]
            if len(factor_N) > 0:
                g_ON[o, n] += w_ON[o, n] * factor_N[n]


def _clear_chosen(w_PRQ: Any, chosen_PQ: Any) -> int:
    """Clear chosen entries; what is 0 already is only read."""
    count = 0
    for p in range(w_PRQ.shape[0]):
        chosen = chosen_PQ[p]
        if w_PRQ.shape[2] == 1:
            if chosen[0]:
                strays = 0
                for r in range(w_PRQ.shape[1]):
                    strays += w_PRQ[p, r, 0] != 0
                for r in range(w_PRQ.shape[1] * min(strays, 1)):
                    w_PRQ[p, r, 0] = 0
                count += strays
            continue
        for r in range(w_PRQ.shape[1]):
            row, found = w_PRQ[p, r], chosen[0] & 0
            for q in range(len(row)):
                if row[q] != 0:
                    found |= chosen[q]
            if found:
                for q in range(len(row)):
                    count += chosen[q] * (row[q] != 0)
                    if chosen[q]:
                        row[q] = 0
    return count


def _find_lowest(values_NM: Any, count: int, found_NM: Any) -> None:
    for n in range(values_NM.shape[0]):
        for m in range(values_NM.shape[1]):
            before, value = 0, values_NM[n, m]
            for other in range(m):
                before += values_NM[n, other] <= value
            for other in range(m + 1, values_NM.shape[1]):
                before += values_NM[n, other] < value
            found_NM[n, m] = before < count


def _shrink_rows(source_ON: Any, target_ON: Any, threshold_O: Any) -> None:
    """Two rows at a time, each from a half of its own; while a row is written, the next one's norm is summed."""
    rows, half = source_ON.shape[0], source_ON.shape[0] // 2
    zero = threshold_O[0] * 0
    next_a, next_b = zero, zero
    for n in range(source_ON.shape[1] * min(half, 1)):
        next_a += source_ON[0, n] * source_ON[0, n]
        next_b += source_ON[half, n] * source_ON[half, n]
    for o in range(half):
        norm_a, norm_b, factor_a, factor_b = next_a**0.5, next_b**0.5, zero, zero
        if norm_a > threshold_O[o]:
            factor_a = (norm_a - threshold_O[o]) / norm_a
        if norm_b > threshold_O[o + half]:
            factor_b = (norm_b - threshold_O[o + half]) / norm_b
        after = min(o + 1, half - 1)
        a, b, to_a, to_b = source_ON[o], source_ON[o + half], target_ON[o], target_ON[o + half]
        after_a, after_b = source_ON[after], source_ON[after + half]
        next_a, next_b = zero, zero
        for n in range(source_ON.shape[1]):
            to_a[n] = a[n] * factor_a
            next_a += after_a[n] * after_a[n]
            to_b[n] = b[n] * factor_b
            next_b += after_b[n] * after_b[n]
    for o in range(2 * half, rows):
        a, to_a, total, factor = source_ON[o], target_ON[o], zero, zero
        for n in range(source_ON.shape[1]):
            total += a[n] * a[n]
        norm = total**0.5
        if norm > threshold_O[o]:
            factor = (norm - threshold_O[o]) / norm
        for n in range(source_ON.shape[1]):
            to_a[n] = a[n] * factor


def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def kernels() -> Kernels | None:
    """The compiled passes (compiled at the first call, then kept on disk), or None without numba."""
    if not available():
        return None
    import numba

    matrix, vector = numba.float32[:, ::1], numba.float32[::1]

    def compiled(function: Kernel, *arguments: Any, returns: Any = numba.void) -> Kernel:
        made: Kernel = numba.njit([returns(*arguments)], fastmath={"reassoc", "contract"}, nogil=True, cache=True)(
            function
        )
        return made

    return Kernels(
        compiled(_add_square_sums, matrix, vector, vector),
        compiled(_add_scaled, matrix, matrix, vector, vector),
        compiled(_shrink_rows, matrix, matrix, vector),
        compiled(_clear_chosen, numba.float32[:, :, ::1], numba.uint8[:, ::1], returns=numba.int64),
        compiled(_find_lowest, matrix, numba.int64, numba.boolean[:, ::1]),
    )


def fits(values_W: Tensor) -> bool:
    """Whether the compiled passes can work on a tensor."""
    return (
        values_W.dtype is torch.float32
        and values_W.device.type == "cpu"
        and values_W.dim() > 0
        and values_W.numel() > 0
        and values_W.is_contiguous()
    )


def as_matrix(values_W: Tensor) -> Any:
    """A tensor's memory as a numpy matrix whose rows are its first dimension."""
    return values_W.view(values_W.shape[0], -1).numpy()
