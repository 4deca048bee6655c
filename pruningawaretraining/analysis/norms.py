"""Norms of channel groups in checkpoints: dense, masked, or with channels removed.

Shape suffixes: ``_G`` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.analysis.checkpoints import epochs_of, read_weights
from pruningawaretraining.checkpoint.state_dict import load_state_dict_pruned
from pruningawaretraining.errors import CheckpointError, PruningError, nearest
from pruningawaretraining.experiment.record import EDGES, histogram
from pruningawaretraining.groups.channel_norms import GroupIndex
from pruningawaretraining.groups.grouping import Grouping
from pruningawaretraining.masks.dry_run import removable_channels
from pruningawaretraining.patterns.channel import chosen_layers, find_channels
from pruningawaretraining.report.run import Run

ROLES = ("out", "in", "norm")
Build = Callable[[], tuple[nn.Module, Any]]
"""Gives the dense model, newly built, and example inputs."""
Track = Callable[[Sequence[Path]], Iterable[Path]]
"""Gives the files back one by one, and shows how far it is."""


class NormReader:
    """Reads group norms out of state dicts of one architecture; the model is traced anew only when shapes change.

    Args:
        build: see :data:`Build`.
        first: a state dict that it will read: that it is of the model is checked before anything is run.

    Raises:
        CheckpointError: the first is of another model.
        ModelError: nothing in the model can be pruned.
    """

    def __init__(self, build: Build, first: Mapping[str, Tensor] | None = None) -> None:
        self.build = build
        model, inputs = build()
        if first is not None:
            check_same_network(model, plain(first))
        found = removable_channels(model, inputs, chosen_layers(model, None))
        self.sizes = {one.name: one.size for one in found.grouping.sets}
        self.model, self.grouping = model, found.grouping
        self.shapes = _shapes(dict(model.state_dict()))
        self.index = GroupIndex(found.grouping, ROLES)

    def read(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """A histogram of every set, as :mod:`pruningawaretraining.experiment.record` describes it, and ``removed``:
        how many of its groups are no longer there.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        self._load(weights)
        norms_G = self.index.squared_norms().sqrt().cpu()
        sets = {}
        for one in self.grouping.sets:
            found = histogram(norms_G[one.start : one.stop])
            sets[one.name] = {**found, "removed": self.sizes[one.name] - one.size}
        return sets

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        """Put the weights into the model; one of other shapes is built and traced first."""
        plain_weights = plain(weights)
        shapes = _shapes(plain_weights)
        if any(shapes.get(name, shape) != shape for name, shape in self.shapes.items()):
            self.model, inputs = self.build()
            check_same_network(self.model, plain_weights)
            model, missing, _ = load_state_dict_pruned(self.model, plain_weights)
            grouping = find_channels(model, inputs, chosen_layers(model, None)).grouping
            self.grouping = grouping.select_sets([at for at, one in enumerate(grouping.sets) if one.name in self.sizes])
            self.index = GroupIndex(self.grouping, ROLES)
            self.shapes = _shapes(dict(model.state_dict()))
        else:
            self.model.load_state_dict(plain_weights, strict=False)
            missing = sorted(set(self.shapes) - set(plain_weights))
        self._check(self.grouping, missing)

    def _check(self, grouping: Grouping, missing: Sequence[str]) -> None:
        """Refuse weights without tensors that norms are made of."""
        needed = {member.name for member in grouping.of_role(*ROLES).members}
        lacking = [name for name in missing if name in needed]
        if lacking:
            raise CheckpointError(
                f"{len(lacking)} weights of the model are missing, {lacking[0]!r} for one. "
                "Allowed: checkpoints of the model that --model names"
            )


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers put in front of its names."""
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}


def check_same_network(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network: half of the names are not there, or kernels are of another size.

    Args:
        model: dense.
        weights: of it, dense or pruned.

    Raises:
        CheckpointError: names what differs.
    """
    own = {name: tuple(value.shape) for name, value in model.named_parameters()}
    lacking = [name for name in own if name not in weights]
    kernels = [name for name in own if name in weights and weights[name].shape[2:] != own[name][2:]]
    told = []
    if 2 * len(lacking) > len(own):
        convolutions = [name for name in lacking if len(own[name]) > 1]
        first = (convolutions or lacking)[0]
        close = nearest(first, weights) or next(iter(weights), "nothing")
        told.append(
            f"{len(lacking)} of {len(own)} weights of the model are missing, {first!r} for one (nearest: {close!r})"
        )
    if kernels:
        found, wanted = ("x".join(map(str, shape)) for shape in (weights[kernels[0]].shape, own[kernels[0]]))
        told.append(f"{kernels[0]!r} is {found} where the model has {wanted}")
    if told:
        raise CheckpointError(
            f"it belongs to another network than {type(model).__name__}: {', and '.join(told)}. "
            "Allowed: checkpoints of the model that --model names"
        )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def scan(paths: Sequence[Path], build: Build, track: Track = iter) -> dict[str, Any]:
    """The norms of every checkpoint, in the form of a run's ``norms.json``.

    Args:
        paths: checkpoints in the order of training; one at a time is in memory.
        build: see :data:`Build`.
        track: shows progress over them.

    Raises:
        CheckpointError: a file is not a checkpoint of the model; the message names it.
    """
    epochs = list(_epochs(paths, build, track))
    return {"edges": list(EDGES), "epochs": epochs}


def scan_each(paths: Sequence[Path], build: Build, track: Track = iter) -> list[dict[str, Any]]:
    """The norms of single checkpoints, each as a training of its own; see :func:`scan`."""
    epochs = [{**moment, "epoch": 0} for moment in _epochs(paths, build, track)]
    return [{"edges": list(EDGES), "epochs": [moment]} for moment in epochs]


def _epochs(paths: Sequence[Path], build: Build, track: Track) -> Iterator[dict[str, Any]]:
    reader = None
    for path, epoch in zip(track(paths), epochs_of(paths), strict=True):
        try:
            weights = read_weights(path)
            reader = reader or NormReader(build, weights)
            sets = reader.read(weights)
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(text if str(path) in text else f"{str(path)!r}: {text}") from error
        except PruningError as error:
            if reader is None:  # the model itself, or its example inputs
                raise
            raise CheckpointError(f"{str(path)!r}: {error}") from error  # what is left cannot be traced
        yield {"epoch": epoch, "phase": "train", "file": path.name, "sets": sets}


def run_of(name: str, norms: Mapping[str, Any]) -> Run:
    """Scanned checkpoints as a run that has recorded nothing but norms."""
    return Run({"name": name}, norms=norms)
