"""From slots to coupled channels: layers get the components of their channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from pruningawaretraining.models.masked_modules import KeptModule
from pruningawaretraining.models.masked_norms import kept_norm_of
from pruningawaretraining.models.module_widths import widths_of
from pruningawaretraining.patterns.coupling import DependencyMap, Indices, Space, WorkOf
from pruningawaretraining.patterns.labels.follower import Follower
from pruningawaretraining.patterns.labels.notes import Mixing
from pruningawaretraining.patterns.labels.sites import Sites
from pruningawaretraining.patterns.labels.slots import varying
from pruningawaretraining.patterns.projections import is_transposed_linear

Conv = nn.modules.conv._ConvNd
Producer = (Conv, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.Embedding)
Channelwise = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

UNREAD = "its outputs reach none of the model's on the example inputs"


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, (Conv, nn.Linear)) or is_transposed_linear(module)


class Builder:
    """Makes channel spaces of layers from slots."""

    def __init__(self, model: nn.Module, follower: Follower) -> None:
        self.model, self.follower = model, follower
        self.modules = dict(model.named_modules())
        self.owners = {(one.name, one.dim): one for one in follower.slots.owners if one.name in follower.read}
        self.numbers = follower.slots.components()
        self.fresh = int(self.numbers.max(initial=-1)) + 1

    def result(self) -> DependencyMap:
        spaces, parts = [], []
        taken: set[tuple[str, int]] = set()
        for name, module in self.modules.items():
            for space, components in self._of_layer(name, module, taken):
                spaces.append(space)
                parts.append(components)
        for (name, dim), owner in self.owners.items():
            if (name, dim) not in taken:
                spaces.append(_space(owner.tensor, name, "both", owner.tensor.shape[dim], dim))
                parts.append(self.numbers[owner.slots])
        blocked, norms, reductions = self._blocked()
        blocked = {**self._unread(spaces, parts), **blocked}
        widths = self._widths(norms)
        return DependencyMap(tuple(spaces), tuple(parts), blocked, norms, widths, self._works(), reductions)

    def _along(self, name: str, dim: int, size: int, taken: set[tuple[str, int]]) -> Indices | None:
        """The components of a tensor's dimension; fresh ones for one of a single index."""
        taken.add((name, dim))
        owner = self.owners.get((name, dim))
        if owner is not None:
            found: Indices = self.numbers[owner.slots]
            return found
        if size != 1 or name not in self.follower.read:
            return None
        self.fresh += 1
        return np.array([self.fresh - 1])

    def _of_layer(self, name: str, module: nn.Module, taken: set[tuple[str, int]]) -> Iterator[tuple[Space, Indices]]:
        weight = f"{name}.weight" if name else "weight"
        own = module._parameters.get("weight")
        if is_layer(module):
            if own is not None:
                yield from self._of_producer(name, module, own, taken)
            else:
                yield from self._of_parametrized(name, module)
        elif isinstance(module, nn.Embedding):
            found = self._along(weight, 1, module.embedding_dim, taken)
            if found is not None:
                yield _space(module, name, "both", module.embedding_dim), found
            taken.add((weight, 0))
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            found = self._along(weight, 0, module.num_parameters, taken)
            if found is not None:
                yield _space(module, name, "both", module.num_parameters), found
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            states = "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"
            owner = self.owners.get((f"{name}.{states}" if name else states, 1))
            if owner is not None:
                yield _space(module, name, "out", module.hidden_size), self.numbers[owner.slots]
        elif isinstance(module, Channelwise):
            yield from self._of_norm(name, module, taken)

    def _of_norm(self, name: str, module: nn.Module, taken: set[tuple[str, int]]) -> Iterator[tuple[Space, Indices]]:
        tensors = {**module._parameters, **module._buffers}
        known = [key for key, one in tensors.items() if one is not None and one.dim() == 1]
        found = [self._along(f"{name}.{key}" if name else key, 0, len(tensors[key]), taken) for key in known]  # type: ignore[arg-type]
        components = next((one for one in found if one is not None), None)
        if components is None:
            components = self._mixed(name)
        if components is not None:
            yield _space(module, name, "both", len(components)), components

    def _mixed(self, name: str) -> Indices | None:
        """The channels that a norm without weights was seen to normalise."""
        seen = [one.slots for one in self.follower.mixings if one.layer == name]
        return self.numbers[seen[0]] if seen else None

    def _of_parametrized(self, name: str, module: nn.Module) -> Iterator[tuple[Space, Indices]]:
        """A layer whose weight is computed of others: both sides, so that its channels can be named and kept."""
        prefix = f"{name}." if name else ""
        own = [one.name for one in self.owners.values() if one.name.startswith(prefix) and one.tensor.dim() > 1]
        for key in dict.fromkeys(sorted(own, key=lambda key: -self.follower.tensors[key].numel())[:1]):
            for dim, side in ((1, "in"), (0, "out")):
                owner = self.owners.get((key, dim))
                if owner is not None:
                    yield _space(module, name, side, owner.tensor.shape[dim]), self.numbers[owner.slots]

    def _of_producer(
        self, name: str, module: nn.Module, weight: Tensor, taken: set[tuple[str, int]]
    ) -> Iterator[tuple[Space, Indices]]:
        turned = is_transposed_linear(module) or (isinstance(module, Conv) and module.transposed)
        groups = module.groups if isinstance(module, Conv) else 1
        key = f"{name}.weight" if name else "weight"
        taken.add((f"{name}.bias" if name else "bias", 0))
        first = self._along(key, 0, weight.shape[0], taken)
        second = self._along(key, 1, weight.shape[1], taken)
        if first is None or second is None:
            return
        if groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups:
            yield _space(module, name, "both", groups), first
            return
        outputs, inputs = (second, first) if turned else (first, second)
        if groups > 1:
            outputs, inputs = (
                (np.tile(outputs, groups), inputs) if turned else (outputs, self._inputs(inputs, first, groups))
            )
        yield _space(module, name, "in", len(inputs)), inputs
        yield _space(module, name, "out", len(outputs)), outputs

    def _inputs(self, inputs: Indices, outputs: Indices, groups: int) -> Indices:
        """Input channels of a grouped convolution: those of every group; a depthwise one's go with its outputs."""
        if len(inputs) > 1:
            return np.tile(inputs, groups)
        return outputs[:: len(outputs) // groups]

    def _works(self) -> tuple[WorkOf, ...]:
        """Products outside of layers, with the components of the channels that they sum over and make."""
        return tuple(
            WorkOf(
                one.layer,
                one.macs,
                tuple(self.numbers[slots] for slots in one.outputs),
                tuple(self.numbers[slots] for slots in one.inputs),
                one.where,
            )
            for one in self.follower.works
        )

    def _widths(self, norms: dict[str, Indices]) -> dict[tuple[str, str], Indices]:
        """Attributes that count channels: of modules that mix them, and where code cuts pieces of that size."""
        found: dict[tuple[str, str], Indices] = {}
        strange: set[tuple[str, str]] = set()
        for name, channels in norms.items():
            if kept_norm_of(self.modules[name]) is KeptModule:
                for attribute, _ in widths_of(self.modules[name], len(channels)):
                    found[name, attribute] = channels.reshape(-1)
        for one in self.follower.sizes:
            if type(self.modules[one.layer]).__module__.startswith("torch.nn."):
                continue  # those of PyTorch's own layers follow their weights
            components = self.numbers[one.slots]
            for attribute, _ in widths_of(self.modules[one.layer], one.size):
                known = found.setdefault((one.layer, attribute), components)
                if not np.array_equal(np.sort(known), np.sort(components)):
                    strange.add((one.layer, attribute))  # it counts two things, so perhaps neither
        return {place: components for place, components in found.items() if place not in strange}

    def _blocked(self) -> tuple[dict[int, str], dict[str, Indices], dict[str, Indices]]:
        """Components that have to stay, the modules that mix channels and can be told which of them are masked, and
        the reductions in code that can be."""
        blocked: dict[int, str] = {}
        for lock in self.follower.slots.locks:
            for number in np.unique(self.numbers[lock.slots]):
                blocked.setdefault(int(number), lock.reason)
        norms, left = self._norms()
        sites = Sites([one for one in self.follower.reductions if one.layer not in norms], self.numbers)
        for one in left:
            if one.layer in norms or not sites.take(one):
                for number in np.unique(self.numbers[one.slots]):
                    blocked.setdefault(int(number), f"reaches {one.what} {one.where}")
        return blocked, norms, sites.result()

    def _norms(self) -> tuple[dict[str, Indices], list[Mixing]]:
        """Modules that mix channels of their input alone, with these; and the mixings that are none of theirs."""
        by_layer: dict[str, list[Mixing]] = {}
        for one in self.follower.mixings:
            by_layer.setdefault(one.layer, []).append(one)
        norms: dict[str, Indices] = {}
        left: list[Mixing] = []
        for layer, mixings in by_layer.items():
            found = [self._normalised(one, np.unique(self.numbers[one.slots])) for one in mixings]
            first = next((one for one in found if one is not None), None)
            others = [one for one, own in zip(mixings, found, strict=True) if own is None or not _equal(own, first)]
            if others and all(one.site is not None for one in mixings):  # told apart by their sites
                left += mixings
            else:
                left += others
                norms.update({} if first is None else {layer: first})
        return norms, left

    def _unread(self, spaces: list[Space], parts: list[Indices]) -> dict[int, str]:
        """Components of layers that ran, where nothing that the model returned is made of any of them."""
        returned = {name.rpartition(".")[0] for name in self.follower.returned}
        found: dict[int, str] = {}
        others: set[int] = set()
        for space, components in zip(spaces, parts, strict=True):
            if space.side != "in" and isinstance(space.owner, Producer):
                numbers = np.unique(components).tolist()
                if space.name in returned:
                    others.update(numbers)
                else:
                    found.update(dict.fromkeys(numbers, UNREAD))
        return {number: reason for number, reason in found.items() if number not in others}

    def _normalised(self, one: Mixing, mixed: Indices) -> Indices | None:
        """The components of the channels of a module's input, where it mixes these alone and can be told about masks.

        They have a dimension of 1 for every one behind the channels, see
        :class:`pruningawaretraining.models.masked_modules.KeptModule`.
        """
        module = self.modules.get(one.layer)
        hook = None if module is None or not one.layer else kept_norm_of(module)
        entered = self.follower.entered.get(one.layer)
        if hook is None or not entered or not self._is_apart(one.layer, mixed):
            return None
        found: list[Indices] = []
        for arrays in entered:
            mine = [array for array in arrays if np.isin(mixed, self.numbers[array]).all()]
            if len(mine) != 1 or len(varying(mine[0])) != 1:
                return None
            behind = mine[0].ndim - 1 - varying(mine[0])[0] if hook is KeptModule else 0
            found.append(self.numbers[mine[0].reshape(-1, *[1] * behind)])
        return found[0] if all(np.array_equal(found[0], other) for other in found) else None

    def _is_apart(self, layer: str, mixed: Indices) -> bool:
        """Whether no module in this one has tensors of these channels, which it would be called with a part of."""
        inside = (one for one in self.owners.values() if "." in one.name.removeprefix(f"{layer}."))
        return not any(
            np.isin(self.numbers[one.slots], mixed).any() for one in inside if one.name.startswith(f"{layer}.")
        )


def _equal(one: Indices, other: Indices | None) -> bool:
    return other is not None and np.array_equal(one, other)


def _space(owner: Any, name: str, side: str, width: int, dim: int = -1) -> Space:
    space = Space(owner, name, side, width, "", dim)
    space.seen[:] = True
    return space
