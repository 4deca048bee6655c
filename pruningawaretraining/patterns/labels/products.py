"""Rules of operations that sum products: matrices, attention, convolutions; of windows that slide, and of norms."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pruningawaretraining.patterns.labels.follower import INPUT, Call, Results, rule
from pruningawaretraining.patterns.labels.meeting import Operand, meet
from pruningawaretraining.patterns.labels.slots import Array, varying

HEADS = "is cut into the heads of an attention (prune it by heads)"
SLIDES = "reaches a window that slides over channels"


def _product(
    call: Call, p: tuple[Sequence[int], Sequence[Array], str], q: tuple[Sequence[int], Sequence[Array], str]
) -> list[Array]:
    """Slots of ``p @ q``: the dimensions in between are joined, those of batches meet, the others pass.

    Args:
        p, q: shape, slots, and why a dimension without slots is fixed.
    """
    dims = max(len(p[0]), len(q[0])) + 1
    p, q = ((shape, _of_heads(call, shape, arrays), why) for shape, arrays, why in (p, q))
    left = Operand.of((*p[0], 1), [one[..., None] for one in p[1]], dims, p[2])
    right = Operand.of(_apart(q[0]), [one.reshape(_apart(one.shape)) for one in q[1]], dims, q[2])
    both = meet(call.slots, [left, right], call.reason)
    call.work(both, -2)
    return [one.reshape((*one.shape[:-2], one.shape[-1])) for one in both if one.shape[-2] == 1]


def _of_heads(call: Call, shape: Sequence[int], arrays: Sequence[Array]) -> list[Array]:
    """Without channels that are cut into heads: those are groups of another kind."""
    found = []
    for array in arrays:
        own = varying(array)
        if own and own[0] < len(shape) - 2 and own[-1] >= len(shape) - 2:
            call.lock(array, HEADS)
        else:
            found.append(array)
    return found


def _apart(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], 1, *shape[-2:])


def _as_it_is(call: Call, tensor: Tensor) -> tuple[Sequence[int], Sequence[Array], str]:
    return tuple(tensor.shape), call.arrays(tensor), call.follower.why_fixed(tensor)


def _turned(call: Call, tensor: Tensor) -> tuple[Sequence[int], Sequence[Array], str]:
    shape, arrays, why = _as_it_is(call, tensor)
    return (*shape[:-2], shape[-1], shape[-2]), [one.swapaxes(-1, -2) for one in arrays], why


@rule("mm bmm matmul")
def _mm(call: Call) -> Results:
    p, q = call.tensors()[:2]
    return [_product(call, _as_it_is(call, p), _as_it_is(call, q))]


@rule("addmm baddbmm")
def _addmm(call: Call) -> Results:
    bias, p, q = call.tensors()[:3]
    return [_added(call, _product(call, _as_it_is(call, p), _as_it_is(call, q)), bias)]


def _added(call: Call, found: Sequence[Array], bias: Tensor | None) -> list[Array]:
    if bias is None:
        return list(found)
    dims = call.out.dim()
    return meet(call.slots, [Operand.of(call.out.shape, found, dims, INPUT), call.operand(bias, dims)], call.reason)


@rule("linear")
def _linear(call: Call) -> Results:
    x, weight = call.values["input"], call.values["weight"]
    shape, arrays, why = _as_it_is(call, x)
    if x.dim() == 1:
        shape, arrays = (1, *shape), [one[None] for one in arrays]
    found = [
        one.reshape(one.shape[-call.out.dim() :]) for one in _product(call, (shape, arrays, why), _turned(call, weight))
    ]
    return [_added(call, found, call.values["bias"])]


@rule("mv dot vdot")
def _mv(call: Call) -> Results:
    p, q = call.tensors()[:2]
    found = call.meet([p, q], p.dim())
    return [[one.reshape(one.shape[:-1]) for one in found if one.shape[-1] == 1]]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "scaled_dot_product_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps "
    "_scaled_dot_product_fused_attention_overrideable"
)
def _attention(call: Call) -> Results:
    """Queries and keys meet along their width, keys and values along positions; heads meet."""
    query, key, value = (call.values[name] for name in ("query", "key", "value"))
    scores = _product(call, _as_it_is(call, query), _turned(call, key))
    scores = call.without(scores, [query.dim() - 1], "reaches the softmax of an attention")
    mask = call.values.get("attn_mask", call.values.get("attn_bias"))
    shape = (*query.shape[:-1], key.shape[-2])
    if isinstance(mask, Tensor):
        scores = meet(
            call.slots, [Operand.of(shape, scores, len(shape), INPUT), call.operand(mask, len(shape))], call.reason
        )
        scores = call.without(scores, [query.dim() - 1], "reaches the softmax of an attention")
    return [_product(call, (shape, scores, INPUT), _as_it_is(call, value))]


# --- convolutions -------------------------------------------------------------------------------------------------


@rule("convolution _convolution mkldnn_convolution convolution_overrideable cudnn_convolution miopen_convolution")
def _convolution(call: Call) -> Results:
    x, weight, groups = call.values["input"], call.values["weight"], int(call.values["groups"])
    turned = bool(call.values.get("transposed"))
    spatial = range(x.dim() - weight.dim() + 2, x.dim())
    rows = call.without(call.arrays(x), spatial, SLIDES)
    kernel = call.without(call.arrays(weight), range(2, weight.dim()), SLIDES)
    rows = [one.reshape(one.shape[: spatial.start]) for one in rows]
    kernel = [one.reshape(one.shape[:2]) for one in kernel]
    found = _convolved(call, x, weight, rows, kernel, groups, turned)
    found = [one.reshape((*one.shape, *[1] * len(spatial))) for one in found]
    bias = call.values["bias"]
    if isinstance(bias, Tensor):
        shape = (-1, *[1] * len(spatial))
        along = [one.reshape(shape) for one in call.arrays(bias)]
        dims = call.out.dim()
        meets = [Operand.of(call.out.shape, found, dims, INPUT), Operand.of(bias.view(shape).shape, along, dims, INPUT)]
        found = meet(call.slots, meets, call.reason)
    return [found]


def _convolved(
    call: Call, x: Tensor, weight: Tensor, rows: list[Array], kernel: list[Array], groups: int, turned: bool
) -> list[Array]:
    """Slots of (batch, outputs): every group of inputs meets its kernels."""
    batch = x.shape[: x.dim() - weight.dim() + 1]
    inputs = (weight.shape[0] if turned else weight.shape[1] * groups) // groups
    outputs = (weight.shape[1] * groups if turned else weight.shape[0]) // groups
    many = len(batch)
    # Dimensions: batch, groups, outputs of a group, inputs of a group.
    left = [one.reshape((*one.shape[:-1], *_parts(one.shape[-1], groups, 1, inputs))) for one in rows]
    if turned:
        right = [one.reshape((*_parts(one.shape[0], groups, inputs), one.shape[1])).swapaxes(1, 2) for one in kernel]
    else:
        right = [one.reshape((*_parts(one.shape[0], groups, outputs), one.shape[1])) for one in kernel]
    if inputs == 1 and groups > 1:  # depthwise: the outputs of a group go with its input
        right = [call.slots.tie(one, [1]) for one in right]
    why = call.follower.why_fixed
    operands = [
        Operand((*batch, groups, 1, inputs), left, why(x)),
        Operand(
            (*[1] * many, groups, outputs, inputs),
            [one.reshape((*[1] * many, *one.shape)) for one in right],
            why(weight),
        ),
    ]
    met = meet(call.slots, operands, call.reason)
    call.work(met, -1)
    found = []
    for one in (one.squeeze(-1) for one in met if one.shape[-1] == 1):
        if one.shape[-1] > 1 or one.shape[-2] > 1:
            one = np.broadcast_to(one, (*one.shape[:-2], groups, outputs))
        found.append(one.reshape((*one.shape[:-2], -1)))
    return found


def _parts(size: int, *sizes: int) -> tuple[int, ...]:
    """A dimension's parts, or ones where an array does not vary along it."""
    return sizes if size > 1 else (1,) * len(sizes)


@rule("deform_conv2d")
def _deform_conv(call: Call) -> Results:
    values = {"input": call.values["input"], "weight": call.values["weight"], "bias": call.values.get("bias")}
    call.values = {**values, "groups": call.values["groups"]}
    return _convolution(call)


@rule(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d "
    "upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d replication_pad3d reflection_pad3d "
    "mkldnn_max_pool2d max_unpool2d"
)
def _windows(call: Call) -> Results:
    """Pools, resizing and padding by what is beside: over the last dimensions."""
    count = int((re.findall(r"(\d)d", call.name) or ["2"])[-1])
    dims = range(call.x.dim() - count, call.x.dim())
    kept = call.without(call.arrays(call.x), dims, SLIDES)
    return [kept for _ in call.outputs]


@rule("roi_align roi_pool grid_sampler_2d grid_sampler_3d ps_roi_align")
def _sampled(call: Call) -> Results:
    kept = call.without(call.arrays(call.x), [0, *range(2, call.x.dim())], SLIDES)
    return [kept for _ in call.outputs]


# --- norms --------------------------------------------------------------------------------------------------------


@rule(
    "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm "
    "batch_norm miopen_batch_norm _batch_norm_no_update _batch_norm_with_update _batch_norm_impl_index"
)
def _batch_norm(call: Call) -> Results:
    x, *vectors = (one for one in call.tensors() if one.dim())
    shape = (-1, *[1] * (x.dim() - 2))
    measured = (
        bool(call.values.get("training", "no_training" not in call.name)) or call.values.get("running_mean") is None
    )
    rows = _normalised(call, x, [0, *range(2, x.dim())]) if measured else call.arrays(x)
    meets = [call.operand(x, x.dim(), rows)]
    for one in vectors:
        if one.numel() == x.shape[1]:
            meets.append(_vector(call, one, shape, x.dim()))
    return [meet(call.slots, meets, call.reason)]


def _vector(call: Call, one: Tensor, shape: tuple[int, ...], dims: int) -> Operand:
    """A parameter of a norm, with one entry for each channel."""
    arrays = [array.reshape(shape) for array in call.arrays(one)]
    return Operand.of(one.view(shape).shape, arrays, dims, call.follower.why_fixed(one))


def _normalised(call: Call, x: Tensor, dims: Sequence[int]) -> list[Array]:
    """Slots of a tensor of which mean and variance over some dimensions are taken."""
    for array in call.arrays(x):
        if set(varying(array)) & set(dims):
            call.follower.mix(array, "a norm over channels")
    return call.arrays(x)


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def _layer_norm(call: Call) -> Results:
    x, *vectors = call.tensors()
    dims = range(x.dim() - len(call.values["normalized_shape"]), x.dim())
    _normalised(call, x, dims)
    return [call.meet([x, *vectors], x.dim())]


@rule("native_group_norm group_norm")
def _group_norm(call: Call) -> Results:
    x = call.x
    groups = int(call.values.get("group") or call.values["num_groups"])
    shape = (-1, *[1] * (x.dim() - 2))
    rows = call.arrays(x)
    for array in rows:
        if array.shape[1] > 1:
            call.slots.cut(np.moveaxis(array, 1, 0).reshape(groups, -1))
            if groups < array.shape[1]:
                call.follower.mix(array, "a norm over channels")
    meets = [call.operand(x, x.dim(), rows)]
    for one in call.tensors()[1:]:
        meets.append(_vector(call, one, shape, x.dim()))
    return [meet(call.slots, meets, call.reason)]
