"""Measures on one runtime: tables of single layers, and whole models in turns."""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pruningawaretraining import registry
from pruningawaretraining.costs.latency.cache import TimeCache, machine
from pruningawaretraining.costs.latency.layer_shapes import LayerShape
from pruningawaretraining.costs.latency.layer_tables import VERSION, LayerTable, measure_table
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.trees import tensors_of, with_tensors
from pruningawaretraining.runtimes import exporters, flat_model
from pruningawaretraining.runtimes.flat_model import resize_batch
from pruningawaretraining.runtimes.runtime import (
    FOLLOWING,
    Model,
    OnnxRuntime,
    Runtime,
    device_name,
    on_device,
    runtime_version,
)
from pruningawaretraining.runtimes.timing import (
    Clock,
    Ratio,
    Run,
    clock_of,
    pace_of,
    ratio_in_turns,
    time_in_turns,
)

progress = logging.getLogger(f"{__name__}.progress")
"""Says how far a first measurement has come; its records have ``done``, ``total`` and ``what``, for a bar."""

Result = TypeVar("Result")


class Meter(Protocol):
    """Measurements for a latency target."""

    def tables(self, shapes: Mapping[str, LayerShape]) -> dict[str, LayerTable]:
        """A table for every layer."""
        ...

    def milliseconds(self, models: Mapping[str, tuple[Model, Any]]) -> dict[str, float]:
        """Milliseconds of whole models, measured in turns."""
        ...

    def ratio(self, dense: tuple[Model, Any], copied: tuple[Model, Any]) -> Ratio:
        """The ratio of a copy's time to the dense model's, measured in turns, with its confidence interval."""
        ...

    def ready(self, model: nn.Module, example_inputs: Any) -> Model:
        """A snapshot of the model that can be timed repeatedly."""
        ...

    def remembered(self, what: Mapping[str, Any], measure: Callable[[], list[float]]) -> list[float]:
        """The stored measurement, or a new one."""
        ...

    def inputs(self, example_inputs: Any) -> Any:
        """Example inputs with the batch that latency is about."""
        ...


class RuntimeMeter:
    """Measures on a registered runtime.

    Args:
        runtime: by name, or as ``{"type": name, **options}``.
        batch: rows of the example inputs; None leaves them as they are.
        threads: threads within an operator.
        cache: where times are kept; by default in the user's cache folder.
        device: of the model whose copies are timed: a runtime that runs models where they are runs them there.

    Raises:
        ConfigError: the runtime is unknown.
    """

    def __init__(
        self,
        runtime: str | Mapping[str, Any],
        batch: int | None = 1,
        threads: int = 1,
        cache: TimeCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        spec = on_device({"type": runtime} if isinstance(runtime, str) else runtime, device)
        self.name = registry.canonical("runtime", spec["type"], "runtime")
        self.runtime: Runtime = registry.build("runtime", spec)
        self._others: list[
            Runtime
        ] = []  # tried where the first cannot export: tracing is faster, and does not suit all
        if self.name == "onnxruntime" and "exporter" not in spec:
            self.runtime, self._others = registry.build("runtime", {**spec, "exporter": "torchscript"}), [self.runtime]
        self.batch, self.threads = batch, threads
        self._spec = spec
        self._cache = cache
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _device(self) -> torch.device | None:
        """Name of the device, if it is not the CPU."""
        if self.name in ("cuda", "tensorrt"):
            return torch.device("cuda", int(self._spec.get("device", 0)))
        device = self._spec.get("device") if self.name in FOLLOWING else None
        return None if device is None or torch.device(device).type == "cpu" else torch.device(device)

    @property
    def cache(self) -> TimeCache:
        """The cache of measured times."""
        if self._cache is None:
            where = {"runtime": self._spec, "version": runtime_version(self.name), "threads": self.threads}
            if self._device is not None:
                where["device"] = device_name(self._device)
            self._cache = TimeCache({**where, "machine": machine(), "format": VERSION})
        return self._cache

    def inputs(self, example_inputs: Any) -> Any:
        """See :class:`Meter`."""
        tensors = list(tensors_of(example_inputs))
        rows = tensors[0].shape[0] if tensors and tensors[0].ndim else 0
        if self.batch is None or not rows:
            return example_inputs
        resized = [resize_batch(one, self.batch) if one.ndim and one.shape[0] == rows else one for one in tensors]
        return with_tensors(example_inputs, resized)

    def tables(self, shapes: Mapping[str, LayerShape]) -> dict[str, LayerTable]:
        """See :class:`Meter`. Layers of one shape are measured once."""
        known: dict[LayerShape, Any] = {shape: self.cache.get({"layer": vars(shape)}) for shape in shapes.values()}
        missing = [shape for shape, found in known.items() if found is None]
        title = f"{len(missing)} kinds of layers at many widths"
        for done, shape in enumerate(missing):
            self._tell(done, len(missing), f"{shape.kind} {shape.inputs} x {shape.outputs}", title)
            known[shape] = measure_table(shape, self.runtime, self.name, self.threads).to_json()
            self.cache.put({"layer": vars(shape)}, known[shape])
        if missing:
            self._tell(len(missing), len(missing), "done", title)
        return {name: LayerTable.from_json(known[shape]) for name, shape in shapes.items()}

    def _tell(self, done: int, total: int, what: str, title: str) -> None:
        about = {"done": done, "total": total, "what": what, "title": title, "runtime": self.name}
        text = "latency on %s: measuring %s, %d of %d: %s (kept in %s)"
        folder = self.cache.folder
        progress.info(text, self.name, title, done, total, what, folder, extra={**about, "folder": folder})

    def milliseconds(self, models: Mapping[str, tuple[Model, Any]]) -> dict[str, float]:
        """See :class:`Meter`."""

        def measured(runs: list[Run]) -> dict[str, float]:
            times = time_in_turns(runs, pace_of(runs, self.clock), self.clock)
            return {name: statistics.median(taken) for name, taken in zip(models, times, strict=True)}

        return self._prepared(list(models.values()), measured)

    def ratio(self, dense: tuple[Model, Any], copied: tuple[Model, Any]) -> Ratio:
        """See :class:`Meter`."""
        return self._prepared([dense, copied], lambda runs: ratio_in_turns(runs[0], runs[1], self.clock))

    def _prepared(self, models: Sequence[tuple[Model, Any]], measured: Callable[[list[Run]], Result]) -> Result:
        """Measure models that are prepared on the runtime; where its exporter cannot express one, on the next."""
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    made = [self.runtime.prepare(model, given, self.threads) for model, given in models]
                    return measured([stack.enter_context(one) for one in made])
            except ModelError:
                if not self._others:
                    raise
                self.runtime = self._others.pop()

    @property
    def clock(self) -> Clock:
        """A clock in seconds: see :func:`~pruningawaretraining.runtimes.timing.clock_of`."""
        return clock_of(self.runtime, self.threads)

    def ready(self, model: nn.Module, example_inputs: Any) -> Model:
        """See :class:`Meter`. For onnxruntime, a file in a temporary folder that lives as long as the meter."""
        if not isinstance(self.runtime, OnnxRuntime):
            return model
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="pat-latency-")
        path = Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.onnx"
        graph = flat_model.build_graph(model, example_inputs, dynamic_batch=False)
        try:
            exporters.export_graph(graph, path, self.runtime.exporter)
        except ModelError:
            if not self._others:
                raise
            self.runtime = self._others.pop()
            return self.ready(model, example_inputs)
        return path

    def remembered(self, what: Mapping[str, Any], measure: Callable[[], list[float]]) -> list[float]:
        """See :class:`Meter`."""
        found = self.cache.get(what)
        if found is None:
            title = "the dense model and copies at other widths"
            self._tell(0, 1, "models", title)
            found = measure()
            self.cache.put(what, found)
            self._tell(1, 1, "done", title)
        return [float(one) for one in found]
