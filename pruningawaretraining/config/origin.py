"""Names that a translated config has in its own file, so that messages can use them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pydantic import PrivateAttr

from pruningawaretraining.config.strict import Strict
from pruningawaretraining.errors import PruningError


@dataclass(frozen=True)
class Names:
    """The names of one rule in the form that it was translated from.

    Args:
        place: of the rule: "pruning_configs[0]"; "" where its keys are at the top level.
        fields: field of the rule -> full key of the form; other fields keep their names.
        entries: text of the rule -> what the user has written.
        places: text of the rule -> full key of the list that it is in, where that is not always the same.
    """

    place: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """The user's key for a field of the rule, such as ``target.sparsity``, or for the rule itself ("")."""
        known = [one for one in self.fields if name == one or name.startswith((f"{one}.", f"{one}["))]
        longest = max(known, key=len, default=None)
        if longest is None:
            return ".".join(part for part in (self.place, name) if part)
        return self.fields[longest] + re.sub(r"^\.\w+", "", name[len(longest) :])


@dataclass(frozen=True)
class Origin:
    """Where a config comes from. Two of them are always equal: configs that mean the same are the same, wherever they
    come from.

    Args:
        rules: names of the rules, by what messages call these.
        counts_epochs: whether its system counts epochs itself, from steps or from hooks at their beginning.
    """

    rules: Mapping[str, Names] = field(default_factory=dict, compare=False)
    counts_epochs: bool = field(default=False, compare=False)

    def told(self, message: str) -> str:
        """A message about the config in the words of its file."""
        return "\n".join(self._line(line) for line in message.split("\n")) if self.rules else message

    def _line(self, line: str) -> str:
        for called, names in self.rules.items():
            found = re.match(re.escape(called) + r"(?:\.([\w.\[\]]+))?(?=: )", line)
            if found is None:
                continue
            rest = line[found.end() :]
            listed = next((key for text, key in names.places.items() if rest.startswith(f": {text!r} ")), None)
            for text, written in names.entries.items():
                rest = rest.replace(repr(text), repr(written))
            for name, key in names.fields.items():
                if "_" in name:  # only snake_case names
                    rest = re.sub(rf"\b{name}\b", key, rest)
            return (listed or names.key(found[1] or "") or called) + rest
        return line


class Translated(Strict):
    """A config that knows what it was translated from."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """The names of its rules in the file that it comes from."""
        return self._origin

    def known_as(self, names: Sequence[Names], counts_epochs: bool = False) -> None:
        """Remember what its rules are called, one after the other, and whether its system counts epochs itself."""
        own = origin_of([getattr(rule, "name", None) for rule in getattr(self, "rules", ())], names)
        self._origin = replace(own, counts_epochs=counts_epochs)

    def follow(self, other: Translated, entries: Mapping[str, str]) -> None:
        """Have the names of another config, and further texts of rules -> what the user has written."""
        known = {called: replace(one, entries={**one.entries, **entries}) for called, one in other.origin.rules.items()}
        self._origin = Origin(known, other.origin.counts_epochs)


def origin_of(called: Sequence[str | None], names: Sequence[Names]) -> Origin:
    """The names of rules, by their own names and by their places in the list."""
    known = {f"rules[{number}]": one for number, one in enumerate(names)}
    own = {name: one for name, one in zip(called, names, strict=False) if name is not None}
    return Origin({**known, **own})


@contextmanager
def in_users_words(origin: Origin) -> Iterator[None]:
    """Errors about a config name its rules and their fields as the file does that it comes from.

    A context rather than a decorator: it leaves no frame of its own on the stack of what runs inside.
    """
    try:
        yield
    except PruningError as error:
        told = origin.told(str(error))
        if told != str(error):
            error.args = (told,)
        raise
