"""Widths that code states by an attribute, as in ``view(batch, self.width, -1)``: all that one attribute counts.

What is viewed with the same attribute has to stay equally wide, so equal places go together; the attribute then follows
a removal. This is a guess, since an attribute may be of that size by chance: it is made only for models that do not run
otherwise, and the dry run checks it.
"""

from __future__ import annotations

import inspect

from torch import nn

from pruningawaretraining.models.module_widths import widths_of
from pruningawaretraining.patterns.labels.follower import Follower
from pruningawaretraining.patterns.labels.slots import Array


def tie_stated(model: nn.Module, follower: Follower) -> None:
    """Join the slots of whatever an attribute counts that a module's code reads.

    Args:
        model: the traced model.
        follower: with the widths that it noted.
    """
    modules = dict(model.named_modules())
    first: dict[tuple[str, str], Array] = {}
    for one in follower.sizes:
        module = modules[one.layer]
        if type(module).__module__.startswith("torch.nn."):
            continue
        read = _names_read(type(module))
        for attribute, _ in widths_of(module, one.size):
            if attribute in read:
                known = first.setdefault((one.layer, attribute), one.slots)
                if len(known) == len(one.slots):
                    follower.slots.join(known, one.slots)


def _names_read(kind: type) -> set[str]:
    """The names in the code of a class's methods, except where it is built."""
    methods = (one for name, one in inspect.getmembers(kind, inspect.isfunction) if name != "__init__")
    own = (one for one in methods if not str(one.__module__).startswith("torch."))
    return {name for one in own for name in one.__code__.co_names}
