"""Experts of mixture-of-experts blocks: a group is one expert, with its slices of stacked weights and its router row.

Shape suffixes: ``_E`` experts of a block.

A block has a child whose weights of all experts are stacked along the first dimension, as transformers 5 keeps them
(``experts.gate_up_proj``, ``experts.down_proj``), and a router with a row for each. A token takes as many experts as
before, so that many always stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pruningawaretraining.config.options import EXPERTS, Support
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.groups.attachment import Attachment
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.models.kept_hooks import narrow_saved
from pruningawaretraining.models.masked_routers import COUNTS, RouterHooks
from pruningawaretraining.models.module_widths import set_count
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.patterns.block_names import chosen_blocks
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.selection import none_chosen, selected
from pruningawaretraining.registry import register

SIGNATURE = "experts"
TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_k")
"""Attributes of a router or a block that say how many experts a token takes."""
ROUTER_GROUPS = ("n_group", "num_group", "num_groups", "num_expert_group")
"""Attributes of a router or a block that say in how many groups of equal size it has its experts."""


@register("pattern", "expert", "experts", "moe")
@dataclass(frozen=True)
class Expert:
    """Whole experts of mixture-of-experts blocks; they can be removed physically. As many stay as a token takes.

    Args:
        depth: whole residual blocks too; one that goes takes the experts in it along.
    """

    support: ClassVar[Support] = EXPERTS

    depth: bool = False

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The blocks that a rule selects: by their names, those of containers, or of their routers or experts.

        Raises:
            ConfigError: a name that is not a module of the model, or no block is selected.
        """
        blocks, unread = expert_blocks(model)
        chosen = chosen_experts(model, layers, exclude, key)
        if not chosen:
            error = none_chosen(model, layers, exclude, key, "block of experts", [one.name for one in blocks])
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unread.items())[:4])
            raise ConfigError(f"{error}. {reasons}") if reasons and not blocks else error
        return chosen | chosen_blocks(model, layers, exclude, key) if self.depth else chosen

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """No heads are groups of their own."""
        return {}

    def find(self, model: nn.Module, chosen: set[str]) -> ChannelGroups:
        """Group the experts of the selected blocks: one set for each block."""
        known, skipped = expert_blocks(model)
        blocks = [one for one in known if one.name in chosen and one.top_k < one.experts]
        for one in known:
            if one.name in chosen and one not in blocks:
                skipped[one.name] = f"a token takes {one.top_k} of its {one.experts} experts, so that none can go"
        total, start = sum(one.experts for one in blocks), 0
        members: list[Member] = []
        sets: list[GroupSet] = []
        groups: dict[str, Tensor] = {}
        for one in blocks:
            groups[one.name] = groups_E = torch.arange(start, start + one.experts)
            members += [
                Member.along(name, tensor, 0, groups_E, total, role) for name, (tensor, role) in one.tensors.items()
            ]
            stop = start + one.experts
            signature = f"{SIGNATURE}:{type(one.module).__name__}"
            sets.append(GroupSet(one.name, start, stop, 1, signature, one.names, least=one.top_k))
            start = stop
        routers = {one.name: one.router for one in blocks}
        return ChannelGroups(Grouping("expert", tuple(members), tuple(sets)), skipped, (Experts(groups, routers),))


def chosen_experts(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
) -> set[str]:
    """The blocks whose experts a rule selects, and the modules with their weights.

    Raises:
        ConfigError: a name that is not a module of the model.
    """
    blocks, unread = expert_blocks(model)
    names = {name for one in blocks for name in one.names} | set(unread)
    wanted, spared = selected(model, layers, exclude, names, key)
    chosen = [one for one in blocks if wanted & set(one.names) and not spared & set(one.names)]
    return {name for one in chosen for name in (one.name, one.weights)}


def expert_names(model: nn.Module) -> set[str]:
    """Names of the blocks of experts of a model, and of the modules with their weights."""
    return {name for one in expert_blocks(model)[0] for name in (one.name, one.weights)}


@dataclass(frozen=True)
class ExpertBlock:
    """A block of experts.

    Args:
        name, module: the block.
        router, weights: names of its router, and of the module with the experts' weights.
        experts, top_k: how many there are, and how many a token takes.
        tensors: name of a tensor with an entry for each expert along its first dimension -> it, and its role.
    """

    name: str
    module: nn.Module
    router: str
    weights: str
    experts: int
    top_k: int
    tensors: Mapping[str, tuple[Tensor, str]]

    @property
    def names(self) -> tuple[str, ...]:
        """The block, and its two parts."""
        return self.name, self.router, self.weights


def is_of_experts(one: GroupSet) -> bool:
    """Whether a set's groups are experts."""
    return one.signature.startswith(f"{SIGNATURE}:")


def expert_blocks(model: nn.Module) -> tuple[list[ExpertBlock], dict[str, str]]:
    """The blocks of experts of a model, and those that are not understood, each with the reason."""
    found: list[ExpertBlock] = []
    unread: dict[str, str] = {}
    for name, module in model.named_modules():
        for child, weights in module.named_children():
            if _stacked(weights) > 0:
                read = _read(name, module, child, weights)
                if isinstance(read, str):
                    unread[name] = read
                else:
                    found.append(read)
    return found, unread


def _stacked(module: nn.Module) -> int:
    """How many experts a module stacks the weights of; 0 if it does not look like one that does."""
    weights = [one for one in module.parameters(recurse=False) if one.dim() == 3]
    sizes = {len(one) for one in weights}
    return sizes.pop() if len(weights) > 1 and len(sizes) == 1 else 0


def _read(name: str, block: nn.Module, child: str, weights: nn.Module) -> ExpertBlock | str:
    """A block of experts, or why it is not understood."""
    experts, prefix = _stacked(weights), f"{name}." if name else ""
    routers = [
        other
        for other, one in block.named_children()
        if other != child and isinstance(weight := getattr(one, "weight", None), Tensor)
        if weight.dim() == 2 and len(weight) == experts
    ]
    if len(routers) != 1:
        return f"{len(routers)} of its modules have a weight with a row for each of its {experts} experts, not one"
    router = block.get_submodule(routers[0])
    loose = [one for one, tensor in _own(block) if tensor.dim() > 0 and len(tensor) == experts]
    if loose:
        return f"its {loose[0]} has an entry for each expert, outside the router"
    uneven = [one for one, tensor in _own(weights) if tensor.dim() == 0 or len(tensor) != experts]
    if uneven:
        return f"{child}.{uneven[0]} has no entry for each expert"
    top_k = next((value for one in (router, block) if (value := _first(one, TOP_K)) is not None), None)
    if top_k is None:
        return f"how many experts a token takes is in none of the attributes {', '.join(TOP_K)}"
    groups = next((value for one in (router, block) if (value := _first(one, ROUTER_GROUPS)) is not None), 1)
    if groups > 1:
        return f"its router chooses among {groups} groups of experts, which have to stay equally large"
    tensors = {f"{prefix}{child}.{one}": (tensor, _role(tensor, 3)) for one, tensor in _own(weights)}
    tensors |= {
        f"{prefix}{routers[0]}.{one}": (tensor, _role(tensor, 2))
        for one, tensor in _own(router)
        if tensor.dim() > 0 and len(tensor) == experts
    }
    return ExpertBlock(name, block, f"{prefix}{routers[0]}", f"{prefix}{child}", experts, top_k, tensors)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _role(tensor: Tensor, dims: int) -> str:
    """The role of a tensor whose weights have so many dimensions."""
    return "buffer" if not isinstance(tensor, nn.Parameter) else "out" if tensor.dim() == dims else "bias"


def _first(module: nn.Module, attributes: Sequence[str]) -> int | None:
    """The first of these attributes that is a positive number."""
    values = [getattr(module, name, None) for name in attributes]
    return next((one for one in values if isinstance(one, int) and one > 0), None)


@dataclass(frozen=True, eq=False)
class Experts(Attachment):
    """Blocks of experts: a router chooses among those that are kept, and attributes count them.

    Args:
        routers: block -> name of its router.
    """

    routers: Mapping[str, str]

    def hooks(self, model: nn.Module) -> RouterHooks:
        """See :class:`~pruningawaretraining.models.masked_routers.RouterHooks`."""
        return RouterHooks(model, self.routers, self.kept)

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> tuple[nn.Parameter, ...]:
        """Let attributes of the blocks count what is left; those around them do where all blocks have equally many."""
        for name, keep_E in self.kept(keep_G).items():
            if not bool(keep_E.any()):  # gone with its residual block
                continue
            narrow_saved(model.get_submodule(self.routers[name]), keep_E, surgery)
            for module in model.get_submodule(name).modules():
                _count(module, int(keep_E.sum()), surgery, only=len(keep_E))
        left = {one.experts for one in expert_blocks(model)[0]}
        if len(left) == 1 and not bool(keep_G.all()):
            for module in model.modules():
                _count(module, next(iter(left)), surgery)
        return ()

    def graph_problem(self, model: nn.Module) -> str:
        """A router is not one thing in a graph."""
        return (
            "'expert' takes experts out of what routers choose from, and in an exported graph these cannot be found. "
            "Allowed: remove them before the export"
        )


def _count(module: nn.Module, experts: int, surgery: Surgery, only: int | None = None) -> None:
    """Let the attributes that count experts count so many; ``only`` those that are this number."""
    for attribute in COUNTS:
        value = vars(module).get(attribute)
        if isinstance(value, int) and value != experts and value == (value if only is None else only):
            set_count(module, attribute, experts, surgery)
