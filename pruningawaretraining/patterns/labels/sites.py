"""Reductions in the code of modules: where they are, and which channels they reduce.

A reduction over channels that no module of its own holds is known by the module in whose code it is, the module inside
that which was called last before it, and the dimension; see :class:`pruningawaretraining.models.reduction_sites.Site`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruningawaretraining.models.reduction_sites import MARK, Site, is_computed_again, is_plain, reduced_by
from pruningawaretraining.patterns.coupling import Indices
from pruningawaretraining.patterns.labels.notes import Mixing
from pruningawaretraining.patterns.labels.slots import Array, varying


@dataclass(frozen=True, eq=False)
class Reduced:
    """One dimension that a call in a module's code reduces.

    Args:
        layer: the module; see :func:`pruningawaretraining.models.reduction_sites.is_plain`.
        site: where in it.
        slots: its channels; None if it has none, or more than they alone tell apart.
    """

    layer: str
    site: Site
    slots: Array | None

    @property
    def place(self) -> tuple[str, Site]:
        """The module and the site."""
        return self.layer, self.site


class Following(Protocol):
    """A follower, as far as it knows which code runs now.

    Attributes:
        stack: the modules that run.
        called: for each of them, the module that it called last.
        reductions: all that were seen.
        reducing: those of the call that runs now.
    """

    stack: list[str]
    called: list[str]
    reductions: list[Reduced]
    reducing: list[Reduced]

    def get(self, tensor: Tensor) -> list[Array]:
        """The slots of a tensor."""


class Calls(TorchFunctionMode):
    """Notes the reductions that the code of modules calls, while a follower follows it.

    Args:
        follower: it.
        model: what it follows.
    """

    def __init__(self, follower: Following, model: nn.Module) -> None:
        super().__init__()
        self.follower = follower
        self.plain = {name for name, module in model.named_modules() if name and is_plain(module)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = reduced_by(func, args, kwargs)
        if found is None or found[0].dim() == 0:
            return func(*args, **kwargs)
        follower = self.follower
        follower.reducing = self._notes(*found)
        follower.reductions += follower.reducing
        try:
            return func(*args, **kwargs)
        finally:
            follower.reducing = []

    def _notes(self, x: Tensor, dims: Sequence[int]) -> list[Reduced]:
        running = zip(reversed(self.follower.stack), reversed(self.follower.called), strict=True)
        layer, after = next(one for one in running if one[0] not in self.plain)
        prefix = f"{layer}." if layer else ""
        if after and not after.startswith(prefix):
            return []  # a module that is known by another name here
        if is_computed_again():
            return []
        arrays = self.follower.get(x)
        notes = []
        for dim in dims:
            along = [one.reshape(-1) for one in arrays if dim in varying(one)]
            alone = len(along) == 1 and len(along[0]) == x.shape[dim] and len(np.unique(along[0])) == len(along[0])
            site = Site(after.removeprefix(prefix), dim - x.dim())
            notes.append(Reduced(layer, site, along[0] if alone else None))
        return notes


class Sites:
    """Which reductions in code can be told about masks.

    Args:
        reductions: all that were seen.
        numbers: for each slot, its component.
    """

    def __init__(self, reductions: Sequence[Reduced], numbers: Indices) -> None:
        self.numbers = numbers
        self._places: dict[tuple[str, Site], list[Reduced]] = {}
        for one in reductions:
            if MARK not in f"{one.layer}{one.site.after}":
                self._places.setdefault((one.layer, one.site), []).append(one)
        self.accepted: dict[str, Indices] = {}

    def take(self, mixing: Mixing) -> bool:
        """Accept a reduction that computes something else without some channels; whether that is possible."""
        if mixing.site is None:
            return False
        layer, site = mixing.site
        channels = self.channels(layer, site)
        if channels is None or not np.array_equal(channels, self.numbers[mixing.slots]):
            return False
        self.accepted[site.within(layer)] = channels
        return True

    def channels(self, layer: str, site: Site) -> Indices | None:
        """The components of the channels that all reductions at a site are over; None if they are not the same."""
        notes = self._places.get((layer, site), [])
        known = [one for one in notes if one.slots is not None]
        found = [self.numbers[one.slots] for one in known]
        alike = all(np.array_equal(one, found[0]) for one in found)
        others = (
            len(known) < len(notes) or not found
        )  # what is as long as the channels by chance could be taken for them
        return None if others or not alike else found[0]

    def result(self) -> dict[str, Indices]:
        """Those that were accepted, and sums and norms of the same channels: what is no channel's any more is not 0."""
        held = np.unique(np.concatenate(list(self.accepted.values()))) if self.accepted else np.zeros(0, int)
        found = dict(self.accepted)
        for layer, site in self._places:
            channels = self.channels(layer, site)
            if channels is not None and np.isin(channels, held).any():
                found.setdefault(site.within(layer), channels)
        return found
