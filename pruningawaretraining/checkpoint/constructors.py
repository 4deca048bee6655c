"""How a model may have been built: by timm or torchvision, or by its own class with arguments that it remembers."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pruningawaretraining.checkpoint.script import Constructor
from pruningawaretraining.errors import CheckpointError

OWN = "pruningawaretraining"
WITHOUT_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def constructor_of(builder: Any) -> Constructor:
    """A builder that was given, with its arguments."""
    arguments: dict[str, Any] = {}
    function = builder
    if isinstance(builder, functools.partial):
        function = builder.func
        try:
            arguments = dict(inspect.signature(function).bind_partial(*builder.args, **builder.keywords).arguments)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"standalone: {function!r} does not take its arguments: {error}") from error
    kinds = {one.name: one.kind for one in inspect.signature(function).parameters.values()}
    for name in [one for one in arguments if kinds[one] is inspect.Parameter.VAR_KEYWORD]:
        arguments.update(arguments.pop(name))
    for name, value in arguments.items():
        if not is_plain(value) or kinds.get(name) in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
        ):
            raise CheckpointError(
                f"standalone: {name}={value!r} cannot be written into a file. Allowed: numbers, texts and lists by name"
            )
    return Constructor(*_importable(function), arguments)


def _importable(function: Any) -> tuple[str, str]:
    """The module and the name that a class or function is imported by.

    Raises:
        CheckpointError: there are none.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
    where = "in a function" if "<locals>" in name else f"in {module}"
    problem = f"standalone: {name.rpartition('.')[2]} cannot be imported: it is defined {where}"
    allowed = ". Allowed: a class or function of a module that can be imported"
    if module == OWN or module.startswith(f"{OWN}."):
        raise CheckpointError(f"standalone: {name} is part of {OWN}, which the file must run without{allowed}")
    if module in ("", "__main__") or "<" in name:
        raise CheckpointError(problem + allowed)
    try:
        found: Any = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise CheckpointError(problem + allowed) from error
    if found is not function:
        raise CheckpointError(f"standalone: {module}.{name} is something else now{allowed}")
    return module, name


def constructors(model: nn.Module) -> Iterator[Constructor]:
    """The ways in which a model may have been built, likely ones first."""
    library = type(model).__module__.partition(".")[0]
    if library == "timm":
        yield from _of_timm(model)
    elif library == "torchvision":
        yield from _of_torchvision(model)
    else:
        yield _of_class(model)


def _of_timm(model: nn.Module) -> Iterator[Constructor]:
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("architecture"):
        name = {"model_name": config["architecture"]}
        classes = {"num_classes": getattr(model, "num_classes", 1000)}
        yield Constructor("timm", "create_model", name)
        yield Constructor("timm", "create_model", {**name, **classes})
        first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
        if first is not None:
            yield Constructor("timm", "create_model", {**name, **classes, "in_chans": first.in_channels})


def _of_torchvision(model: nn.Module) -> Iterator[Constructor]:
    models = importlib.import_module("torchvision.models")
    last = [one for one in model.modules() if isinstance(one, (nn.Linear, nn.Conv2d))][-1:]
    classes = {one.out_features if isinstance(one, nn.Linear) else one.out_channels for one in last} - {1000}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if _returned(builder) != type(model).__name__:
            continue
        takes = inspect.signature(builder).parameters
        arguments = {"weights_backbone": None} if "weights_backbone" in takes else {}
        for count in (*sorted(classes), None):
            given = {**arguments, **({} if count is None else {"num_classes": count})}
            yield Constructor(builder.__module__, builder.__name__, given)


def _returned(builder: Any) -> str:
    found = builder.__annotations__.get("return", "")
    return found if isinstance(found, str) else found.__name__


def _of_class(model: nn.Module) -> Constructor:
    """Its class, with arguments that it keeps as attributes of their names."""
    kind = type(model)
    place = _importable(kind)
    arguments, unknown = {}, []
    for name, one in inspect.signature(kind).parameters.items():
        if one.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        value = vars(model).get(name, one.default)
        if value is inspect.Parameter.empty or (name in vars(model) and not is_plain(value)):
            unknown.append(name)
        elif name in vars(model) and value != one.default:
            arguments[name] = value
    if unknown:
        raise CheckpointError(
            f"standalone: {kind.__name__} takes arguments that are not known ({', '.join(unknown)}). Allowed: "
            f"standalone=functools.partial({kind.__name__}, {unknown[0]}=...)"
        )
    return Constructor(*place, arguments)


def is_plain(value: Any) -> bool:
    """Whether a value can be written as a literal."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple, torch.Size) and all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, str)
