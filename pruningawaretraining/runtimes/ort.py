"""onnxruntime: sessions, their inputs, and their errors as errors of this package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from pruningawaretraining.errors import ConfigError, ModelError

ON_CPU = ("CPUExecutionProvider",)


def require(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{package} is needed here and not installed: pip install {package}") from error


def open_session(model: str | bytes, threads: int = 0, providers: Sequence[Any] = ON_CPU) -> Any:
    """An onnxruntime session, by default on the CPU.

    Args:
        model: the path of an ONNX file, or its bytes.
        threads: threads within an operator; 0 leaves the choice to onnxruntime.
        providers: execution providers of onnxruntime, the preferred first.

    Raises:
        ConfigError: onnxruntime is not installed.
        ModelError: onnxruntime does not accept the file.
    """
    runtime = require("onnxruntime")
    options = session_options(threads)
    try:
        return runtime.InferenceSession(model, options, providers=list(providers))
    except session_errors() as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"onnxruntime cannot load {model if isinstance(model, str) else 'the graph'}: {reason}"
        ) from error


def session_options(threads: int = 0) -> Any:
    """Options of a session: quiet, and with so many threads within an operator (0: onnxruntime's own choice)."""
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # several sessions take turns undisturbed
    return options


def session_errors() -> tuple[type[Exception], ...]:
    """Errors of onnxruntime for a graph or feed that it cannot run; they have no base class of their own."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state")
    found = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*found, RuntimeError, ValueError)


def as_arrays(session: Any, feed: Mapping[str, Tensor]) -> dict[str, Any]:
    """Feed of a session: arrays by input name, without inputs that the graph does not use."""
    known = {item.name for item in session.get_inputs()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in feed.items() if name in known}


def checked_run(session: Any, arrays: Mapping[str, Any], hint: str = "") -> list[Any]:
    """The outputs of a session.

    Raises:
        ModelError: onnxruntime cannot run these inputs; the message names their shapes and ends with ``hint``.
    """
    try:
        outputs: list[Any] = session.run(None, dict(arrays))
    except session_errors() as error:
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"onnxruntime cannot run inputs of shape {shapes}: {reason}{hint}") from error
    return outputs
