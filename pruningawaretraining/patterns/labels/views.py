"""Rules of operations that only rearrange: views, slices, concatenations, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pruningawaretraining.patterns.labels.follower import Call, Results, rule
from pruningawaretraining.patterns.labels.slots import Array, compressed, varying

CUT = "is cut at a place that the code states,"
PICKED = "is picked by number"


def one_dim(call: Call, key: str = "dim", default: int = 0) -> int:
    """A dimension among the arguments, counted from the front."""
    value = call.values.get(key)
    return int(default if value is None else value) % max(call.x.dim(), 1)


@rule(
    "clone detach alias contiguous _to_copy to lift_fresh positive conj _conj fill zero native_dropout "
    "dropout feature_dropout alpha_dropout bernoulli normal_functional uniform tril triu masked_fill "
    "exponential empty_like zeros_like ones_like full_like rand_like randn_like randint_like resolve_conj "
    "resolve_neg set_data _fake_quantize_learnable_per_tensor_affine "
    "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fused_moving_avg_obs_fq_helper fused_moving_avg_obs_fake_quant view_as nan_to_num normal random"
)
def _same(call: Call) -> Results:
    """The first argument as it is."""
    return [call.arrays(call.x)] if isinstance(call.x, torch.Tensor) else []


@rule("permute transpose t numpy_T swapaxes swapdims movedim adjoint")
def _permute(call: Call) -> Results:
    dims = call.x.dim()
    order = list(range(dims))
    if "dims" in call.values:
        order = [dim % dims for dim in call.values["dims"]]
    elif "dim0" in call.values:
        a, b = call.values["dim0"] % max(dims, 1), call.values["dim1"] % max(dims, 1)
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return [[array.transpose(order) for array in call.arrays(call.x)]]


@rule("unsqueeze squeeze")
def _squeeze(call: Call) -> Results:
    shape = tuple(call.out.shape)
    return [[array.reshape(_kept_ones(array, call, shape)) for array in call.arrays(call.x)]]


def _kept_ones(array: Array, call: Call, shape: tuple[int, ...]) -> tuple[int, ...]:
    if call.name == "unsqueeze":
        dim = call.values["dim"] % len(shape)
        return (*array.shape[:dim], 1, *array.shape[dim:])
    given = call.values.get("dim")
    dims = range(array.ndim) if given is None else ([given] if isinstance(given, int) else given)
    gone = {dim % array.ndim for dim in dims if call.x.shape[dim] == 1} if array.ndim else set()
    return tuple(size for dim, size in enumerate(array.shape) if dim not in gone)


@rule("view reshape _unsafe_view _reshape_alias flatten unflatten")
def _reshape(call: Call) -> Results:
    if not call.arrays(call.x) or not isinstance(call.out, torch.Tensor):
        return []
    before, after = tuple(call.x.shape), tuple(call.out.shape)
    if call.x.numel() == 0 or call.x.numel() != call.out.numel():  # view(dtype)
        return []
    found = []
    for array in call.arrays(call.x):
        new = reshaped(array, before, after)
        if len(varying(new)) > max(1, len(varying(array))):
            call.slots.cut(new)
            last = varying(new)[-1]  # along the others as many stay
            call.follower.sized(new.shape[last], new.reshape(-1)[: new.shape[last]])
            call.follower.sized(array.size, array)
        elif call.follower.stated and len(varying(new)) == 1:
            call.follower.sized(new.size, new)
        found.append(new)
    return [found]


def reshaped(array: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
    """An array's entries in another shape of its tensor; dimensions that merge are spelled out, no others."""
    wide, target = list(array.shape), [1] * len(after)
    for old, new in _segments(before, after):
        if any(array.shape[dim] > 1 for dim in old):
            for dim in old:
                wide[dim] = before[dim]
            for dim in new:
                target[dim] = after[dim]
    return compressed(np.broadcast_to(array, wide).reshape(target))


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of old and of new dimensions that hold the same entries."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new, left, right = [], [], 1, 1
        if i < len(before):
            left, i = before[i], i + 1
            old.append(i - 1)
        if j < len(after):
            right, j = after[j], j + 1
            new.append(j - 1)
        while left != right:
            if (left < right and i < len(before)) or j == len(after):
                left, i = left * before[i], i + 1
                old.append(i - 1)
            else:
                right, j = right * after[j], j + 1
                new.append(j - 1)
        yield old, new


@rule("expand broadcast_to expand_as")
def _expand(call: Call) -> Results:
    shape = tuple(call.out.shape)
    new = len(shape) - call.x.dim()
    found = [array.reshape((1,) * new + array.shape) for array in call.arrays(call.x)]
    widened = [dim for dim, size in enumerate(shape) if size > 1 and (dim < new or call.x.shape[dim - new] == 1)]
    return [[*found, *call.virtual(shape, widened)]]


@rule("repeat tile")
def _repeat(call: Call) -> Results:
    times = list(call.values.get("repeats") or call.values.get("dims") or ())
    shape = tuple(call.out.shape)
    new = len(shape) - call.x.dim()
    found = []
    for array in call.arrays(call.x):
        array = array.reshape((1,) * new + array.shape)
        found.append(np.tile(array, [count if array.shape[dim] > 1 else 1 for dim, count in enumerate(times)]))
    widened = [dim for dim, size in enumerate(shape) if size > 1 and (dim < new or call.x.shape[dim - new] == 1)]
    return [[*found, *call.virtual(shape, widened)]]


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Results:
    times, dim = call.values.get("repeats"), call.values.get("dim")
    if not isinstance(times, int) or dim is None:
        return [call.without(call.arrays(call.x), range(call.x.dim()), "reaches a repetition")]
    dim = dim % call.x.dim()
    return [[np.repeat(a, times, axis=dim) if a.shape[dim] > 1 else a for a in call.arrays(call.x)]]


@rule("select")
def _select(call: Call) -> Results:
    dim, index = one_dim(call), call.values["index"]
    found = []
    for array in call.arrays(call.x):
        if varying(array) == (dim,):
            call.lock(array, PICKED)
        found.append(np.take(array, index if array.shape[dim] > 1 else 0, axis=dim))
    return [found]


@rule("unbind")
def _unbind(call: Call) -> Results:
    dim = one_dim(call)
    pieces: list[list[Array]] = [[] for _ in call.outputs]
    for array in call.arrays(call.x):
        if varying(array) == (dim,):
            call.lock(array, PICKED)
        for number, piece in enumerate(pieces):
            piece.append(np.take(array, number if array.shape[dim] > 1 else 0, axis=dim))
    return pieces


@rule("slice narrow")
def _slice(call: Call) -> Results:
    dim = one_dim(call)
    size = call.x.shape[dim]
    start, stop, step = _bounds(call, size)
    return [[sliced(call, array, dim, start, stop, step) for array in call.arrays(call.x)]]


def _bounds(call: Call, size: int) -> tuple[int, int, int]:
    if call.name == "narrow":
        start = int(call.values["start"]) % max(size, 1)
        return start, start + int(call.values["length"]), 1
    start, stop, step = slice(call.values["start"], call.values["end"], call.values["step"]).indices(size)
    return start, stop, step


def sliced(call: Call, array: Array, dim: int, start: int, stop: int, step: int) -> Array:
    """The slots of a part of a dimension; what is cut off keeps as many, or all."""
    size = array.shape[dim]
    if size == 1:
        return array
    index = [slice(None)] * array.ndim
    index[dim] = slice(start, stop, step)
    places = {start, stop} - {0, size}
    if varying(array) == (dim,) and (places or step > 1):
        flat = array.reshape(-1)
        rest = math.gcd(size, *places)
        call.follower.sized(stop - start, flat[start:stop])
        if step > 1 or (rest == 1 and not is_natural(call, flat, places)):
            call.lock(array, CUT)
        elif not is_natural(call, flat, places):
            call.slots.cut(flat.reshape(-1, rest))
    return array[tuple(index)]


def is_natural(call: Call, flat: Array, places: set[int]) -> bool:
    """Whether a run of slots is cut only where those of some tensors end and those of others begin."""
    numbers = call.slots.owner_numbers(flat)
    return not any(np.isin(numbers[:place], numbers[place:]).any() for place in places)
