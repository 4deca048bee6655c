"""Compiled code of a model, and when it becomes stale."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

OBJECT = re.compile(r"___check_(?:type|obj)_id\((.*?), (\d+)\)")
"""A guard on the type or identity of an object: where it comes from, and its id."""
LOCAL = re.compile(r"L\['\w+'\]")
"""An object that a frame was called with."""


def forget_compiled(model: nn.Module) -> None:
    """Drop the compiled code of a model, so that the next call compiles the model as it is now.

    Compiled code does not look for forward hooks where there were none when it was made, so the first hook has to be
    told to it; and graphs of a model that has lost channels since would only fill the cache, until its limit
    (``torch._dynamo.config.recompile_limit``, 8) turns compilation off.

    Dynamo keeps compiled code with the Python function. What other functions have compiled stays; other models that
    run through the same function (the same class) are compiled once more.

    Args:
        model: it, its parts, and whatever function or module was compiled around them.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    try:
        with dynamo.convert_frame.compile_lock:
            codes = {code for code in _compiled(dynamo) if _is_of(code, model)}
            for code in _with_rests(dynamo, codes):
                logger.debug("compiled code of %s is dropped: the model has changed", code.co_name)
                dynamo.eval_frame.reset_code(code)
    except (AttributeError, TypeError):  # another version of PyTorch keeps it elsewhere
        torch.compiler.reset()


def _compiled(dynamo: Any) -> list[CodeType]:
    """Every function that has compiled code."""
    codes = [known() for known in dynamo.convert_frame.input_codes.seen]
    return [code for code in codes if code is not None and _entries(code)]


def _entries(code: CodeType) -> list[Any]:
    """The compiled versions of a function, each with the guards under which it is used."""
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries


def _is_of(code: CodeType, model: nn.Module) -> bool:
    """Whether a function was compiled with a model or a part of it: it was called with one, or reaches a module of a
    class of the model's own on its way."""
    parts = list(model.modules())
    known = {id(one) for one in parts} | {id(type(one)) for one in parts}
    own = {id(type(one)) for one in parts if not type(one).__module__.startswith("torch.nn.")} | {id(type(model))}
    objects = [found for entry in _entries(code) for found in _objects(entry.guard_manager.root)]
    return any(number in own or (number in known and LOCAL.fullmatch(source)) for source, number in objects)


def _objects(guards: Any) -> Iterator[tuple[str, int]]:
    """Sources and ids of the objects and types that a tree of guards looks at."""
    for guard in guards.get_leaf_guards():
        for part in guard.verbose_code_parts():
            yield from ((source, int(number)) for source, number in OBJECT.findall(part))
    for child in guards.get_child_managers():
        yield from _objects(child)


def _with_rests(dynamo: Any, codes: set[CodeType]) -> set[CodeType]:
    """Functions with what goes on in each after a graph break, which dynamo makes functions of their own."""
    rests, found, new = dynamo.resume_execution.ContinueExecutionCache.cache, set(codes), set(codes)
    while new:
        new = {rest for code in new if code in rests for rest in rests[code].values()} - found
        found |= new
    return found


def part_of_callers(function: Hook) -> Hook:
    """A decorator: dynamo reads a function where it compiles what calls it, and never compiles it alone.

    Where a hook is called by code that dynamo does not compile as a whole (``nn.Module.__call__`` of the outermost
    module), it would become a graph of its own, which cannot leave a function mode behind.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:
        if hasattr(frames, "skip_code"):  # PyTorch 2.6
            frames.skip_code(function.__code__)
        else:
            strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
            frames.set_code_exec_strategy(function.__code__, strategy)
    except (AttributeError, TypeError):  # another version of PyTorch
        logger.debug("%s may be compiled alone", function.__qualname__)
    return function


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block compiled modules run as they are written, so that hooks and tracing see every layer.

    Where the block itself is being compiled or exported by dynamo, it is read as it is written anyway.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_dynamo_compiling():
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
