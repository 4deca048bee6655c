"""The tree that ``pat inspect`` shows: widths, coupled layers, shares of the MACs, and which layers stay and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from pruningawaretraining.costs.macs import macs_per_layer
from pruningawaretraining.experiment.inspection import Inspected, has_channels
from pruningawaretraining.masks.unprunable import by_reason
from pruningawaretraining.models.example_inputs import batch_of
from pruningawaretraining.report.summary import percent, si, wrapped_name
from pruningawaretraining.session.pruning import Pruning

HEADINGS = ("in", "out", "set", "MACs", "of all", "parameters")


@dataclass
class _Node:
    """A module by the last parts of its name; a layer has cells."""

    children: dict[str, _Node] = field(default_factory=dict)
    cells: tuple[str, ...] = ()


def tree_view(inspected: Inspected, width: int = 80) -> Group:
    """A summary, the tree of layers, and what stays as it is.

    Layers whose parameters are all vectors (norms, PReLU) are not listed; the totals count them.

    Args:
        inspected: the model.
        width: of the terminal, in characters.

    Raises:
        ConfigError, ModelError: nothing can be pruned, or the model rejects the inputs.
    """
    model = inspected.model
    pruner = Pruning(model, inspected.pruning, example_inputs=inspected.inputs)
    sets = pruner.describe_sets()
    coupled = pruner.engine.coupled if has_channels(inspected.pruning) else None
    skipped: Mapping[str, str] = {} if coupled is None else coupled.found.skipped
    widths = {str(row["name"]): row for row in pruner.report().layers}
    number_of = {one["source"].removesuffix(".weight"): str(one["number"]) for one in sets}
    macs = macs_per_layer(model, inspected.inputs)
    root = _Node()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(one.dim() > 1 for one in own):
            row = widths.get(name, {})
            number = number_of.get(str(row.get("set") or name))
            cost = _own_macs(name, module, macs)
            cells = (row.get("dense_in") or "–", row.get("dense_out") or "–", number or "stays")
            shares = (si(cost), percent(cost / (macs[""] or 1)), si(sum(one.numel() for one in own)))
            _place(root, name).cells = (*map(str, cells), *shares)
    return Group(_summary(inspected, macs[""], len(sets)), _table(root, width), *_stays(skipped))


def _own_macs(name: str, module: nn.Module, macs: Mapping[str, int]) -> int:
    """MACs that a module computes itself, such as an attention: its own less those of its children."""
    inside = sum(macs[f"{name}.{child}" if name else child] for child, _ in module.named_children())
    return max(macs[name] - inside, 0)


def _place(root: _Node, name: str) -> _Node:
    for part in name.split(".") if name else ("(itself)",):
        root = root.children.setdefault(part, _Node())
    return root


def _summary(inspected: Inspected, macs: int, sets: int) -> Text:
    parameters = sum(one.numel() for one in inspected.model.parameters())
    noun = "set of coupled layers" if sets == 1 else "sets of coupled layers"
    return Text(
        f"{type(inspected.model).__name__}: {si(parameters)} parameters, {si(macs)} MACs for {_inputs(inspected)}\n"
        f"{sets} {noun} can be pruned. Layers with the same number lose the same channels."
    )


def _inputs(inspected: Inspected) -> str:
    if not isinstance(inspected.inputs, Tensor):
        return "the example inputs"
    noun = "an input" if batch_of(inspected.inputs) == 1 else "a batch"
    return f"{noun} of {'x'.join(map(str, inspected.inputs.shape))}"


def _table(root: _Node, width: int) -> Table:
    lines = list(_lines(root, "", top=True))
    columns = zip(HEADINGS, *(cells for *_, cells in lines if cells), strict=True)
    room = width - 2 - sum(max(map(len, cells)) + 3 for cells in columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for head, rest, name, cells in lines:
        first, *more = wrapped_name(name, room - len(rest) - 2).split("\n")
        table.add_row(Text("\n".join([head + first, *(f"{rest}  {part}" for part in more)])), *cells)
    return table


def _lines(node: _Node, before: str, top: bool = False) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(guides, guides of further lines, name, cells) of every line; a module with one child shares a line with it."""
    for number, (name, child) in enumerate(node.children.items(), 1):
        while not child.cells and len(child.children) == 1:
            ((part, child),) = child.children.items()
            name = f"{name}.{part}"
        last = number == len(node.children)
        head, rest = ("", "") if top else (f"{before}{'└─ ' if last else '├─ '}", f"{before}{'   ' if last else '│  '}")
        yield head, rest, name, child.cells
        yield from _lines(child, rest)


def _stays(skipped: Mapping[str, str]) -> list[Text]:
    """Which layers stay as they are, by reason."""
    lines = [f"  {reason}: {names}" for reason, names in by_reason(skipped)]
    return [Text("\n".join(["Stay as they are:", *lines]))] if lines else []
