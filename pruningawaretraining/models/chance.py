"""Make random forward passes repeatable: the same seeds, and draws that do not depend on widths.

Two passes of one seed draw the same numbers only while tensors have the same shapes. A removed model has fewer
channels, so random operations give constants inside :class:`Still`: dropout hands its input on, noise is the same
everywhere.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.models.calling import generator_devices, same_generators

HALF = 0.5


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Restore the generators of PyTorch, Python and NumPy after the block."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    states = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        with same_generators(model):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.set_state(states[1])


def seed(model: nn.Module, number: int) -> None:
    """Seed every generator that a forward pass of a model may draw from; see :func:`same_draws`."""
    torch.default_generator.manual_seed(number)
    for device in generator_devices(model):
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    random.seed(number)
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    if numpy is not None:
        numpy.seed(number)


def has_drawn(model: nn.Module, number: int) -> bool:
    """Whether PyTorch's generators have moved since they were seeded."""
    now = [torch.default_generator.get_state()]
    fresh = [torch.Generator().manual_seed(number).get_state()]
    for device in generator_devices(model):
        now.append(torch.cuda.default_generators[device.index or 0].get_state())
        fresh.append(torch.Generator(device).manual_seed(number).get_state())
    return not all(torch.equal(one, other) for one, other in zip(now, fresh, strict=True))


class Still(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replace random operations by constants: dropout by its input, noise by one half, permutations by the identity."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func._schema.name.partition("::")[2])
        return func(*args, **kwargs) if rule is None else rule(func(*args, **kwargs), args)


def _half(drawn: Tensor, args: tuple[Any, ...]) -> Tensor:
    return drawn.fill_(HALF) if drawn.is_floating_point() else drawn.zero_()


def _expected(drawn: Tensor, args: tuple[Any, ...]) -> Tensor:
    """The mean of Bernoulli draws: of one probability, or of each entry's own."""
    given = args[1] if len(args) > 1 else HALF
    return drawn.copy_(given) if isinstance(given, Tensor) else drawn.fill_(given)


def _untouched(drawn: Any, args: tuple[Any, ...]) -> Any:
    kept, mask = drawn
    return kept.copy_(args[0]), mask.fill_(1)


def _in_order(drawn: Tensor, args: tuple[Any, ...]) -> Tensor:
    return drawn.copy_(torch.arange(len(drawn), device=drawn.device))


_Rule = Callable[[Any, tuple[Any, ...]], Any]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like", "normal", "normal_", "uniform", "uniform_"), _half),
    **dict.fromkeys(("normal_functional", "exponential_", "randint", "randint_like", "random_"), _half),
    "bernoulli_": _expected,
    "native_dropout": _untouched,
    "randperm": _in_order,
}
