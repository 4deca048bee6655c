"""Blocked inverse Fisher: chunked Gram matrices and one Cholesky factorisation against a rank-1 update per gradient.

    OMP_NUM_THREADS=1 python benchmarks/second_order.py [--weights 1000000] [--grads 1024] [--width 192]

Both start from the same gradients and end with the same F^-1 in memory. The rank-1 updates are those that oBERT and CAP
publish: F^-1 starts at I / damp, and for every gradient v = F^-1 g, F^-1 -= v v' / (m + g'v). Each method runs in a
process of its own, so that peak memory is its own. The greedy order of CAP and its joint solve are timed beside.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import markdown, save
from torch import Tensor

from pruningawaretraining.criteria.second_order.fisher import GramFisher, LowRankFisher, parts
from pruningawaretraining.criteria.second_order.greedy import greedy_order

DAMP = 1e-3
SAMPLE = 4  # blocks whose inverses are compared with the exact ones


def chunks(blocks: int, width: int, count: int, size: int) -> Iterator[Tensor]:
    """Gradients (blocks, size, width), the same for every method: correlated, in one buffer that is used again."""
    buffer = torch.empty(blocks, size, width)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7)) / width**0.5
    for start in range(0, count, size):
        generator = torch.Generator().manual_seed(start)
        common = torch.randn(size, width, generator=generator) @ mixing
        buffer.copy_(common)
        buffer.mul_(torch.linspace(0.5, 1.5, blocks)[:, None, None])
        buffer.add_(torch.randn(size, width, generator=generator) * 0.3)
        yield buffer[:, : min(size, count - start)]


class Clock:
    """CPU and wall seconds inside ``with`` blocks."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def __enter__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall


def rank_one(blocks: int, width: int, count: int, clock: Clock) -> Tensor:
    inverse = torch.zeros(blocks, width, width)
    inverse.diagonal(dim1=1, dim2=2).fill_(1 / DAMP)
    for chunk in chunks(blocks, width, count, 64):
        for number in range(chunk.shape[1]):
            gradient = chunk[:, number, :, None].contiguous()
            with clock:
                v = inverse @ gradient
                scale = (count + gradient.mT @ v).reciprocal_()
                inverse.baddbmm_(v, (v * scale).mT, alpha=-1)
    return inverse


def gathered(fisher: Any, gradients: Iterator[Tensor], clock: Clock) -> Any:
    """The Fisher with all gradients in it; the chunk is forgotten before anything is inverted, as in the library."""
    for chunk in gradients:
        with clock:
            fisher.add(chunk)
    return fisher


def gram(blocks: int, width: int, count: int, clock: Clock) -> Tensor:
    fisher = gathered(GramFisher(blocks, width, DAMP), chunks(blocks, width, count, 64), clock)
    alive = torch.ones(blocks, width, dtype=torch.bool)
    with clock:
        for part in parts(blocks, width):
            fisher.gram_BDD[part] = fisher.inverses(part, alive[part]).float()
    return fisher.gram_BDD


def woodbury(blocks: int, width: int, count: int, clock: Clock) -> Tensor:
    fisher = gathered(LowRankFisher(blocks, width, DAMP, count), chunks(blocks, width, count, 64), clock)
    alive = torch.ones(blocks, width, dtype=torch.bool)
    inverse = torch.empty(blocks, width, width)
    with clock:
        for part in parts(blocks, width):
            inverse[part] = fisher.inverses(part, alive[part]).float()
    return inverse


METHODS: dict[str, Callable[[int, int, int, Clock], Tensor]] = {
    "rank-1 updates": rank_one,
    "chunked Gram, Cholesky": gram,
    "Woodbury": woodbury,
}


def largest_error(inverse: Tensor, blocks: int, width: int, count: int) -> float:
    """Largest error of the diagonal of some blocks, against float64."""
    rows = torch.cat([chunk[:SAMPLE].double().clone() for chunk in chunks(blocks, width, count, 64)], 1)
    exact = torch.linalg.inv(rows.mT @ rows / count + DAMP * torch.eye(width, dtype=torch.float64))
    exact, found = exact.diagonal(dim1=1, dim2=2), inverse[:SAMPLE].double().diagonal(dim1=1, dim2=2)
    return float(((found - exact) / exact).abs().max())


def run(name: str, blocks: int, width: int, count: int) -> dict[str, Any]:
    sum(chunk.shape[1] for chunk in chunks(blocks, width, 64, 64))  # what loads lazily is loaded, then the buffer goes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = Clock()
    inverse = METHODS[name](blocks, width, count, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # The buffer of gradients was in the peak before; it is counted with the method again.
    own = peak / 1024 + blocks * 64 * width * 4 / 2**20
    error = largest_error(inverse, blocks, width, count)
    times = {"CPU s": round(clock.cpu, 2), "wall s": round(clock.wall, 2)}
    return {**times, "peak MB": round(own), "error": f"{error:.1e}"}


def cap_times(width: int, weights: int) -> dict[str, float]:
    """Seconds for the greedy order and for one joint solve, for a tenth of the weights."""
    blocks = weights // 10 // width
    fisher = gathered(GramFisher(blocks, width, DAMP), chunks(blocks, width, 2 * width, 64), Clock())
    alive = torch.ones(blocks, width, dtype=torch.bool)
    values = torch.randn(blocks, width)
    greedy, joint = Clock(), Clock()
    for part in parts(blocks, width):
        with greedy:
            greedy_order(values[part].double(), fisher.inverses(part, alive[part]), alive[part].clone())
        with joint:
            fisher.joint_update(part, values[part], torch.rand(values[part].shape) < 0.5, alive[part])
    return {"greedy": greedy.cpu, "joint": joint.cpu}


def in_own_process(name: str, blocks: int, width: int, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, "--blocks", str(blocks), "--width", str(width)]
    out = subprocess.run([*command, "--grads", str(count)], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1_000_000)
    parser.add_argument("--grads", type=int, default=1024)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args.blocks, args.width, args.grads)))
        return
    rows = []
    for width, count in ((args.width, args.grads), (50, args.grads), (args.width, 64)):
        blocks = -(-args.weights // width)
        size, chunk = blocks * width * width * 4 / 2**20, blocks * width * 64 * 4 / 2**20
        names = ("rank-1 updates", "Woodbury" if count < width else "chunked Gram, Cholesky")
        found = {name: in_own_process(name, blocks, width, count) for name in names}
        slowest = found["rank-1 updates"]["CPU s"]
        for name, result in found.items():
            faster = round(slowest / result["CPU s"], 1)
            memory = {"F^-1 MB": round(size), "F^-1 and a chunk, MB": round(size + chunk)}
            rows.append({"B": width, "m": count, "method": name, **result, **memory, "times faster": faster})
    times = cap_times(args.width, args.weights)
    note = (
        f"{args.weights:,} weights. 'error' is the largest relative error of diag F^-1. A chunk of 64 gradients is in "
        f"the memory of both. After that, CAP's greedy order with its inverse takes {times['greedy'] * 10:.0f} CPU s "
        f"and one joint solve for a new sparsity {times['joint'] * 10:.0f} s at B = {args.width} (measured on a tenth)."
    )
    save("second_order", rows, "Inverse Fisher blocks for a layer of a million weights", note)
    print(markdown(rows))


if __name__ == "__main__":
    main()
