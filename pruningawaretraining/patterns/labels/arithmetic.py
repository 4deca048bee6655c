"""Rules of operations that compute entry by entry, reduce, and look up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruningawaretraining.patterns.labels.follower import INPUT, Call, Results, rule
from pruningawaretraining.patterns.labels.meeting import Operand, meet
from pruningawaretraining.patterns.labels.slots import Array, compressed, varying
from pruningawaretraining.patterns.labels.views import one_dim


@rule(
    "pointwise copy where lerp addcmul addcdiv masked_fill _prelu_kernel rrelu_with_noise clamp relu relu6 "
    "hardtanh leaky_relu silu gelu sigmoid hardswish hardsigmoid elu mish softplus celu selu threshold pow "
    "rsqrt sqrt exp log sub rsub add mul div bitwise_not logical_not"
)
def _pointwise(call: Call) -> Results:
    """Operations entry by entry: all operands meet."""
    tensors = call.tensors()
    dims = call.outputs[0].dim() if call.outputs else 0
    if call.name == "masked_fill":  # the number of what is filled may come from anywhere
        tensors = tensors[:2]
    found = call.meet(tensors, dims)
    return [found for _ in call.outputs]


@rule("softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp")
def _softmax(call: Call) -> Results:
    dim = one_dim(call)
    kept = call.without(call.arrays(call.x), [dim], f"reaches {_article(call.name)} over channels")
    return [kept for _ in call.outputs]


def _article(name: str) -> str:
    shown = {"cumsum": "a cumulative sum", "sort": "a sort", "topk": "a top-k choice"}
    return shown.get(name, "a softmax" if "softmax" in name else f"a {name!r}")


@rule("sort argsort msort topk kthvalue unique_consecutive _unique2 mode median")
def _ordered(call: Call) -> Results:
    dim = one_dim(call, default=-1)
    kept = call.without(call.arrays(call.x), [dim], f"reaches {_article(call.name)} over channels")
    return [[a for a in kept if a.ndim == one.dim()] for one in call.outputs]


@rule("glu")
def _glu(call: Call) -> Results:
    dim = one_dim(call, default=-1)
    half = call.x.shape[dim] // 2
    parts: list[list[Array]] = [[], []]
    for array in call.arrays(call.x):
        for number, part in enumerate(parts):
            whole = array.shape[dim] == 1
            part.append(array if whole else np.take(array, range(number * half, (number + 1) * half), axis=dim))
        _halved(call, array, dim)
    operands = [Operand.of(call.out.shape, part, call.out.dim(), INPUT) for part in parts]
    return [meet(call.slots, operands, call.reason)]


def _halved(call: Call, array: Array, dim: int) -> None:
    if array.shape[dim] > 1:
        call.slots.cut(np.moveaxis(array, dim, -1).reshape(-1, 2, array.shape[dim] // 2)[0])


# --- reductions ---------------------------------------------------------------------------------------------------


@rule(
    "mean sum var std var_mean std_mean amax amin max min prod norm linalg_vector_norm logsumexp nansum any "
    "all argmax argmin count_nonzero aminmax nanmean linalg_norm"
)
def _reduction(call: Call) -> Results:
    if len(call.tensors()) > 1:  # max(x, y)
        return _pointwise(call)
    x, given = call.x, call.values.get("dim")
    if given is None or given == []:
        dims = set(range(x.dim()))
    else:
        dims = {dim % max(x.dim(), 1) for dim in ([given] if isinstance(given, int) else given)}
    found = []
    for array in call.arrays(x):
        own = set(varying(array))
        if own and own <= dims:
            _reduced(call, array)
        else:
            found.append(call.slots.tie(array, own & dims))
    keep = call.outputs[0].dim() == x.dim()
    left = [dim for dim in range(x.dim()) if dim not in dims]
    return [[a if keep else a.reshape([a.shape[dim] for dim in left]) for a in found] for _ in call.outputs]


def _reduced(call: Call, array: Array) -> None:
    """All channels become one number: a sum is the same without those that are 0, anything else is not."""
    if call.name in ("argmax", "argmin"):
        call.lock(array, "reaches an argmax over channels")
    elif call.name not in ("sum", "nansum", "any", "norm", "linalg_vector_norm", "count_nonzero"):
        call.follower.mix(array, f"a {call.name} over channels")


# --- looking up ---------------------------------------------------------------------------------------------------


@rule("embedding")
def _embedding(call: Call) -> Results:
    weight, indices = call.tensors()[:2]
    found = []
    for array in call.arrays(weight):
        if array.shape[0] > 1:
            call.lock(array, "is looked up by number")
        else:
            found.append(array.reshape((*[1] * indices.dim(), -1)))
    return [found]


@rule("index _unsafe_index")
def _index(call: Call) -> Results:
    indices: list[Any] = list(call.values["indices"])
    dims: list[int] = []
    dim = 0
    for one in indices:
        count = one.dim() if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) else 1
        if one is not None:
            dims += range(dim, dim + count)
        dim += count
    kept = call.without(call.arrays(call.x), dims, "is looked up by number")
    cpu = [None if one is None or one.is_meta else one.cpu() for one in indices]
    if any(one is not None and own is None for one, own in zip(indices, cpu, strict=True)):
        cpu = [None if one is None else torch.zeros(one.shape, dtype=torch.int64) for one in indices]
    return [[_looked_up(call, array, cpu, dims) for array in kept]]


def _looked_up(call: Call, array: Array, indices: list[Any], dims: Sequence[int]) -> Array:
    wide = [call.x.shape[dim] if dim in dims else size for dim, size in enumerate(array.shape)]
    entries = torch.from_numpy(np.broadcast_to(array, wide).copy())
    found: Array = entries[tuple(slice(None) if one is None else one for one in indices)].numpy()
    return compressed(found)


@rule("index_select take_along_dim")
def _index_select(call: Call) -> Results:
    return [call.without(call.arrays(call.x), [one_dim(call)], "is looked up by number")]


@rule("gather")
def _gather(call: Call) -> Results:
    dim = one_dim(call)
    kept = call.without(call.arrays(call.x), [dim], "is looked up by number")
    places = call.without(call.arrays(call.values["index"]), [dim], "is looked up by number")
    return [_meet_beside(call, [(call.x, kept), (call.values["index"], places)], [dim])]


@rule("scatter scatter_add scatter_reduce index_add index_put _index_put_impl index_copy index_fill masked_scatter")
def _scatter(call: Call) -> Results:
    """Written by number: other dimensions meet, those that are indexed stay."""
    x = call.x
    dims = list(range(x.dim()))
    if isinstance(call.values.get("dim"), int):
        dims = [call.values["dim"] % x.dim()]
    elif "indices" in call.values:
        dims = [number for number, one in enumerate(call.values["indices"]) if one is not None]
    source = next((call.values[key] for key in ("src", "source", "values") if key in call.values), None)
    kept = call.without(call.arrays(x), dims, "is written by number")
    meets = [(x, kept)]
    if isinstance(source, Tensor) and source.dim() <= x.dim():
        missing = x.dim() - source.dim()  # leading dimensions of 1 may be left out
        own = [dim - missing for dim in dims if dim >= missing]
        meets.append((source, call.without(call.arrays(source), own, "is written by number")))
    return [_meet_beside(call, meets, dims)]


def _meet_beside(call: Call, tensors: Sequence[tuple[Tensor, list[Array]]], dims: Sequence[int]) -> list[Array]:
    """Tensors meet along every dimension but these."""
    operands = []
    for tensor, arrays in tensors:
        missing = call.x.dim() - tensor.dim()
        shape = [1 if dim + missing in dims else size for dim, size in enumerate(tensor.shape)]
        operands.append(Operand.of(shape, arrays, call.x.dim(), call.follower.why_fixed(tensor)))
    return meet(call.slots, operands, call.reason)


@rule("_fft_r2c _fft_c2c _fft_c2r")
def _fourier(call: Call) -> Results:
    dims = [dim % call.x.dim() for dim in call.values["dim"]]
    return [call.without(call.arrays(call.x), dims, "reaches a Fourier transform over channels")]


@rule("_local_scalar_dense is_nonzero equal _is_all_true _is_any_true sym_size nonzero _assert_async isnan")
def _looked_at(call: Call) -> Results:
    """Numbers that the code looks at: nothing is made of the tensor."""
    return []
