"""YAML, safely: plain data, the tags of the dialects, numbers such as 5e-4, and no key twice."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from pruningawaretraining.config.dialects.base import TAG
from pruningawaretraining.config.extent import DEEPEST, MOST_VALUES, too_large

_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_NUMBER = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_BASE_60 = re.compile(r"^[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?$")


_Events: Any = yaml.SafeLoader
if yaml.__with_libyaml__:

    class _Events(yaml.composer.Composer, yaml.CSafeLoader):  # type: ignore[misc,no-redef]
        """A CSafeLoader whose scanner and parser are libyaml's, about ten times as fast; nodes are made in Python."""

        def __init__(self, stream: str) -> None:
            yaml.composer.Composer.__init__(self)
            yaml.CSafeLoader.__init__(self, stream)


class ConfigLoader(_Events):  # type: ignore[misc]
    """A SafeLoader that refuses a key given twice, keys that are not text, and more values than a config may have."""

    known_tags: tuple[str, ...] = ()

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803  (the name that PyYAML gives it)
        """As in SafeLoader, whose own scanner takes a time that grows with the square of the depth."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """As in SafeLoader, within the limits of a config."""
        mark = self.peek_event().start_mark
        self._nodes += 1
        if self._nodes > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, too_large(), mark)
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As in SafeLoader; what comes by a merge (``<<``) may be given again, a key may not."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag == _NUMBER:
                key.tag = _TEXT  # {0.8: [...]}: a number that names something
            if key.tag != _TEXT:
                raise yaml.composer.ComposerError(None, None, _not_text(key), key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value}: given twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_undefined(self, node: yaml.Node) -> Any:
        """Refuse a tag that no dialect knows."""
        known = ", ".join(self.known_tags) or "none"
        problem = f"the tag {node.tag!r} is not known. Allowed: {known}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _not_text(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        return f"a {'list' if isinstance(key, yaml.SequenceNode) else 'mapping'} as a key. Allowed: text"
    kind = key.tag.rpartition(":")[2]
    return f"the key {key.value!r} is not text, but {kind}. Allowed: text, in quotes where YAML reads something else"


# YAML 1.1 reads 5e-4 and 1.5e5 as text, for want of a dot or a sign; nobody who writes a config means that.
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
# YAML 1.1 reads 2:4 as 124, a number to the base of 60; in a config it is a pattern.
for _digit in "-+0123456789":
    ConfigLoader.yaml_implicit_resolvers[_digit].insert(0, (_TEXT, _BASE_60))
ConfigLoader.add_constructor(None, ConfigLoader.construct_undefined)


def loader_for(tags: Iterable[str]) -> type[ConfigLoader]:
    """A loader that reads ``!Tag {a: 1}`` as ``{"!tag": "!Tag", "a": 1}`` for the given tags and no others."""
    known = tuple(sorted(set(tags)))

    class TaggedLoader(ConfigLoader):
        known_tags = known

    for tag in known:
        TaggedLoader.add_constructor(tag, _tagged)
    return TaggedLoader


def _tagged(loader: ConfigLoader, node: yaml.Node) -> dict[Hashable, Any]:
    if isinstance(node, yaml.MappingNode):
        return {TAG: node.tag, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return {TAG: node.tag}
    problem = f"the tag {node.tag!r} must be on a mapping"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
