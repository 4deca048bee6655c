"""save_pruned(..., standalone=True): a Python file that builds the pruned model without this library."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.experiment.models import digits_resnet

OWN = '''
"""Classes of a user's own."""
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, width, depth=2, kernel=3):
        super().__init__()
        self.width, self.depth = width, depth
        self.stem = nn.Conv2d(3, width, kernel, padding=kernel // 2)
        self.body = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.body(self.stem(x).relu())))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


class Tied(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.down(self.up(self.table(x)).relu()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Residual(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return x + self.conv(x).relu()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.body = nn.Sequential(*(Residual(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


def made(width):
    return Plain(width, kernel=1)
'''
RUN = """
import os, sys, traceback
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pruningawaretraining", "safetensors", "torch_pruning"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
for folder in map(str.strip, sys.stdin):
    os.chdir(folder)
    sys.path.insert(0, folder)
    try:
        from pruned import build
        inputs = torch.load("inputs.pt", weights_only=True)
        with torch.no_grad():
            torch.save(build()(inputs), "outputs.pt")
        assert "pruningawaretraining" not in sys.modules
        print("done", flush=True)
    except Exception as error:
        print(repr(traceback.format_exc()), flush=True)
    sys.path.remove(folder)
    for name in ("pruned", "own_networks"):
        sys.modules.pop(name, None)
"""
HALF: dict[str, Any] = {"target": {"sparsity": 0.5}, "start": 0, "end": 0}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    torch.manual_seed(0)
    return __import__("own_networks")


def pruned(model: nn.Module, inputs: Any, **rule: Any) -> nn.Module:
    assert Pruning(model.eval(), {"rules": [{**HALF, **rule}]}, example_inputs=inputs).prune() == "removed"
    return model.eval()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """Another process that cannot import this library, nor safetensors: one for all files, each imported anew."""
    command = [sys.executable, "-B", "-c", RUN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def outputs_of(folder: Path, inputs: Tensor, elsewhere: subprocess.Popen[str]) -> Tensor:
    """Outputs of the model that a file builds in another process."""
    torch.save(inputs, folder / "inputs.pt")
    assert elsewhere.stdin is not None and elsewhere.stdout is not None
    print(folder, file=elsewhere.stdin, flush=True)
    assert elsewhere.stdout.readline() == "done\n"
    found: Tensor = torch.load(folder / "outputs.pt", weights_only=True)
    return found


def check(
    model: nn.Module, inputs: Tensor, folder: Path, elsewhere: subprocess.Popen[str], standalone: Any = True
) -> str:
    """The file's text; the model that it builds gives the same outputs."""
    assert save_pruned(model, folder / "pruned.safetensors", standalone=standalone).name == "pruned.safetensors"
    with torch.no_grad():
        expected = model(inputs)
    assert float((outputs_of(folder, inputs, elsewhere) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    text = (folder / "pruned.py").read_text()
    ast.parse(text)
    assert str(folder) not in text
    return text


IMAGE, SEQUENCE, WORDS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6), torch.tensor([[1, 2, 8], [0, 3, 3]])
CASES: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "Plain": (IMAGE, {}),
    "Recurrent": (SEQUENCE, {}),
    "Tied": (WORDS, {}),
    "Attention": (torch.randn(2, 5, 16), {"pattern": "head"}),
    "Deep": (IMAGE, {"pattern": "depth"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_class_of_the_users_own(name: str, own: Any, tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    inputs, rule = CASES[name]
    model = pruned(getattr(own, name)(*((16,) if name == "Plain" else ())), inputs, **rule)
    text = check(model, inputs, tmp_path, elsewhere)
    assert f"from own_networks import {name} as original\n" in text and "pruningawaretraining" not in text


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_a_model_of_torchvision(name: str, tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    from torchvision import models

    torch.manual_seed(0)
    model, images = models.get_model(name, weights=None, num_classes=7), torch.randn(1, 3, 64, 64)
    rule = {"pattern": "head"} if name == "swin_t" else {}
    text = check(pruned(model, images, **rule), images, tmp_path, elsewhere)
    assert f"import {name} as original\n" in text and "'num_classes': 7" in text


def test_a_model_of_timm(tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = timm.create_model("resnet18", num_classes=5), torch.randn(1, 3, 64, 64)
    text = check(pruned(model, images), images, tmp_path, elsewhere)
    assert "from timm import create_model as original\n" in text and "'model_name': 'resnet18'" in text


def test_a_builder_that_is_given(own: Any, tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    model = pruned(own.made(16), IMAGE)
    text = check(model, IMAGE, tmp_path, elsewhere, functools.partial(own.made, 16))
    assert "ARGUMENTS = {'width': 16}" in text
    written_anew = functools.partial(own.Plain, width=16, kernel=1)
    check(model, IMAGE, tmp_path, elsewhere, written_anew)


def defined_here() -> nn.Module:
    class Inner(nn.Sequential):
        pass

    return Inner(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))


def refusal(model: nn.Module, path: Path, standalone: Any = True) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_pruned(model, path, standalone=standalone)
    assert not path.exists() and "\n" not in str(caught.value) and str(caught.value).startswith("standalone: ")
    return str(caught.value)


def test_refusals(own: Any, tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    plain = own.Plain(16)
    assert "Inner cannot be imported: it is defined in a function" in refusal(defined_here(), path)
    assert "takes arguments that are not known (conv)" in refusal(own.Residual(nn.Conv2d(3, 3, 1)), path)
    assert "is part of pruningawaretraining" in refusal(digits_resnet(), path)
    assert "cannot be written into a file" in refusal(plain, path, functools.partial(own.Residual, nn.ReLU()))
    assert "Deep() builds another model: " in refusal(plain, path, own.Deep)
    assert "does not take its arguments" in refusal(plain, path, functools.partial(own.Plain, wide=3))
    (tmp_path / "pruned.py").write_text("mine = 1\n")
    assert "already exists" in refusal(plain, path)
    assert (tmp_path / "pruned.py").read_text() == "mine = 1\n"


def test_a_masked_norm_is_refused(tmp_path: Path) -> None:
    model, inputs = zoo.architecture("groupnorm")
    pruner = Pruning(model, {"rules": [{"target": {"sparsity": 0.4}, "end": 2}]}, example_inputs=inputs)
    pruner.prune(model, 0)
    assert "is masked, and not removed. Allowed: pruner.remove()" in refusal(model, tmp_path / "pruned.safetensors")
