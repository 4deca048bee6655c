"""The text of a Python file that builds a pruned model with torch and the model's original class alone."""

from __future__ import annotations

import inspect
import pprint
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MARK = '"""Build a pruned model from its original class and the weights beside this file.'
"""How every such file begins."""

HEAD = '''\
{mark}

Import it and call ``build()``. It needs torch{library}, and nothing of what pruned the model.
"""

from __future__ import annotations

import json{math}
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn{functional}

from {module} import {name} as original{imports}

WEIGHTS = Path(__file__).with_name({weights!r})
ARGUMENTS = {arguments}
ATTRIBUTES = {attributes}
REPLACED = {replaced}
ALIASES = {aliases}
'''

BODY = '''
DTYPES = {{
    name: getattr(torch, kind)
    for name, kind in {{
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
        "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    }}.items()
}}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {{}}
    for name, one in header.items():
        first, last = (start + place for place in one["data_offsets"])
        kind = DTYPES[one["dtype"]]
        tensors[name] = torch.empty(one["shape"], dtype=kind)
        if last > first:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first).clone()
            tensors[name] = raw.view(kind).reshape(one["shape"])
    return tensors


def build(path: Path = WEIGHTS) -> nn.Module:
    """The pruned model in eval mode, on the CPU."""
    tensors = read(path)
    tensors.update({{alias: tensors[name] for alias, name in ALIASES.items()}})
    model = original{within}(**ARGUMENTS)
    for name, (kind, arguments) in REPLACED.items():
        old, (owner, _, attribute) = model.get_submodule(name), name.rpartition(".")
        new = globals()[kind](*arguments) if kind == "PassThrough" else globals()[kind].of(old)
        setattr(model.get_submodule(owner), attribute, new)
    for name, attributes in ATTRIBUTES.items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)
    made: dict[int, nn.Parameter] = {{}}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        for attribute, old in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{{name}}.{{attribute}}" if name else attribute
            if old is None or key not in tensors:
                continue
            if isinstance(old, nn.Parameter):
                new = made.setdefault(id(old), nn.Parameter(tensors[key], requires_grad=old.requires_grad))
                made[id(new)] = new
                setattr(module, attribute, new)
            else:
                setattr(module, attribute, tensors[key])
    return model.eval()
'''

BLOCK = '''

class PassThrough(nn.Module):
    """In the place of a block that was removed: returns its input."""

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        return (x, *([None] * (self._outputs - 1))) if self._outputs else x
'''


@dataclass(frozen=True)
class Constructor:
    """How a model was built.

    Args:
        module, name: where its class or builder is imported from; the name may have dots in it.
        arguments: by name, all of them plain.
    """

    module: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.name}({given})"


@dataclass(frozen=True)
class Changes:
    """Differences of a pruned model from a new one, besides its tensors.

    Args:
        attributes: module -> attribute -> value.
        replaced: module -> name of the class in its place, and the arguments of it.
        classes: those classes and functions, whose source is written into the file.
    """

    attributes: Mapping[str, Mapping[str, Any]]
    replaced: Mapping[str, tuple[str, tuple[Any, ...]]]
    classes: tuple[Any, ...] = ()


def script(constructor: Constructor, changes: Changes, weights: str, aliases: Mapping[str, str]) -> str:
    """The text of the file.

    Args:
        constructor: builds the dense model.
        changes: made to it.
        weights: name of the file of weights, in the same folder.
        aliases: tensor -> the tensor whose memory it shares.

    Raises:
        OSError: the source of a class is not there.
    """
    name, dot, inner = constructor.name.partition(".")
    within = f"{dot}{inner}"
    library = constructor.module.partition(".")[0]
    values = {"attributes": changes.attributes, "replaced": changes.replaced, "aliases": aliases}
    head = HEAD.format(
        mark=MARK,
        library="" if library == "torch" else f" and {library}",
        module=constructor.module,
        name=name,
        math="\nimport math" if changes.classes else "",
        functional="\nfrom torch.nn import functional as F" if changes.classes else "",
        imports="".join(f"\n{line}" for line in _imports(changes.classes)),
        weights=weights,
        arguments=pprint.pformat(dict(constructor.arguments), width=110),
        **{key: pprint.pformat(dict(value), width=110, sort_dicts=True) for key, value in values.items()},
    )
    passing = any(kind == "PassThrough" for kind, _ in changes.replaced.values())
    sources = "".join(f"\n\n{inspect.getsource(one)}" for one in changes.classes)
    return head + (BLOCK if passing else "") + sources + "\n" + BODY.format(within=within)


def _imports(classes: Iterable[Any]) -> list[str]:
    """The lines that import what classes of attention inherit from."""
    outside = {base for one in classes if isinstance(one, type) for base in one.__bases__}
    found = {
        f"from {one.__module__} import {one.__name__}" for one in outside if not one.__module__.startswith("torch.")
    }
    needs_sequence = any("Sequence" in inspect.getsource(one) for one in classes)
    return sorted(found) + (["from collections.abc import Sequence"] if needs_sequence else [])
