"""Lists of layers without those that were removed: which are left, and what they are called then."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pruningawaretraining.models.skipped_blocks import PassThrough


def removed_blocks(model: nn.Module) -> tuple[str, ...]:
    """The blocks of a model that are removed: what takes their place hands on its input."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, PassThrough))


def names_without(model: nn.Module, gone: tuple[str, ...]) -> Callable[[str], str]:
    """Old name -> name once the lists of layers are shortened and numbered anew.

    Args:
        model: it has the lists.
        gone: the blocks that are removed.
    """
    numbers = {
        f"{name}.{old}": f"{name}.{new}"
        for name in _owners(gone)
        for new, old in enumerate(
            one for one, _ in model.get_submodule(name).named_children() if _left(name, one, gone)
        )
    }

    def short(name: str) -> str:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):  # inner lists first: their names hold the old numbers of the outer ones
            known = numbers.get(".".join(name.split(".")[:end]))
            if known is not None:
                parts[end - 1] = known.rpartition(".")[2]
        return ".".join(parts)

    return short


def shortened_lists(model: nn.Module, gone: tuple[str, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """For each list that has lost blocks, how many it had, and the numbers of those that are left."""
    found = []
    for name in _owners(gone):
        children = [one for one, _ in model.get_submodule(name).named_children()]
        kept = tuple(number for number, one in enumerate(children) if _left(name, one, gone))
        found.append((len(children), kept))
    return found


def _owners(gone: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in gone))


def _left(owner: str, child: str, gone: tuple[str, ...]) -> bool:
    return (f"{owner}.{child}" if owner else child) not in gone
