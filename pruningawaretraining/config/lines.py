"""In which line of a file a key is, for messages; only looked up where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pruningawaretraining.config.yaml_form import ConfigLoader

_KEY = re.compile(r"([^\s:()]+)(?: \(\w+\))?:(?: ([a-z_]\w*(?:\[\d+\])?(?:\.\w+)*):)?")
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def with_place(path: Path, text: str, message: str) -> str:
    """The lines of a message, each with the file, and with the line of the key that it begins with.

    Args:
        path: of the file.
        text: of the file; "" if it is not known.
        message: one line for each problem.
    """
    found = []
    root = _composed(text)
    for one in message.splitlines():
        number = None if root is None else _number(root, one)
        found.append(f"{path}: {one}" if number is None else f"{path}: line {number}: {one}")
    return "\n".join(found)


def _composed(text: str) -> yaml.Node | None:
    """The file with its marks; JSON is YAML but for tabs."""
    try:
        return yaml.compose(text.replace("\t", " "), Loader=ConfigLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _number(root: yaml.Node, line: str) -> int | None:
    """The line of the key that a message begins with, or of the nearest one around it."""
    found = _KEY.match(line)
    if found is None:
        return None
    key = found[1] if found[2] is None else f"{found[1]}.{found[2]}"
    node, number = root, None
    for name, place in _PART.findall(key):
        if isinstance(node, yaml.MappingNode) and name:
            inner = next((pair for pair in node.value if pair[0].value == name), None)
            if inner is None:
                break
            number, node = inner[0].start_mark.line + 1, inner[1]
        elif isinstance(node, yaml.SequenceNode) and place and int(place) < len(node.value):
            node = node.value[int(place)]
            number = node.start_mark.line + 1
        else:
            break
    return number
