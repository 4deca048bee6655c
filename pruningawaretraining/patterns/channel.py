"""Channels: a group is one channel of a layer and everything that the dependency graph couples to it.

That is the filter and its bias, the same channel of every layer in the same residual stream, the weights of norms
behind it, and the input columns of all consumers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from pruningawaretraining.config.options import COUPLED, Support
from pruningawaretraining.errors import ModelError
from pruningawaretraining.groups.attachment import Attachment
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.models.calling import ForwardFn
from pruningawaretraining.models.fake_quant import resting
from pruningawaretraining.patterns.block_names import candidates, chosen_blocks
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.channel_labels import channel_groups, producer_names
from pruningawaretraining.patterns.coupling import TRACE_LIMIT
from pruningawaretraining.patterns.expert import chosen_experts, expert_names
from pruningawaretraining.patterns.head import attention_names, chosen_heads, find_heads, is_of_heads
from pruningawaretraining.patterns.labels.trace import trace
from pruningawaretraining.patterns.raw_products import raw_weights
from pruningawaretraining.patterns.selection import selected
from pruningawaretraining.registry import calling, check_returned, names, register

logger = logging.getLogger(__name__)

NO_PATH = (
    "None of them is seen to reach a floating point output: the outputs are integers (argmax), or detached. Allowed: "
    "forward_fn=lambda model, inputs: ... that returns the logits"
)


class StructuredPattern(Protocol):
    """A pattern whose groups can be removed physically."""

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The layers and blocks that a rule selects."""
        ...

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """Selected attention block -> its unit of pruning."""
        ...


def own_groups(pattern: Any, model: nn.Module, chosen: set[str]) -> list[ChannelGroups]:
    """The groups that a pattern finds itself, one set for each selected module; none if they are those of the trace."""
    find: Callable[[nn.Module, set[str]], ChannelGroups] | None = getattr(pattern, "find", None)
    if find is None:
        return []
    with calling("pattern", pattern, "ChannelGroups"):
        found: Any = find(model, chosen)
    good = isinstance(found, ChannelGroups)
    check_returned(good, "pattern", pattern, found, "ChannelGroups")
    good = isinstance(found.attachments, tuple) and all(isinstance(one, Attachment) for one in found.attachments)
    check_returned(good, "pattern", pattern, found.attachments, "ChannelGroups with a tuple of Attachments")
    return [found]


def head_units_of(pattern: Any, model: nn.Module, chosen: set[str]) -> dict[str, str]:
    """Attention block -> its unit of pruning.

    Raises:
        ExtensionError: the pattern raises, or returns anything else.
    """
    expected = f"a dictionary: attention block -> {' or '.join(names('head_unit'))}"
    with calling("pattern", pattern, expected):
        found: Any = pattern.head_units(model, chosen)
    good = isinstance(found, dict) and found.keys() <= dict(model.named_modules()).keys()
    good = good and all(one in names("head_unit") for one in found.values())
    check_returned(good, "pattern", pattern, found, expected)
    return dict(found)


@register("pattern", "channel", "channels")
@dataclass(frozen=True)
class Channel:
    """Whole channels, coupled through the dependency graph; they can be removed physically.

    Args:
        heads: attention heads too, in the same ranking and towards the same target.
        experts: whole experts too.
        depth: whole residual blocks too; one that goes takes the channels, heads and experts in it along.
    """

    support: ClassVar[Support] = COUPLED

    heads: bool = False
    experts: bool = False
    depth: bool = False

    def build(
        self,
        model: nn.Module,
        inputs: Any,
        layers: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        forward_fn: ForwardFn | None = None,
    ) -> ChannelGroups:
        """Trace the model and label its channels.

        Args:
            model: the model.
            inputs: example inputs.
            layers: only sets whose every layer that loses output channels is selected here; None for all.
            exclude: sets with one of these layers are left out.
            forward_fn: see :func:`pruningawaretraining.models.calling.call`.

        Raises:
            ConfigError: a name that is not a layer of the model.
            ModelError: the inputs are rejected, or nothing can be pruned.
        """
        chosen = self.chosen(model, layers, exclude)
        return find_channels(model, inputs, chosen, forward_fn, self.head_units(model, chosen))

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The layers that a rule selects, attention blocks if heads are wanted, and so on."""
        chosen = chosen_layers(model, layers, exclude, key)
        chosen |= chosen_heads(model, layers, exclude, key) if self.heads else set()
        chosen |= chosen_experts(model, layers, exclude, key) if self.experts else set()
        return chosen | chosen_blocks(model, layers, exclude, key) if self.depth else chosen

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """Attention block -> its unit of pruning."""
        blocks = set(candidates(model)) - attention_names(model) if self.depth else set()
        blocks |= expert_names(model) if self.experts else set()
        return dict.fromkeys(chosen - {*producer_names(model), *raw_weights(model)} - blocks, "group")


def chosen_layers_of(
    pattern: StructuredPattern, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str], key: str = ""
) -> set[str]:
    """The layers that a pattern of removable groups selects; arguments as those of :func:`chosen_layers`.

    Raises:
        ConfigError: a name that is not a layer of the model.
        ExtensionError: the pattern raises, or does not return names of layers.
    """
    expected = "a set of names of layers"
    with calling("pattern", pattern, expected):
        found: Any = pattern.chosen(model, layers, exclude, key)
    named = {*dict(model.named_modules()), *raw_weights(model)}
    check_returned(isinstance(found, (set, frozenset)) and found <= named, "pattern", pattern, found, expected)
    return set(found)


def chosen_layers(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
) -> set[str]:
    """The layers that may lose output channels.

    Args:
        model: the model.
        layers, exclude: layers or containers, as in a rule.
        key: of the rule, for messages.

    Raises:
        ConfigError: a name that is not a layer of the model.
    """
    wanted, spared = selected(model, layers, exclude, [*producer_names(model), *raw_weights(model)], key)
    return wanted - spared


def find_channels(
    model: nn.Module,
    inputs: Any,
    chosen: set[str],
    forward_fn: ForwardFn | None = None,
    units: Mapping[str, str] | None = None,
    limit: float = TRACE_LIMIT,
    own: Sequence[ChannelGroups] = (),
    stated: bool = False,
) -> ChannelGroups:
    """Trace a model and group its channels and heads.

    Args:
        model: the model.
        inputs, forward_fn: how to run it.
        chosen: the layers that may lose output channels; without any the model is not traced.
        units: attention blocks that may lose heads -> what goes together there, see
            :class:`pruningawaretraining.patterns.head.Head`.
        limit: seconds that the search for coupled channels may take; what is not finished then is left out.
        own: groups that patterns have found themselves, see :func:`own_groups`.
        stated: see :func:`pruningawaretraining.patterns.labels.trace.trace`.

    Raises:
        ModelError: the inputs are rejected, or nothing can be pruned.
    """
    units = units or {}
    found = ChannelGroups(Grouping("channel", (), ()))
    if chosen - units.keys() or not (units or own):
        with resting(model):
            dependencies = trace(model, inputs, forward_fn, limit, stated)
        found = channel_groups(model, dependencies, chosen)
    if units:
        found = found.beside(find_heads(model, units))
        found = found.without(dict(_useless_heads(found)))
    for one in own:
        found = found.beside(one)
    if found.grouping.size == 0:
        reasons = "; ".join(f"{name or 'the model itself'}: {why}" for name, why in list(found.skipped.items())[:4])
        raise ModelError(
            f"model: {type(model).__name__} has no prunable channel group among {len(chosen)} selected layers. "
            f"{reasons or NO_PATH}"
        )
    return found


def _useless_heads(found: ChannelGroups) -> Iterator[tuple[int, str]]:
    """Sets of heads that cannot be pruned: single heads, and blocks that are pruned by channels."""
    taken: dict[tuple[str, int], int] = {}
    for member in found.grouping.members:
        assert member.slots is not None
        groups = member.slots[member.slots < found.grouping.size]
        dim = next(index for index, label in enumerate(member.labels) if label is not None)
        number = int(found.grouping.set_ids[groups[0]]) if len(groups) else -1
        if number >= 0 and taken.setdefault((member.name, dim), number) != number:
            first = found.grouping.sets[taken[member.name, dim]]
            if is_of_heads(found.grouping.sets[number]) and not is_of_heads(first):
                yield number, f"{member.name} is cut into channels of {first.name}"
    for number, one in enumerate(found.grouping.sets):
        if is_of_heads(one) and one.size == 1:
            yield number, "it has one head"
