"""Parts of the state of a run that are no part of the model: random generators, seen inputs, and how state is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruningawaretraining.distributed.collectives import rank
from pruningawaretraining.errors import CheckpointError
from pruningawaretraining.files import BROKEN

VERSION = 1
LONGEST = 450
"""Characters of a message."""
PLAIN = (Tensor, str, int, float, bool, type(None))


def rng_state() -> dict[str, Any]:
    """The generators of torch, numpy and Python, as tensors and plain data."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "rank": rank(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where they were; on another rank than the one that was saved they are left alone.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: the state is damaged; no generator has changed.
    """
    if rank() != int(state["rank"]):
        return
    before = rng_state()
    try:
        _set_rng_state(state)
    except BROKEN:
        _set_rng_state(before)
        raise


def _set_rng_state(state: Mapping[str, Any]) -> None:
    kind, keys, position, has_gauss, cached = state["numpy"]
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), float(cached)))
    random.setstate((version, tuple(words.tolist()), gauss))
    for number, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), number)


def plain_or_none(nest: Any) -> Any:
    """Inputs, if they are tensors and plain data in tuples, lists and dicts; else None."""
    return nest if _is_plain(nest) else None


def _is_plain(nest: Any) -> bool:
    if type(nest) in (tuple, list):
        return all(_is_plain(item) for item in nest)
    if type(nest) is dict:
        return all(isinstance(key, str) and _is_plain(item) for key, item in nest.items())
    return isinstance(nest, PLAIN)


def check_version(state: Any) -> None:
    """Refuse a state of something else.

    Raises:
        CheckpointError: it is not one of ours, or of another version.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        shown = sorted(map(str, state))[:4] if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"state: {shown} is not from Pruning.state_dict()")
    if state["version"] != VERSION:
        raise CheckpointError(f"state: version {state['version']!r} is not known. Allowed: {VERSION}")


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[list[Callable[[], None]]]:
    """Undo everything if the block fails, an interrupt included; damage is raised as a CheckpointError.

    Args:
        modules: their parameters' and buffers' values are put back.

    Yields:
        A list for steps that undo; the last one is called first, before the values are put back.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    backup = [(tensor, tensor.detach().clone()) for tensor in tensors]
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException as error:
        for step in reversed(undo):
            step()
        with torch.no_grad():
            for tensor, values in backup:
                tensor.copy_(values)
        if not isinstance(error, BROKEN):
            raise
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
        if not isinstance(error, CheckpointError):
            what = f"state: it is damaged, or of another run: {what}"
        raise CheckpointError(_in_a_line(what)) from error


def _in_a_line(text: str) -> str:
    """A message that may show a value of the state, which may be a tensor, in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
