"""Whether zeros in blocks pay on a CPU: a linear layer, dense and sparse, in what is at hand.

One product of a batch with a weight of 1024 x 1024 on one thread, at 80% sparsity (2:4 at 50%): PyTorch dense, its CSR
and BSR tensors, SciPy's BSR, and onnxruntime with the zeros in its weight. Median CPU milliseconds in turns.

    python benchmarks/block_sparse.py [--rounds 31]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import scipy.sparse
import torch
from common import interleaved, markdown, save
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, export_onnx

PATTERNS = {"4x1": (0.8, (4, 1)), "1x16": (0.8, (1, 16)), "16x16": (0.8, (16, 16)), "2:4": (0.5, None)}
WIDTH = 1024


def session(layer: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    """The layer in onnxruntime on one thread."""
    path = folder / "layer.onnx"
    export_onnx(layer, x, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {made.get_inputs()[0].name: x.numpy()}
    return lambda: made.run(None, given)


def row(pattern: str, batch: int, rounds: int) -> dict[str, Any]:
    """One pattern: every form of the same product, checked against the dense one."""
    torch.manual_seed(0)
    sparsity, block = PATTERNS[pattern]
    x, layer = torch.randn(batch, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    rule = {"pattern": pattern, "criterion": "weight", "layers": ["0"], "target": {"sparsity": sparsity}}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        dense_session = session(layer, x, Path(one))
        Pruning(nn.Sequential(layer), {"rules": [rule]}).prune(epoch=0)
        sparse_session = session(layer, x, Path(other))
    weight = layer.weight.detach()
    products: dict[str, Callable[[], Any]] = {
        "PyTorch dense": lambda: functional.linear(x, weight),
        "onnxruntime, dense weight": dense_session,
        "onnxruntime, pruned weight": sparse_session,
    }
    csr = weight.to_sparse_csr()
    products["PyTorch CSR"] = lambda: (csr @ x.T).T
    if block is not None:
        blocks = scipy.sparse.bsr_array(scipy.sparse.csr_array(weight.numpy()), blocksize=block)
        products["SciPy BSR"] = lambda: torch.from_numpy((blocks @ x.numpy().T).T)
    if block is not None and block[0] == block[1]:  # MKL has no others
        bsr = weight.to_sparse_bsr(block)
        products["PyTorch BSR"] = lambda: functional.linear(x, bsr)
    expected = functional.linear(x, weight)
    for name, product in products.items():
        if not name.startswith("onnxruntime"):
            assert torch.allclose(product(), expected, atol=1e-3), name
    found = interleaved(products, rounds, warmup=3, clock=time.process_time)
    names = (
        "PyTorch dense",
        "PyTorch CSR",
        "PyTorch BSR",
        "SciPy BSR",
        "onnxruntime, dense weight",
        "onnxruntime, pruned weight",
    )
    times = {f"{name}, ms": round(1e3 * found[name], 2) if name in found else "-" for name in names}
    return {"pattern": pattern, "sparsity": f"{float((weight == 0).double().mean()):.2f}", "batch": batch, **times}


def main() -> None:
    """Measure every pattern, print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [row(pattern, batch, arguments.rounds) for pattern in PATTERNS for batch in (1, 64)]
    print(markdown(rows))
    note = "Products of a batch with a weight of 1024 x 1024. -: no such form; PyTorch's BSR has square blocks alone."
    print("saved", save("block_sparse", rows, "Zeros in blocks on a CPU", note))


if __name__ == "__main__":
    main()
