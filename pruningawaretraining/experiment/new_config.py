"""A commented config for a model by name, as ``pat new`` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pruningawaretraining.engine.coupled_rules import set_of_layer
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment.inspection import Inspected
from pruningawaretraining.masks.unprunable import by_reason
from pruningawaretraining.registry import canonical
from pruningawaretraining.session.pruning import Pruning

MOST_SETS, MOST_LAYERS = 40, 4
"""Sets that are listed, and layers that are named with each."""
HEADS = "prune it by heads"
"""In the reason why layers stay that lose whole heads on request."""
EXPERIMENT = """\
# An experiment for {name}, written by `pat new`. `pat check` shows its plan, and this runs it:
#     pat run {file}
name: {title}

model:
  name: {name}

data:
  name: {data:<20}  # or CIFAR10, CIFAR100, MNIST, FashionMNIST, npz, imagefolder
{root}  size: {size:<20}  # side in pixels to which images are resized
  channels: {channels:<16}  # 3 repeats the channel of grey images

epochs: {epochs:<20}  # of training, pruning and fine-tuning together, numbered from 0
batch_size: 128
optimizer:
{optimizer}
pruning:
"""
SGD = """\
  name: SGD                   # any class of torch.optim
  lr: 0.05                    # falls along a cosine over the run; see `scheduler`
  kwargs: {momentum: 0.9, weight_decay: 5.0e-4}
"""
ADAMW = """\
  name: AdamW                 # any class of torch.optim
  lr: 5.0e-4                  # falls along a cosine over the run; see `scheduler`
  kwargs: {weight_decay: 0.05}
"""
"""For networks with layer norms, which SGD trains badly."""
ROOT = """\
  root: DATA                  # change it: {what}
"""
NEEDS_ROOT = {
    "imagefolder": "a folder with train/ and val/, and in them a folder for each class",
    "npz": "the path of an .npz file",
}
"""Sources of data sets that are not downloaded."""
RULES = """\
rules:
  - pattern: channel          # whole channels, which are removed for good
    criterion: magnitude      # the smallest weights go first
    regularizer: {{type: growing_l2, strength: 1.0e-3}}  # pulls weak channels towards zero until they go
    schedule: linear
    start: {start:<18}  # epochs before it train with the regulariser alone
    end: {end:<20}  # the target is met by then; what comes after it is fine-tuning
    target: {{macs: 0.5}}       # keep half of the multiply-accumulates; or parameters, latency, sparsity
    multiple: 8               # widths that runtimes like
    # layers: [...]           # only these, by name, container or "re:" and a regular expression
    # exclude: [...]          # all but these
"""


@dataclass(frozen=True)
class NewConfig:
    """Options of a new config.

    Attributes:
        name: of the model.
        epochs: of the training.
        data: name of the data set.
        file: where it is written, for the comment that says how to run it.
        pruning_alone: only the pruning config, for a loop of the user's own.
    """

    name: str
    epochs: int
    data: str = "digits"
    file: str = "experiment.yaml"
    pruning_alone: bool = False


def window(epochs: int) -> tuple[int, int]:
    """First and last epoch of pruning: a quarter of the training before it, and a fifth after it to fine-tune."""
    start = epochs // 4
    return start, max(start, epochs - 1 - max(1, epochs // 5))


def new_config(inspected: Inspected, wanted: NewConfig) -> str:
    """The config as YAML with comments: its keys, and below them the sets of layers that the model has.

    Raises:
        ConfigError, ModelError: nothing can be pruned, or the model rejects the inputs.
    """
    data = wanted.data if wanted.pruning_alone else canonical("dataset", wanted.data, "--data")
    pruner = Pruning(inspected.model, inspected.pruning, example_inputs=inspected.inputs)
    start, end = window(wanted.epochs)
    rules = RULES.format(start=start, end=end)
    if not wanted.pruning_alone:
        if not isinstance(inspected.inputs, Tensor) or inspected.inputs.dim() != 4:
            raise ConfigError(f"--pruning: needed for {wanted.name!r}, for `pat run` trains on images alone")
        channels, size = inspected.inputs.shape[1], inspected.inputs.shape[-1]
        head = EXPERIMENT.format(
            name=wanted.name,
            file=wanted.file,
            title=wanted.name.replace(":", "-").replace("/", "-").rpartition(".")[2],
            data=data,
            optimizer=ADAMW if any(isinstance(one, nn.LayerNorm) for one in inspected.model.modules()) else SGD,
            root=ROOT.format(what=NEEDS_ROOT[data]) if data in NEEDS_ROOT else "",
            size=size,
            channels=channels,
            epochs=wanted.epochs,
        )
        rules = head + "".join(f"  {line}\n" for line in rules.splitlines())
    else:
        rules = f"# How to prune {wanted.name} in {wanted.epochs} epochs: Pruning(model, {wanted.file!r})\n{rules}"
    sets = _sets(pruner)
    shown = [*sets[:MOST_SETS], *([f"#   ... and {len(sets) - MOST_SETS} more"] if len(sets) > MOST_SETS else [])]
    coupled = pruner.engine.coupled
    stays = {} if coupled is None else coupled.found.skipped
    lines = ["", "# Sets of coupled layers that can be pruned; layers of a set lose the same channels:", *shown]
    if any(HEADS in reason for reason in stays.values()):
        lines[:0] = [
            "    # pattern: {type: channel, heads: true}  # attention heads too, instead of `pattern: channel`"
        ]
    if stays:
        lines += ["# Stay as they are:", *(f"#   {names}: {reason}" for reason, names in by_reason(stays)[:MOST_SETS])]
    return rules + "\n".join(lines) + "\n"


def _sets(pruner: Pruning) -> list[str]:
    """Every set of coupled layers: its width, and the other layers that lose the same channels."""
    coupled = pruner.engine.coupled
    losing: dict[str, list[str]] = {}
    for layer, name in {} if coupled is None else set_of_layer(coupled.found.grouping).items():
        losing.setdefault(name, []).append(layer)
    lines = []
    for one in pruner.describe_sets():
        source = one["source"].removesuffix(".weight")
        others = [layer for layer in losing.get(source, []) if layer != source]
        lines.append(f"#   {one['number']}: {source}, {one['size']} channels{_more(others)}")
    return lines


def _more(names: Sequence[str]) -> str:
    more = len(names) - MOST_LAYERS
    shown = ", ".join(names[:MOST_LAYERS]) + (f" and {more} more" if more > 0 else "")
    return f"; with {shown}" if names else ""
