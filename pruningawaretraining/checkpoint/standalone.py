"""Find out how a pruned model was built, so that a Python file without this library can build it again.

A candidate counts only if the file, run on the saved weights, gives the same modules, attributes and tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import operator
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.checkpoint.constructors import OWN, constructor_of, constructors, is_plain
from pruningawaretraining.checkpoint.script import MARK, Changes, Constructor, script
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import BROKEN, place_of, reason, write_text
from pruningawaretraining.models.calling import same_generators
from pruningawaretraining.models.kept_norm import KeptNorm
from pruningawaretraining.models.kept_reductions import ModuleReductions
from pruningawaretraining.models.masked_routers import KeptExperts
from pruningawaretraining.models.skipped_blocks import Bypass, PassThrough

Builder = Callable[..., nn.Module]


def standalone_script(model: nn.Module, builder: Builder | None, weights: Path, aliases: Mapping[str, str]) -> str:
    """The text of a file that builds a pruned model; see :func:`pruningawaretraining.checkpoint.script.script`.

    Args:
        model: pruned.
        builder: makes the dense model: something importable, or a ``functools.partial`` of it; None to find it out.
        weights: the model's tensors, as ``save_pruned`` has written them.
        aliases: see there.

    Raises:
        CheckpointError: its class cannot be imported, takes arguments that are not known, or cannot be built again.
    """
    _check_removed(model)
    problem = f"{type(model).__name__} cannot be built again"
    for constructor in constructors(model) if builder is None else [constructor_of(builder)]:
        try:
            with same_generators(model):
                text = _tried(model, constructor, weights, aliases)
        except (*BROKEN, ImportError, OSError) as error:
            problem = f"{constructor} builds another model: {reason(error)}"
        else:
            return text
    raise CheckpointError(f"standalone: {problem}. Allowed: standalone=functools.partial(builder, argument=...)")


def write_standalone(
    model: nn.Module,
    builder: Builder | None,
    weights: str | Path,
    aliases: Mapping[str, str],
    write: Callable[[str], None],
) -> Path:
    """Write such a file beside the weights.

    Args:
        model, builder, aliases: see :func:`standalone_script`.
        weights: where the weights will be.
        write: writes them to a path.

    Raises:
        CheckpointError: there is no such file, or a file of another kind in its place; nothing is written.
    """
    path = Path(weights).with_suffix(".py")
    place_of(path, "standalone", CheckpointError)
    taken = path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    if taken or path == Path(weights):
        raise CheckpointError(f"standalone: {str(path)!r} already exists. Allowed: another path")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(weights).name
        write(str(copy))
        text = standalone_script(model, builder, copy, aliases)
    return write_text(path, text)


_MASKED = (KeptNorm, KeptExperts, Bypass, ModuleReductions)


def _check_removed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(hook, _MASKED) for hook in module._forward_hooks.values()):
            raise CheckpointError(
                f"standalone: {name!r} is masked, and not removed. Allowed: pruner.remove() before save_pruned"
            )


def _tried(model: nn.Module, constructor: Constructor, weights: Path, aliases: Mapping[str, str]) -> str:
    """The text of the file, run once.

    Raises:
        ValueError: what it builds differs.
    """
    builder: Any = operator.attrgetter(constructor.name)(importlib.import_module(constructor.module))
    changes = _changes(model, _dense(functools.partial(builder, **constructor.arguments)))
    text = script(constructor, changes, weights.name, aliases)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standalone.py"
        path.write_text(text, encoding="utf-8")
        _compare(model, _imported(path).build(weights))
    return text


def _dense(build: Callable[[], nn.Module]) -> nn.Module:
    """A model as it was built, without memory where it can be."""
    try:
        with torch.device("meta"):
            return build()
    except BROKEN:
        return build()


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_standalone", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def _changes(model: nn.Module, dense: nn.Module) -> Changes:
    """Find the differences of a pruned model from a dense one of its class, besides tensors.

    Raises:
        ValueError: they have other modules.
    """
    attributes: dict[str, dict[str, Any]] = {}
    replaced: dict[str, tuple[str, tuple[Any, ...]]] = {}
    classes: dict[Any, None] = {}
    known = dict(dense.named_modules(remove_duplicate=False))
    passed = tuple(f"{name}." for name, one in model.named_modules() if isinstance(one, PassThrough))
    own = dict(model.named_modules(remove_duplicate=False))
    strange = sorted(name for name in own.keys() ^ known.keys() if not name.startswith(passed))
    if strange:
        raise ValueError(f"{strange[0]!r} is in one of them alone")
    for name, module in own.items():
        if isinstance(module, PassThrough):
            replaced[name] = "PassThrough", (module.outputs,)
        elif type(module).__module__.startswith(f"{OWN}.") and hasattr(module, "of"):
            replaced[name] = type(module).__name__, ()
            classes.update(dict.fromkeys(_parts_of(type(module))))
        before = vars(known[name])
        new = {key: value for key, value in _plain_attributes(module) if before.get(key, ...) != value}
        if new:
            attributes[name] = new
    return Changes(attributes, replaced, tuple(classes))


def _parts_of(kind: type) -> list[Any]:
    """A class of attention with fewer heads, and the functions of its module that it calls."""
    text, module = inspect.getsource(kind), sys.modules[kind.__module__]
    return [kind, *(one for name, one in inspect.getmembers(module, inspect.isfunction) if f"{name}(" in text)]


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and is_plain(value):
            yield key, tuple(value) if isinstance(value, tuple) else value


def _compare(model: nn.Module, made: nn.Module) -> None:
    """Refuse a model that is not like the pruned one in every module, attribute and tensor.

    Raises:
        ValueError: it names the first that differs.
    """
    first, second = (dict(one.named_modules(remove_duplicate=False)) for one in (model, made))
    for name, module in first.items():
        kind, other = type(module), type(second[name])
        if kind is not other and (kind.__name__ != other.__name__ or not kind.__module__.startswith(f"{OWN}.")):
            raise ValueError(f"{name!r} is a {other.__name__} and not a {kind.__name__}")
        for key, value in vars(module).items():
            same = key.startswith("_") or key == "training" or _is_same(value, vars(second[name]).get(key, ...))
            if not same:
                raise ValueError(f"{key!r} of {name or 'the model'!r} differs")
    for kind_of in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(one, kind_of)(remove_duplicate=False)) for one in (model, made))
        for name, tensor in mine.items():
            found = theirs.get(name)
            if found is None or found.shape != tensor.shape or not torch.equal(found, tensor.detach().to("cpu")):
                raise ValueError(f"the tensor {name!r} differs")


def _is_same(value: Any, other: Any) -> bool:
    """Whether two attributes are alike, as far as it can be told."""
    if is_plain(value):
        return bool(value == other)
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value.cpu(), other.cpu())
    if inspect.isfunction(value) or isinstance(value, type):
        return bool(getattr(value, "__qualname__", value) == getattr(other, "__qualname__", other))
    return type(value) is type(other)
