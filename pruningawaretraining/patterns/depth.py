"""Depth: a group is a whole residual block, which is replaced by the identity when removed.

A block is a child of an ``nn.Sequential`` or ``nn.ModuleList`` that runs once, adds its input to what it computes, and
gives out one tensor of its input's shape. Whatever else is there stays, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruningawaretraining.config.options import BLOCKS, Support, support_of
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.attachment import Attachment, MaskHooks, OwnCost
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.models.calling import ForwardFn, checked_call, evaluating
from pruningawaretraining.models.fake_quant import is_converted, resting
from pruningawaretraining.models.skipped_blocks import BlockHooks, remove_blocks
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.patterns.block_names import candidates
from pruningawaretraining.patterns.channel_groups import ChannelGroups
from pruningawaretraining.patterns.selection import none_chosen, selected
from pruningawaretraining.registry import register

SIGNATURE = "blocks"
ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.addcmul, torch.ops.aten.addcmul_)


@register("pattern", "depth", "residual_block")
@dataclass(frozen=True)
class Depth:
    """Whole residual blocks, all in one ranking; they can be removed physically. Blocks that change the shape stay."""

    support: ClassVar[Support] = BLOCKS

    def chosen(
        self, model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str] = (), key: str = ""
    ) -> set[str]:
        """The children of containers that a rule selects, by their own names or those of modules around them.

        Raises:
            ConfigError: a name that is not a module of the model, or nothing is selected.
        """
        names = candidates(model)
        wanted, spared = selected(model, layers, exclude, names, key)
        chosen = wanted - spared
        if names and not chosen:
            raise none_chosen(model, layers, exclude, key, "block", names)
        return chosen

    def head_units(self, model: nn.Module, chosen: set[str]) -> dict[str, str]:
        """No heads are groups of their own."""
        return {}


def is_of_blocks(one: GroupSet) -> bool:
    """Whether a set's groups are whole blocks; ``layers`` of such a set are its blocks, one a group."""
    return one.signature == SIGNATURE


@dataclass
class _Run:
    """Record one candidate while the model runs."""

    calls: int = 0
    given: Tensor | None = None
    made: Any = None
    adds: bool = False


class _Additions(TorchDispatchMode):
    """Records which of the running blocks add their input, or a view of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[_Run] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.open and func._overloadpacket in ADDITIONS:
            added = {_storage(one) for one in args if isinstance(one, Tensor)}
            for run in self.open:
                run.adds |= run.given is not None and _storage(run.given) in added
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _watched(model: nn.Module, runs: Mapping[str, _Run], additions: _Additions) -> Iterator[None]:
    """Hooks on every candidate inside the block."""
    modules, handles = dict(model.named_modules()), []

    def begin(run: _Run, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.calls += 1
        run.given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        additions.open.append(run)

    def end(run: _Run, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run.made = output
        additions.open.pop()

    for name, run in runs.items():
        handles.append(modules[name].register_forward_pre_hook(partial(begin, run), with_kwargs=True))
        handles.append(modules[name].register_forward_hook(partial(end, run)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> dict[str, _Run]:
    """Every candidate, as it ran on the example inputs."""
    runs = {name: _Run() for name in candidates(model)}
    additions, fast_path = _Additions(), torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of PyTorch's own encoder layers is one operation, additions included.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), evaluating(model), resting(model), _watched(model, runs, additions), additions:
            checked_call(model, inputs, forward_fn)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return runs


def _problem(run: _Run, module: nn.Module, owners: Counter[int]) -> str:
    """Why a candidate cannot be removed; "" if it can."""
    if run.calls != 1:
        return f"it runs {run.calls} times on the example inputs"
    first, *others = run.made if isinstance(run.made, tuple) and run.made else (run.made,)
    if not isinstance(first, Tensor) or run.given is None:
        return f"it makes {type(first).__name__} of {type(run.given).__name__}, not a tensor of a tensor"
    if any(one is not None for one in others):
        return "it hands on more than one tensor"
    if first.shape != run.given.shape:
        return f"it changes the shape from {tuple(run.given.shape)} to {tuple(first.shape)}"
    if not run.adds:
        return "it does not add its input to what it computes"
    return _parameter_problem(module, owners)


def _parameter_problem(module: nn.Module, owners: Counter[int]) -> str:
    for name, parameter in module.named_parameters():
        if owners[id(parameter)] > 1:
            return f"its {name} is shared with another module"
        if is_converted(parameter):
            return f"its {name} is quantized already; prune before it is converted"
        if parameter.dim() == 0:
            return f"its {name} has no dimensions, so it cannot be masked"
    return ""


def _is_stage(run: _Run, inner: Sequence[_Run]) -> bool:
    """Whether a block only calls blocks: its input is the input of one of them, its output that of one."""
    return any(one.given is run.given for one in inner) and any(one.made is run.made for one in inner)


@dataclass(frozen=True, eq=False)
class SkippedBlocks(Attachment):
    """Residual blocks, each a group: masked it hands on its input, removed it is replaced by what does.

    Args:
        outputs: block -> see :class:`~pruningawaretraining.models.skipped_blocks.PassThrough`.
    """

    outputs: Mapping[str, int]

    def taken_out(self, keep_G: Tensor) -> dict[str, int]:
        """The blocks that go, each with its ``outputs``."""
        return {name: self.outputs[name] for name, keep in self.kept(keep_G).items() if not bool(keep)}

    def hooks(self, model: nn.Module) -> MaskHooks:
        """See :class:`~pruningawaretraining.models.skipped_blocks.BlockHooks`."""
        return BlockHooks(model, self.taken_out)

    def remove(self, model: nn.Module, keep_G: Tensor, surgery: Surgery) -> list[nn.Parameter]:
        """Replace the blocks that go."""
        return remove_blocks(model, self.taken_out(keep_G), surgery)

    def costs(self) -> list[OwnCost]:
        """All that is in a block goes with it."""
        return [OwnCost(name, groups, inner=True) for name, groups in self.groups.items()]

    def graph_problem(self, model: nn.Module) -> str:
        """A block is not one thing in a graph."""
        return (
            "'depth' takes whole blocks out of the model, and in an exported graph they cannot be found. "
            "Allowed: remove them before the export"
        )


def find_blocks(
    model: nn.Module,
    inputs: Any,
    chosen: set[str],
    forward_fn: ForwardFn | None = None,
) -> ChannelGroups:
    """Group the residual blocks of a model: all in one set, a group each.

    Args:
        model: the model; it is run once in eval mode.
        inputs, forward_fn: how to run it.
        chosen: the candidates that may go. Of nested ones the outermost is the group, but blocks rather than a stage
            that only calls them one after the other.

    Raises:
        ModelError: the inputs are rejected, or no block can go.
    """
    runs, modules = _run(model, inputs, forward_fn), dict(model.named_modules())
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    problems = {name: _problem(run, modules[name], owners) for name, run in runs.items()}
    for name in [name for name, problem in problems.items() if not problem]:
        inner = [runs[one] for one in runs if one.startswith(f"{name}.") and not problems[one]]
        if _is_stage(runs[name], inner):
            problems[name] = "it is made of blocks, which go one by one"
    able = [name for name in runs if name in chosen and not problems[name]]
    names = [name for name in able if not any(name.startswith(f"{other}.") for other in able)]
    skipped = {
        name: problems[name]
        for name in runs
        if name in chosen and problems[name] and not any(name.startswith(f"{other}.") for other in runs)
    }
    if not names:
        shown = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4]) or "no container has any"
        raise ModelError(f"model: {type(model).__name__} has no residual block that could go. {shown}")
    members = [
        member
        for group, name in enumerate(names)
        for member in _members(name, modules[name], group, len(names))
    ]  # fmt: skip
    sets = (GroupSet(names[0], 0, len(names), 1, SIGNATURE, tuple(names)),)
    groups = {name: torch.tensor([group]) for group, name in enumerate(names)}
    blocks = SkippedBlocks(groups, {name: _outputs(runs[name]) for name in names})
    return ChannelGroups(Grouping("depth", tuple(members), sets), skipped, (blocks,))


def _outputs(run: _Run) -> int:
    return len(run.made) if isinstance(run.made, tuple) else 0


def _members(name: str, module: nn.Module, group: int, size: int) -> Iterator[Member]:
    """All parameters of a block; its buffers go with it, and are never masked."""
    for own, parameter in module.named_parameters():
        vector = "norm" if own.rpartition(".")[2] == "weight" else "bias"
        groups_D = torch.full((len(parameter),), group)
        yield Member.along(f"{name}.{own}", parameter, 0, groups_D, size, "out" if parameter.dim() > 1 else vector)


def check_alone(patterns: Sequence[tuple[str, Any]]) -> None:
    """Refuse rules beside one on depth.

    Args:
        patterns: key and pattern of every rule that is enabled.

    Raises:
        ConfigError: it names both.
    """
    found = [key for key, one in patterns if support_of(one).kind == "block" or getattr(one, "depth", False)]
    other = next((key for key, _ in patterns if key != found[0]), None) if found else None
    if other is not None:
        raise ConfigError(
            f"{found[0]}.pattern: 'depth' removes whole blocks, and {other} would prune in them. Allowed: one rule "
            "with 'pattern: [channel, head, expert, depth]'; or one after the other, each in a Pruning of its own"
        )
