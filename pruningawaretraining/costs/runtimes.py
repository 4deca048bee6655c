"""Runtimes: where a model is timed. Each prepares a model once and then runs it on the same inputs, again and again.

A runtime that needs a device or a package that is not there says so when it is asked to prepare a model.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining import inputs, onnx_graph
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.registry import register

Model = nn.Module | str | Path
Run = Callable[[], None]

_ON_CPU = "onnxruntime, torch, torch_compile"


class Runtime(Protocol):
    """What is registered under the kind "runtime": a frozen dataclass with the runtime's options."""

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """A context in which the function it gives runs the model once on the example inputs, and waits for it."""
        ...


@register("runtime", "onnxruntime", "onnx", "ort")
@dataclass(frozen=True)
class OnnxRuntime:
    """onnxruntime on the CPU. A module is exported to a temporary file first; an ``.onnx`` file is taken as it is.

    Attributes:
        exporter: "dynamo" or "torchscript", for modules.
    """

    exporter: str = "dynamo"

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        return _onnx_run(model, example_inputs, threads, self.exporter)


@register("runtime", "torch", "eager")
@dataclass(frozen=True)
class TorchEager:
    """PyTorch as the model runs in a training script: eager, in eval mode, on the device where the model is."""

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        return _torch_run(_module(model, "torch"), example_inputs, threads, inputs.call)


@register("runtime", "torch_compile", "compile", "torch.compile", "inductor")
@dataclass(frozen=True)
class TorchCompile:
    """PyTorch compiled by ``torch.compile`` for the shapes of the example, on the device where the model is.

    Attributes:
        mode: of ``torch.compile``, e.g. "max-autotune".
    """

    mode: str = "default"

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        compiled = torch.compile(_module(model, "torch_compile"), dynamic=False, mode=self.mode)
        assert isinstance(compiled, nn.Module)
        return _torch_run(compiled, example_inputs, threads, inputs.call_as_is)


@register("runtime", "cuda", "torch_cuda")
@dataclass(frozen=True)
class TorchCuda:
    """PyTorch eager on a GPU. The model is copied there; the user's stays where it is.

    Attributes:
        device: number of the GPU.
    """

    device: int = 0

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "runtime: 'cuda' needs a GPU that PyTorch can use, and there is none. Allowed: " + _ON_CPU
            )
        copied = copy.deepcopy(_module(model, "cuda")).to(torch.device("cuda", self.device))
        return _torch_run(copied, example_inputs, threads, inputs.call)


@register("runtime", "tensorrt", "trt")
@dataclass(frozen=True)
class TensorRt:
    """TensorRT as an execution provider of onnxruntime, where it is installed.

    Attributes:
        exporter: "dynamo" or "torchscript", for modules.
        half: let it compute in float16.
    """

    exporter: str = "dynamo"
    half: bool = False

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        available = onnx_graph.require("onnxruntime").get_available_providers()
        if "TensorrtExecutionProvider" not in available:
            raise ConfigError(
                "runtime: 'tensorrt' needs onnxruntime with TensorRT (pip install onnxruntime-gpu tensorrt), and this "
                f"one has {', '.join(available)}. Allowed: " + _ON_CPU
            )
        providers = [("TensorrtExecutionProvider", {"trt_fp16_enable": self.half}), "CPUExecutionProvider"]
        return _onnx_run(model, example_inputs, threads, self.exporter, providers)


def _module(model: Model, runtime: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"runtime {runtime!r} runs modules, not the file {str(model)!r}; use runtime='onnxruntime'")
    return model


def runtime_version(name: str) -> str:
    """The version of what runs there: times that another version took do not count."""
    if name in ("onnxruntime", "tensorrt"):
        return str(onnx_graph.require("onnxruntime").__version__)
    return torch.__version__


@contextlib.contextmanager
def _torch_run(model: nn.Module, example_inputs: Any, threads: int, call: Callable[..., Any]) -> Iterator[Run]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    moved, before = inputs.move(example_inputs, device), torch.get_num_threads()

    def run() -> None:
        call(model, moved)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        torch.set_num_threads(threads)
        with inputs.evaluating(model), torch.inference_mode():
            inputs.checked_call(model, moved)
            run()
            yield run
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _onnx_run(
    model: Model, example_inputs: Any, threads: int, exporter: str, providers: Sequence[Any] = onnx_graph.ON_CPU
) -> Iterator[Run]:
    onnx_graph.require("onnxruntime")
    if isinstance(model, nn.Module):
        graph = onnx_graph.build_graph(model, example_inputs, dynamic_batch=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx_graph.export_graph(graph, path, exporter)
            session = onnx_graph.open_session(str(path), threads, providers)
        feed = dict(zip(graph.input_names, graph.inputs, strict=True))
    else:
        if not Path(model).is_file():
            raise ModelError(f"model: there is no file {str(model)!r}")
        session = onnx_graph.open_session(str(model), threads, providers)
        feed = _feed(session, example_inputs, str(model))
    arrays = onnx_graph.as_arrays(session, feed)
    onnx_graph.checked_run(session, arrays)

    def run() -> None:
        session.run(None, arrays)

    yield run


def _feed(session: Any, example_inputs: Any, path: str) -> dict[str, Tensor]:
    """The example's tensors under the names of an ONNX file's inputs: by name if keyed so, else by position."""
    names = [item.name for item in session.get_inputs()]
    tensors = list(inputs.tensors_of(example_inputs))
    keys = onnx_graph.tensor_names(example_inputs, "input")
    if isinstance(example_inputs, Mapping) and set(names) <= set(keys):
        return {key: tensor for key, tensor in zip(keys, tensors, strict=True) if key in names}
    if isinstance(example_inputs, Mapping) or len(tensors) != len(names):
        given = ", ".join(keys) if isinstance(example_inputs, Mapping) else f"{len(tensors)} tensors"
        raise ModelError(f"example_inputs: {given} do not fit {path}, whose inputs are {', '.join(names)}")
    return dict(zip(names, tensors, strict=True))
