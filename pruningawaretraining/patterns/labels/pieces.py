"""Rules of operations that take apart and put together: splits, concatenations, padding, shuffles; and new tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pruningawaretraining.patterns.labels.follower import Call, Results, rule
from pruningawaretraining.patterns.labels.meeting import Operand, meet
from pruningawaretraining.patterns.labels.slots import NOBODY, Array, compressed, varying
from pruningawaretraining.patterns.labels.views import is_natural, one_dim, sliced

FIXED_PART = "stands beside channels whose number is fixed"


@rule(
    "split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unsafe_split_with_sizes split_copy "
    "split_with_sizes_copy"
)
def _split(call: Call) -> Results:
    dim = one_dim(call)
    sizes = [one.shape[dim] for one in call.outputs]
    places = np.cumsum([0, *sizes]).tolist()
    pieces: list[list[Array]] = [[] for _ in sizes]
    for array in call.arrays(call.x):
        if array.shape[dim] == 1:
            for piece in pieces:
                piece.append(array)
            continue
        if varying(array) == (dim,):
            _cut_pieces(call, array.reshape(-1), places)
        for piece, first, last in zip(pieces, places, places[1:], strict=False):
            piece.append(np.take(array, range(first, last), axis=dim))
    return pieces


def _cut_pieces(call: Call, flat: Array, places: list[int]) -> None:
    """Equal pieces keep equally many; those that are tensors of their own are free."""
    sizes = np.diff(places)
    call.follower.sized(len(flat), flat)
    for first, last in zip(places, places[1:], strict=False):
        call.follower.sized(last - first, flat[first:last])
    if is_natural(call, flat, set(places[1:-1])) or not (sizes[:-1] == sizes[0]).all():
        return
    rows = np.full((len(sizes), int(sizes.max())), NOBODY)
    for number, (first, last) in enumerate(zip(places, places[1:], strict=False)):
        rows[number, : last - first] = flat[first:last]
    call.slots.cut(rows)


@rule("cat concat concatenate")
def _cat(call: Call) -> Results:
    tensors = [one for one in call.values["tensors"] if one.numel()]
    dims = call.out.dim()
    dim = int(call.values["dim"] or 0) % max(dims, 1)
    along = [[array for array in call.arrays(one) if array.shape[dim] > 1] for one in tensors]
    across = [
        Operand(
            tuple(1 if d == dim else size for d, size in enumerate(one.shape)),
            [array for array in call.arrays(one) if array.shape[dim] == 1],
            call.follower.why_fixed(one),
        )
        for one in tensors
    ]
    found = meet(call.slots, across, call.reason)
    for number in range(max((len(one) for one in along), default=0)):
        parts = [_part(call, one, own, number, dim) for one, own in zip(tensors, along, strict=True)]
        full = [max(part.shape[d] for part in parts) for d in range(dims)]
        wide = [np.broadcast_to(p, [p.shape[d] if d == dim else full[d] for d in range(dims)]) for p in parts]
        found.append(np.concatenate(wide, axis=dim))
    return [found]


def _part(call: Call, tensor: Any, arrays: list[Array], number: int, dim: int) -> Array:
    if number < len(arrays):
        return arrays[number]
    shape = [1] * tensor.dim()
    shape[dim] = tensor.shape[dim]
    if arrays:
        return np.full(shape, NOBODY)
    part = call.slots.new(tensor.shape[dim]).reshape(shape)
    if number == 0:
        call.lock(part, FIXED_PART)
    return part


@rule("stack")
def _stack(call: Call) -> Results:
    dim = int(call.values["dim"]) % call.out.dim()
    found = call.meet(call.values["tensors"], call.out.dim() - 1)
    return [[array.reshape((*array.shape[:dim], 1, *array.shape[dim:])) for array in found]]


@rule("flip")
def _flip(call: Call) -> Results:
    dims = [dim % call.x.dim() for dim in call.values["dims"]]
    return [[np.flip(array, tuple(dim for dim in dims if array.shape[dim] > 1)) for array in call.arrays(call.x)]]


@rule("roll")
def _roll(call: Call) -> Results:
    dims = [dim % call.x.dim() for dim in call.values["dims"]]
    if not dims:
        return [call.without(call.arrays(call.x), range(call.x.dim()), "reaches a roll of all entries")]
    found = []
    for array in call.arrays(call.x):
        moved = {dim: shift for dim, shift in zip(dims, call.values["shifts"], strict=True) if array.shape[dim] > 1}
        if moved and set(varying(array)) <= set(moved):
            call.lock(array, "is rolled by a number that the code states")
        found.append(np.roll(array, list(moved.values()), list(moved)) if moved else array)
    return [found]


@rule("constant_pad_nd pad")
def _constant_pad(call: Call) -> Results:
    pads = call.values["pad"]
    dims = call.x.dim()
    found = []
    for array in call.arrays(call.x):
        for number in range(len(pads) // 2):
            dim, before, after = dims - 1 - number, pads[2 * number], pads[2 * number + 1]
            if array.shape[dim] > 1 and (before or after):
                array = _padded(call, array, dim, before, after)
        found.append(array)
    return [found]


def _padded(call: Call, array: Array, dim: int, before: int, after: int) -> Array:
    first, last = max(-before, 0), array.shape[dim] - max(-after, 0)
    if first or last < array.shape[dim]:
        array = sliced(call, array, dim, first, last, 1)
    parts = []
    for count in (before, after):
        shape = [1] * array.ndim
        shape[dim] = max(count, 0)
        target = [max(count, 0) if d == dim else size for d, size in enumerate(array.shape)]
        parts.append(np.broadcast_to(call.slots.new(max(count, 0)).reshape(shape), target))
    return np.concatenate([parts[0], array, parts[1]], axis=dim)


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Results:
    square = call.values["upscale_factor"] ** 2
    dim = call.x.dim() - 3
    found = []
    for array in call.without(call.arrays(call.x), [dim + 1, dim + 2], "reaches a pixel shuffle of its positions"):
        if array.shape[dim] > 1:
            rows = np.moveaxis(array, dim, -1)
            rows = call.slots.tie(rows.reshape(*rows.shape[:-1], -1, square), [rows.ndim])[..., 0]
            array = np.moveaxis(rows, -1, dim)
        found.append(array)
    return [found]


@rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Results:
    square, dim = call.values["downscale_factor"] ** 2, call.x.dim() - 3
    kept = call.without(call.arrays(call.x), [dim + 1, dim + 2], "reaches a pixel shuffle of its positions")
    return [[np.repeat(array, square, axis=dim) if array.shape[dim] > 1 else array for array in kept]]


@rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(call: Call) -> Results:
    groups = call.values["groups"]
    found = []
    for array in call.arrays(call.x):
        if array.shape[1] > 1:
            rows = np.moveaxis(array, 1, 0)
            rows = rows.reshape(groups, -1, *rows.shape[1:])
            call.slots.cut(rows)
            array = np.moveaxis(rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:]), 0, 1)
        found.append(array)
    return [found]


@rule("im2col")
def _unfold(call: Call) -> Results:
    places = math.prod(call.values["kernel_size"])
    kept = call.without(call.arrays(call.x), [2, 3], "reaches an unfold of its positions")
    return [
        [np.repeat(a.reshape(a.shape[:3]), places, axis=1) if a.shape[1] > 1 else a.reshape(a.shape[:3]) for a in kept]
    ]


@rule("col2im")
def _fold(call: Call) -> Results:
    places = math.prod(call.values["kernel_size"])
    found = []
    for array in call.without(call.arrays(call.x), [2], "reaches a fold of its positions"):
        if array.shape[1] > 1:
            array = call.slots.tie(array.reshape(array.shape[0], -1, places, 1), [2])
        found.append(array.reshape(array.shape[0], -1, 1, 1))
    return [found]


@rule(
    "zeros ones full empty arange linspace eye rand randn randint scalar_tensor randperm new_zeros new_ones "
    "new_full new_empty hann_window logspace empty_strided new_empty_strided"
)
def _made(call: Call) -> Results:
    """A tensor that the code makes: its sizes are what the code computes."""
    return [call.virtual(one.shape, range(one.dim())) for one in call.outputs]


@rule("as_strided unfold diagonal view_as_complex view_as_real rot90")
def _spelled_out(call: Call) -> Results:
    """Run the operation itself on the slots of every entry, where that is simpler than a rule for it."""
    if call.x.numel() > 1 << 22 or call.name.startswith("view_as"):
        return [call.without(call.arrays(call.x), range(call.x.dim()), f"reaches {call.name!r}")]
    values = list(call.values.values())[1:]
    found = []
    for array in call.arrays(call.x):
        entries = torch.from_numpy(np.broadcast_to(array, call.x.shape).copy())
        new = compressed(call.func(entries, *values).numpy())
        call.slots.cut(new)
        found.append(new)
    return [found]
