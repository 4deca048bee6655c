"""Which product of a 2:4 weight is the fastest on a GPU, by measuring: dense, cuSPARSELt by algorithm, or CUTLASS.

Shape suffixes: ``_OI`` the weight of a linear layer, ``_NI`` rows that go into it, ``_NO`` rows that come out.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining.models.calling import first_line
from pruningawaretraining.models.comparison import gap_of

logger = logging.getLogger(__name__)

GAIN = 1.02
"""How many times as fast a sparse layer has to be: less is within the spread of the measurement."""
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far one product may be off by its dtype, as a fraction of its largest output; float32, perhaps TF32, 2e-3."""
RUNS, SAMPLES, WARMUP = 10, 5, 5
ROWS_MULTIPLE = 8
"""PyTorch pads the rows of an input to a multiple of this."""
FAILS = (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError)
"""Errors of a backend that is missing, or does not support the device, type or shape."""


@dataclass(frozen=True)
class Setting:
    """A way to compute with a sparse weight.

    Attributes:
        backend: "cusparselt" or "cutlass".
        algorithm: cuSPARSELt's number of it.
        fused: whether the product writes its result transposed, as a linear layer needs it, instead of a view of it.
    """

    backend: str
    algorithm: int = 0
    fused: bool = False


@dataclass(frozen=True)
class LayerSpeed:
    """Measurements of a layer.

    Attributes:
        name: of the layer.
        rows: of its input.
        dense_ms: milliseconds with the dense weight.
        sparse_ms: with the fastest sparse one; None where no backend can compute it.
        setting: the fastest; None likewise.
        converted: whether its weight is sparse now.
    """

    name: str
    rows: int
    dense_ms: float
    sparse_ms: float | None
    setting: Setting | None
    converted: bool

    @property
    def speedup(self) -> float | None:
        """How many times as fast the sparse layer is; below 1 it is slower."""
        return None if self.sparse_ms is None else self.dense_ms / self.sparse_ms

    def __str__(self) -> str:
        on = f"{self.dense_ms:.3g} ms dense, on {self.rows} rows"
        if self.sparse_ms is None or self.setting is None:
            return f"{self.name} stays dense: no backend for sparse products runs it ({on})"
        how = f"{self.setting.backend} takes {self.sparse_ms:.3g} ms, {on}: {self.speedup:.2f} times as fast"
        return f"{self.name} is sparse: {how}" if self.converted else f"{self.name} stays dense: {how}"


def choose(
    name: str, rows: int, dense_ms: float, sparse_ms: Mapping[Setting, float], only_faster: bool = True
) -> LayerSpeed:
    """The fastest setting of a layer, and whether to use it.

    Args:
        name, rows, dense_ms: as in :class:`LayerSpeed`.
        sparse_ms: milliseconds of every setting that computes the layer.
        only_faster: leave the layer dense unless the fastest is at least ``GAIN`` times as fast.
    """
    if not sparse_ms:
        return LayerSpeed(name, rows, dense_ms, None, None, False)
    best = min(sparse_ms, key=lambda setting: sparse_ms[setting])
    converted = not only_faster or dense_ms >= GAIN * sparse_ms[best]
    return LayerSpeed(name, rows, dense_ms, sparse_ms[best], best, converted)


class Bench(Protocol):
    """Packs weights and measures; :class:`GpuBench`, or one that is made up."""

    def settings(self, weight_OI: Tensor, given_NI: Tensor, bias: Tensor | None) -> list[Setting]:
        """The backends to try."""
        ...

    def pack(self, weight_OI: Tensor, setting: Setting) -> Tensor:
        """The weight as a sparse tensor that computes so."""
        ...

    def milliseconds(self, runs: Sequence[Callable[[], Any]], given_NI: Tensor) -> list[float]:
        """How long each function takes, measured in turns."""
        ...


@torch.no_grad()
def measure_layer(
    name: str, layer: nn.Linear, rows: int, bench: Bench, only_faster: bool = True
) -> tuple[LayerSpeed, Tensor | None]:
    """Measure a linear layer, dense and in every way that a sparse one can be computed; it stays as it is.

    A way that fails, or whose outputs are not those of the dense layer up to rounding, is left out.

    Args:
        name: of the layer.
        layer: its weight is 2:4.
        rows: of the input that it is measured on.
        bench: packs and measures.
        only_faster: see :func:`choose`.

    Returns:
        The measurements, and the sparse weight if it is to be used.
    """
    weight_OI, bias = layer.weight.detach(), layer.bias
    generator = torch.Generator(weight_OI.device).manual_seed(0)
    shape = (rows, weight_OI.shape[1])
    given_NI = torch.randn(shape, generator=generator, device=weight_OI.device, dtype=weight_OI.dtype)
    expected_NO = functional.linear(given_NI, weight_OI, bias)
    packed: dict[Setting, Tensor] = {}
    for setting in bench.settings(weight_OI, given_NI, bias):
        try:
            sparse = bench.pack(weight_OI, setting)
            gap, largest = gap_of(expected_NO, functional.linear(given_NI, sparse, bias))
        except FAILS as error:
            logger.debug("%s: %s cannot compute it: %s", name, setting, first_line(error))
            continue
        if gap > TOLERANCES.get(weight_OI.dtype, 2e-3) * largest:
            apart = gap / max(largest, 1e-300)
            logger.warning("%s: %s is %.2g of the output off, and is left out", name, setting, apart)
        else:
            packed[setting] = sparse
    weights = [weight_OI, *packed.values()]
    dense_ms, *times = bench.milliseconds([_product(given_NI, one, bias) for one in weights], given_NI)
    found = choose(name, rows, dense_ms, dict(zip(packed, times, strict=True)), only_faster)
    return found, packed[found.setting] if found.converted and found.setting else None


def _product(given_NI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """The layer's product, with a copy where the result is a view that what follows would have to copy."""
    return lambda: functional.linear(given_NI, weight_OI, bias).contiguous()


class GpuBench:
    """PyTorch's semi-structured tensors on a CUDA device, timed by its events."""

    def settings(self, weight_OI: Tensor, given_NI: Tensor, bias: Tensor | None) -> list[Setting]:
        """See :class:`Bench`: CUTLASS, and cuSPARSELt with its own choice of algorithm beside the first of them."""
        found = [Setting("cutlass")]
        for fused in (True, False):
            algorithms = {0}
            with contextlib.suppress(*FAILS):
                algorithms.add(_searched(weight_OI, given_NI, bias, fused))
            found += [Setting("cusparselt", algorithm, fused) for algorithm in sorted(algorithms)]
        return found

    def pack(self, weight_OI: Tensor, setting: Setting) -> Tensor:
        """See :class:`Bench`."""
        kinds: Any = torch.sparse
        if setting.backend == "cutlass":
            return kinds.SparseSemiStructuredTensorCUTLASS.from_dense(weight_OI)  # type: ignore[no-any-return]
        sparse: Any = kinds.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight_OI)
        sparse.alg_id_cusparselt, sparse.fuse_transpose_cusparselt = setting.algorithm, setting.fused
        return sparse  # type: ignore[no-any-return]

    def milliseconds(self, runs: Sequence[Callable[[], Any]], given_NI: Tensor) -> list[float]:
        """See :class:`Bench`: the median of several samples, each of several runs on end."""
        with _on(given_NI.device):
            for run in runs:
                for _ in range(WARMUP):
                    run()
            samples = [[_sample(run) for run in runs] for _ in range(SAMPLES)]
        return [statistics.median(times) for times in zip(*samples, strict=True)]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device)


def _sample(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(RUNS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / RUNS


def _searched(weight_OI: Tensor, given_NI: Tensor, bias: Tensor | None, fused: bool) -> int:
    """cuSPARSELt's own choice of an algorithm for this product."""
    compressed = torch._cslt_compress(weight_OI)
    padded_NI = functional.pad(given_NI, (0, 0, 0, -len(given_NI) % ROWS_MULTIPLE))
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is not None:
        return int(search(compressed, padded_NI.t(), bias, None, None, fused)[0])
    return torch._cslt_sparse_mm_search(compressed, padded_NI.t(), bias=bias, transpose_result=fused)
