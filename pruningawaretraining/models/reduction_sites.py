"""Which calls in a module's code reduce, and what they are called by."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

NORMS = ("layer_norm", "rms_norm")
_DIM_AT = {"norm": 2, "vector_norm": 2, "linalg_vector_norm": 2}
"""Where the dimension is among the arguments of reductions, if not second."""
_PLAIN = ("mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod", "logsumexp")
REDUCTIONS = frozenset([*_PLAIN, "nansum", "nanmean", *_DIM_AT, *NORMS])
MARK = ".:"
"""What separates a module's name from the site in it, in the name of a part; see :meth:`Site.of`."""


_ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
_CALL, _AGAIN = nn.modules.module.__file__, torch.utils.checkpoint.__file__


def is_computed_again() -> bool:
    """Whether code runs in ``torch.utils.checkpoint`` called by the module's own code: there it runs once more in the
    backward pass, where the module is not called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _AGAIN:
            return True
        if frame.f_code.co_filename == _CALL and not is_plain(frame.f_locals.get("self")):
            return False
        frame = frame.f_back
    return False


def is_plain(module: object) -> bool:
    """Whether a module is no more than a function: what it calls is taken for its caller's code.

    It has no weights and no modules inside, and is of a class of the user's own (a pixel norm that follows several
    layers, a random depth) or one of PyTorch's activations and dropouts, which may run in training alone.
    """
    if not isinstance(module, nn.Module) or module._modules or module._parameters or module._buffers:
        return False
    bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    return all(one.__module__ in _ELEMENTWISE or not one.__module__.startswith("torch.nn.") for one in bases)


class Site(NamedTuple):
    """Which reductions of a module's own code are meant.

    Args:
        after: the module inside it that was called last before them ("" for none), plain ones aside.
        axis: the dimension that they reduce, counted from the end.
    """

    after: str
    axis: int

    def within(self, layer: str) -> str:
        """The name of the part that these reductions are; it starts with the module's name and a dot."""
        return f"{layer}{MARK}{self.after}:{self.axis}"

    @classmethod
    def of(cls, part: str) -> tuple[str, Site]:
        """The module's name and the site."""
        layer, _, rest = part.partition(MARK)
        after, _, axis = rest.rpartition(":")
        return layer, cls(after, int(axis))


def reduced_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[int, ...]] | None:
    """The tensor that a call reduces, and along which dimensions (counted from the front); None if it reduces none."""
    name = getattr(func, "__name__", "")
    if name not in REDUCTIONS or not args or not isinstance(args[0], Tensor):
        return None
    x, dims = args[0], args[0].dim()
    if name in NORMS:
        shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
        return (x, (dims - 1,)) if len(shape) == 1 else None
    place = _DIM_AT.get(name, 1)
    dim = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if dim is None or isinstance(dim, bool):  # var(x, unbiased)
        return x, tuple(range(dims))
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not all(isinstance(one, int) for one in given):  # max(x, y)
        return None
    return x, tuple(one % dims for one in given) if given else tuple(range(dims))
