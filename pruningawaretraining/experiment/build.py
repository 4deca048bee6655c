"""A model by its name: torchvision's, timm's, a class of transformers, or ``package.module:callable``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.collectives import world_size
from pruningawaretraining.errors import CheckpointError, ConfigError, nearest, unknown
from pruningawaretraining.experiment.schema import ExperimentConfig, ModelConfig
from pruningawaretraining.files import BROKEN, read_safetensors, read_torch

OWN, PREFIXES = __package__.partition(".")[0], ("timm", "torchvision")
_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*")
_CHANNEL_KEYS = ("in_channels", "in_chans")


def build_model(config: ModelConfig, num_classes: int | None = None, channels: int | None = None) -> nn.Module:
    """Build the dense model of a config.

    Args:
        config: its name, keyword arguments and weights.
        num_classes: passed on if the model takes it and the config does not give it.
        channels: of the images; passed on as ``in_channels`` or ``in_chans`` likewise.

    Raises:
        ConfigError: no such model, or it refuses the keyword arguments.
        CheckpointError: the weights cannot be read or do not fit.
    """
    factory = find_model(config.name)
    parameters = _parameters(factory)
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    kwargs = dict(config.kwargs)
    if num_classes is not None and ("num_classes" in parameters or anything):
        kwargs.setdefault("num_classes", num_classes)
    for key in _CHANNEL_KEYS:
        if channels is not None and (key in parameters or (key == "in_chans" and isinstance(factory, TimmBuilder))):
            kwargs.setdefault(key, channels)
    for key in config.kwargs:
        if key not in parameters and not anything:
            raise ConfigError(unknown(f"model.kwargs.{key}", key, parameters))
    try:
        model = factory(**kwargs)
    except BROKEN as error:
        raise ConfigError(f"model.kwargs: {config.name!r} refuses {kwargs}: {' '.join(str(error).split())}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name: {config.name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    if config.weights is not None:
        load_weights(model, config.weights)
    return model


def initial_model(config: ExperimentConfig, classes: int, channels: int, device: torch.device) -> nn.Module:
    """The dense model of an experiment on its device, with the initial weights of the experiment's seed.

    Args:
        config: of the experiment.
        classes, channels: of its images.
        device: where to.

    Raises:
        ConfigError, CheckpointError: as in :func:`build_model`.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, classes, channels).to(device)
    if world_size() > 1 and device.type == "cuda":  # statistics of whole batches, as on one process
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except ValueError:  # some builtins have none
        return {}


def find_model(name: str) -> Callable[..., Any]:
    """The callable that builds the model of this name.

    Raises:
        ConfigError: an unknown name; the nearest one is suggested.
    """
    prefix, _, rest = name.partition(":")
    if ":" in name and prefix not in PREFIXES:
        return _imported(prefix, rest)
    from torchvision import models

    if prefix != "timm" and (rest or name) in models.list_models():
        builder: Callable[..., Any] = models.get_model_builder(rest or name)
        return builder
    has_timm = importlib.util.find_spec("timm") is not None
    if has_timm and prefix != "torchvision":
        import timm

        if timm.is_model((rest or name).split(".")[0]):
            return TimmBuilder(rest or name)
    elif prefix == "timm":
        raise ConfigError(f"model.name: {name!r} needs timm. Allowed: pip install 'pruningawaretraining[timm]'")
    close = nearest(rest or name, models.list_models())
    hint = f"; did you mean {close!r}?" if close else ""
    kinds = "a torchvision model, a timm model" + ("" if has_timm else " (timm is not installed)")
    raise ConfigError(
        f"model.name: {name!r} is not known{hint or '.'} Allowed: {kinds}, a class of transformers such as "
        "'transformers:BertModel', or 'package.module:callable'"
    )


class TimmBuilder:
    """Builds a timm model; a class of its own so that it can be told from other callables."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **kwargs: Any) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(self.name, **kwargs)
        return model


class TransformersBuilder:
    """Builds a model of transformers from the default config of its class, changed by keyword arguments.

    Args:
        kind: a subclass of ``PreTrainedModel``.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, **kwargs: Any) -> nn.Module:
        if "num_classes" in kwargs:
            kwargs["num_labels"] = kwargs.pop("num_classes")
        own = self.kind.config_class()
        for key in kwargs:
            if not hasattr(own, key):  # which a config takes without a word
                raise ConfigError(unknown(key, key, vars(own)))
        model: nn.Module = self.kind(self.kind.config_class(**kwargs))
        return model


def is_imported(name: str) -> bool:
    """Whether building the model of this name imports a module that is neither of this package nor of a known one."""
    prefix, _, rest = name.partition(":")
    return bool(rest) and prefix not in (*PREFIXES, OWN) and not prefix.startswith(f"{OWN}.")


def _imported(module_name: str, attribute: str) -> Callable[..., Any]:
    """Look up a name in a module: a class of networks, or a function annotated to return one; nothing is called."""
    where = f"model.name: {f'{module_name}:{attribute}'!r}"
    if not _NAME.fullmatch(module_name) or not _NAME.fullmatch(attribute):
        raise ConfigError(f"{where} is not a name. Allowed: 'package.module:callable' in public names of Python")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"model.name: {module_name!r} cannot be imported: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise ConfigError(unknown(f"model.name: in {module_name}", attribute, public))
        found = getattr(found, part)
    if not _gives_module(found):
        raise ConfigError(
            f"{where} does not say that it gives a network. Allowed: a class of nn.Module, or a function annotated "
            "'-> nn.Module' (or a class of it)"
        )
    if _is_of_pytorch(found):
        raise ConfigError(
            f"{where} is a function of PyTorch, and some of these run text as code. Allowed: a class of nn.Module, or "
            "a function of yours or of a model library"
        )
    result: Callable[..., Any] = found
    configured = isinstance(found, type) and getattr(found, "config_class", None) is not None
    return TransformersBuilder(found) if configured and "config" in _parameters(found) else result


def _gives_module(found: Any) -> bool:
    """Whether something is a class of networks, or a function whose annotation says that it returns one."""
    if isinstance(found, type):
        return issubclass(found, nn.Module)
    function = inspect.unwrap(found.func if isinstance(found, functools.partial) else found)
    if not inspect.isroutine(function):
        return False
    result = getattr(function, "__annotations__", {}).get("return")
    if isinstance(result, str):  # looked up, not evaluated
        head, *rest = result.strip("\"' ").split(".")
        result = getattr(function, "__globals__", {}).get(head)
        for part in rest:
            result = getattr(result, part, None)
    return isinstance(result, type) and issubclass(result, nn.Module)


def _is_of_pytorch(found: Any) -> bool:
    """Whether something is a function of PyTorch itself: torch.fx and torch.package build modules from text."""
    function = inspect.unwrap(found.func if isinstance(found, functools.partial) else found)
    return not isinstance(function, type) and str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def has_weights(config: ModelConfig) -> bool:
    """Whether a config says where the weights of its model come from; else they are as random as it is built."""
    return bool(config.weights or config.kwargs.get("weights") or config.kwargs.get("pretrained"))


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict from .safetensors, or from a torch file of tensors, with or without ``module.`` in its names.

    Raises:
        CheckpointError: no such file, not a state dict, or it does not fit the model.
    """
    state = _state_dict(Path(os.path.expanduser(path)))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    missing = {key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")}
    for what, names in (("lacks", missing), ("does not know", state.keys() - own.keys())):
        if names:
            who = f"{path!r}" if what == "lacks" else "the model"
            raise CheckpointError(f"model.weights: {who} {what} {sorted(names)[0]!r} ({len(names)} tensors in all)")
    for key, value in state.items():
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)} where the model has {tuple(own[key].shape)}"
            raise CheckpointError(f"model.weights: {key!r} is of shape {shapes}")
    model.load_state_dict({**own, **state})


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"model.weights: there is no {str(path)!r}")
    if path.suffix == ".safetensors":
        return read_safetensors(path, "model.weights")[0]
    loaded = read_torch(path, "model.weights")
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"model.weights: {str(path)!r} holds no state dict")
    return dict(loaded)
