"""Runtimes: where a model is timed. Each prepares a model once and then runs it on the same inputs, again and again.

A runtime that needs a device or a package that is not there says so when it is asked to prepare a model.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pruningawaretraining import registry
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models import calling as inputs
from pruningawaretraining.models.compiling import uncompiled
from pruningawaretraining.registry import register
from pruningawaretraining.runtimes import exporters, flat_model, ort
from pruningawaretraining.runtimes.exporter_choice import AUTO

Model = nn.Module | str | Path
Run = Callable[[], None]
Clock = Callable[[], float]

FOLLOWING = ("torch", "torch_compile")
"""Runtimes that run a model on the device where it is."""
_ON_CPU = "onnxruntime, torch, torch_compile"


class Runtime(Protocol):
    """Interface of registered runtimes: frozen dataclasses with the runtime's options.

    One that does all work on the calling thread, when it is given one thread and the CPU, may say so by a class
    attribute ``on_calling_thread = True``: the thread's own time is then counted.
    """

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """A context in which the function it gives runs the model once on the example inputs, and waits for it."""
        ...


@register("runtime", "onnxruntime", "onnx", "ort")
@dataclass(frozen=True)
class OnnxRuntime:
    """onnxruntime on the CPU. A module is exported to a temporary file first; an ``.onnx`` file is taken as it is.

    Attributes:
        exporter: "dynamo", "torchscript", or "auto", PyTorch's own choice; for modules.
    """

    on_calling_thread: ClassVar[bool] = True
    exporter: str = AUTO

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        return _onnx_run(model, example_inputs, threads, self.exporter)


@register("runtime", "torch", "eager")
@dataclass(frozen=True)
class TorchEager:
    """PyTorch as the model runs in a training script: eager, in eval mode, on the device where the model is.

    Attributes:
        device: another device, e.g. "cuda:0"; the model is copied there.
    """

    on_calling_thread: ClassVar[bool] = True
    device: str | None = None

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        return _torch_run(_there(_module(model, "torch"), "torch", self.device), example_inputs, threads)


@register("runtime", "torch_compile", "compile", "torch.compile", "inductor")
@dataclass(frozen=True)
class TorchCompile:
    """PyTorch compiled by ``torch.compile`` for the shapes of the example, on the device where the model is.

    Attributes:
        mode: of ``torch.compile``, e.g. "max-autotune".
        device: another device, e.g. "cuda:0"; the model is copied there.
    """

    on_calling_thread: ClassVar[bool] = True
    mode: str = "default"
    device: str | None = None

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        there = _there(_module(model, "torch_compile"), "torch_compile", self.device)
        compiled = torch.compile(there, dynamic=False, mode=self.mode)
        assert isinstance(compiled, nn.Module)
        return _torch_run(compiled, example_inputs, threads, as_written=False)


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
            raise ConfigError("runtime: 'cuda' needs a GPU that PyTorch can use. Allowed: " + _ON_CPU)
        copied = copy.deepcopy(_module(model, "cuda")).to(torch.device("cuda", self.device))
        return _torch_run(copied, example_inputs, threads)


@register("runtime", "tensorrt", "trt")
@dataclass(frozen=True)
class TensorRt:
    """TensorRT as an execution provider of onnxruntime, where it is installed.

    Attributes:
        exporter: "dynamo", "torchscript", or "auto", PyTorch's own choice; for modules.
        half: let it compute in float16.
    """

    exporter: str = AUTO
    half: bool = False

    def prepare(self, model: Model, example_inputs: Any, threads: int) -> AbstractContextManager[Run]:
        """See :class:`Runtime`."""
        available = ort.require("onnxruntime").get_available_providers()
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


def _there(model: nn.Module, runtime: str, device: str | None) -> nn.Module:
    """The model, or a copy of it on another device."""
    if device is None or not any(one.device != torch.device(device) for one in model.parameters()):
        return model
    try:
        return copy.deepcopy(model).to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"runtime: {runtime!r} has no device {device!r} here: {inputs.first_line(error)}. Allowed: cpu"
        ) from error


def on_device(spec: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    """A runtime's options, for a model whose copies are timed where it is itself.

    Args:
        spec: ``{"type": name, **options}``.
        device: of the model. Runtimes that run a model where it is get it as an option, unless they have one.
    """
    name = registry.canonical("runtime", spec["type"], "runtime")
    follows = name in FOLLOWING and device is not None and device.type != "cpu"
    return {**({"device": str(device)} if follows else {}), **spec}


def clock_of(runtime: Runtime, threads: int, models: Iterable[Model] = ()) -> Clock:
    """A clock in seconds: of the thread's own time where the runtime does all work on it, which other work on the
    machine disturbs least; else the time that goes by.

    Args:
        runtime: it says so itself (``on_calling_thread``) for one thread and the CPU.
        threads: that it is given.
        models: that it runs, where they are.
    """
    device = getattr(runtime, "device", None)
    devices = [torch.device(device)] if isinstance(device, str | torch.device) else []
    devices += [one.device for model in models if isinstance(model, nn.Module) for one in model.parameters()]
    alone = threads == 1 and getattr(runtime, "on_calling_thread", False)
    return time.thread_time if alone and all(one.type == "cpu" for one in devices) else time.perf_counter


def name_of_runtime(runtime: str | Mapping[str, Any] | Runtime) -> str:
    """The registered name, or that of the class of one that is not registered."""
    name = runtime.get("type") if isinstance(runtime, Mapping) else runtime
    return registry.canonical("runtime", name, "runtime") if isinstance(name, str) else type(runtime).__name__


def device_name(device: torch.device) -> str:
    """Identity of a device: times of another do not count."""
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if known else str(device)


def runtime_version(name: str) -> str:
    """The version of what runs there: times that another version took do not count."""
    if name in ("onnxruntime", "tensorrt"):
        return str(ort.require("onnxruntime").__version__)
    return torch.__version__


@contextlib.contextmanager
def _torch_run(model: nn.Module, example_inputs: Any, threads: int, as_written: bool = True) -> Iterator[Run]:
    """Runs on inputs that are moved once; each run ends when its device is done, so that a clock sees all of it."""
    moved, before = inputs.beside(model, example_inputs), torch.get_num_threads()
    devices = {one.device for one in (*model.parameters(), *inputs.tensors_of(moved))}
    waited_for = [one for one in devices if _is_accelerator(one)]

    def run() -> None:
        with uncompiled() if as_written else contextlib.nullcontext():
            inputs.call_as_is(model, moved)
        for device in waited_for:
            torch.accelerator.synchronize(device)

    try:
        torch.set_num_threads(threads)
        with inputs.evaluating(model), torch.inference_mode():
            inputs.checked_call(model, moved)
            run()
            yield run
    finally:
        torch.set_num_threads(before)


def _is_accelerator(device: torch.device) -> bool:
    """Whether operations on a device go on after the call that started them has returned."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return current is not None and current.type == device.type


@contextlib.contextmanager
def _onnx_run(
    model: Model, example_inputs: Any, threads: int, exporter: str, providers: Sequence[Any] = ort.ON_CPU
) -> Iterator[Run]:
    ort.require("onnxruntime")
    if isinstance(model, nn.Module):
        graph = flat_model.build_graph(model, example_inputs, dynamic_batch=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            exporters.export_graph(graph, path, exporter)
            session = ort.open_session(str(path), threads, providers)
        feed = dict(zip(graph.input_names, graph.inputs, strict=True))
    else:
        if not Path(model).is_file():
            raise ModelError(f"model: there is no file {str(model)!r}")
        session = ort.open_session(str(model), threads, providers)
        feed = _feed(session, example_inputs, str(model))
    arrays = ort.as_arrays(session, feed)
    ort.checked_run(session, arrays)

    def run() -> None:
        session.run(None, arrays)

    yield run


def _feed(session: Any, example_inputs: Any, path: str) -> dict[str, Tensor]:
    """The example's tensors under the names of an ONNX file's inputs: by name if keyed so, else by position."""
    names = [item.name for item in session.get_inputs()]
    tensors = list(inputs.tensors_of(example_inputs))
    keys = flat_model.tensor_names(example_inputs, "input")
    if isinstance(example_inputs, Mapping) and set(names) <= set(keys):
        return {key: tensor for key, tensor in zip(keys, tensors, strict=True) if key in names}
    if isinstance(example_inputs, Mapping) or len(tensors) != len(names):
        given = ", ".join(keys) if isinstance(example_inputs, Mapping) else f"{len(tensors)} tensors"
        raise ModelError(f"example_inputs: {given} do not fit {path}, whose inputs are {', '.join(names)}")
    return dict(zip(names, tensors, strict=True))
