"""The config of an experiment: a model, data, an optimizer and a pruning config; everything else has a default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch.optim import lr_scheduler
from typing_extensions import Self  # noqa: UP035  (in typing from 3.11 on)

import pruningawaretraining.runtimes.timing  # noqa: F401  (importing it registers the runtimes)
from pruningawaretraining.config import PruningConfig, load_config
from pruningawaretraining.config.dialects.sparseml_keys import RateFunction, RateSchedule, SetRate
from pruningawaretraining.config.editor import complete_schema
from pruningawaretraining.config.family import check_epochs
from pruningawaretraining.config.load import find_file, read_mapping
from pruningawaretraining.config.recipe import is_recipe, load_recipe
from pruningawaretraining.config.strict import Amount, Count, Fraction, Positive, Strict, within
from pruningawaretraining.errors import ConfigError, unknown
from pruningawaretraining.experiment.paths import anchored
from pruningawaretraining.registry import canonical

NEEDS_MORE = ("LBFGS", "SparseAdam", "Muon")
"""Optimizers that an ordinary training step cannot drive: one evaluates the loss itself, one wants sparse gradients,
one takes matrices only."""
LONGEST_NAME = 100
"""Of a run, which is the name of its folder."""
COMPOUND = ("LRScheduler", "SequentialLR", "ChainedScheduler", "LambdaLR", "MultiplicativeLR")
"""Schedules that are built from other schedules or functions, which a config cannot hold."""

Seed = Annotated[int, within("a whole number of 0 or more", lambda value: value >= 0 and value.is_integer())]


def optimizer_names() -> list[str]:
    """The optimizers that a config can name."""
    return _classes(torch.optim, torch.optim.Optimizer, ("Optimizer", *NEEDS_MORE))


def scheduler_names() -> list[str]:
    """The learning rate schedules that a config can name."""
    return _classes(lr_scheduler, lr_scheduler.LRScheduler, COMPOUND)


def _classes(module: ModuleType, base: type, without: tuple[str, ...]) -> list[str]:
    found = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    return sorted(name for name in found if name not in without and not name.startswith("_"))


class ModelConfig(Strict):
    """The dense network. It is built again, from the same config, to load the pruned checkpoint."""

    name: str = Field(
        description="A torchvision model ('resnet18'), a timm model ('timm:resnet50', or a name that torchvision "
        "does not have), a class of transformers ('transformers:ViTForImageClassification', of its default config), or "
        "'package.module:callable' for a class of nn.Module or a function annotated with '-> nn.Module'."
    )
    kwargs: dict[str, Any] = Field(
        {}, description="Keyword arguments of the model. num_classes is taken from the data when the model accepts it."
    )
    weights: str | None = Field(
        None, description="Dense weights to start from: a .safetensors file, or a .pt/.pth file with a state dict."
    )


class DataConfig(Strict):
    """Training data, and how images become the model's input."""

    name: str = Field(
        description="'digits' (comes with scikit-learn), a torchvision set ('CIFAR10', 'CIFAR100', 'FashionMNIST', "
        "'MNIST'), 'imagefolder' (train/ and val/ or test/, a folder for each class) or 'npz' (uint8 images, labels)."
    )
    root: str | None = Field(
        None,
        description="Folder of the data (or the .npz file), relative to the config; 'pat run --data' overrides it. "
        "torchvision's sets download to it.",
    )
    download: bool = Field(True, description="Let torchvision download a set that is missing in root.")
    size: Count | None = Field(
        None, description="Side in pixels to which images are resized; needed for 'imagefolder', else as they are."
    )
    channels: Literal[1, 3] | None = Field(
        None, description="3 repeats the channel of grey images, for models that want three; absent: as they are."
    )
    flip: bool = Field(False, description="Augment: mirror images left to right, half of the time.")
    crop: Seed = Field(0, description="Augment: shift by up to so many pixels in each direction, zero-padded.")
    mean: list[float] | None = Field(
        None, description="Mean of each channel in [0, 1] for normalisation; absent: that of the training images."
    )
    std: list[Positive] | None = Field(None, description="Standard deviation of each channel; absent: as with mean.")
    train_fraction: Fraction = Field(1.0, description="Use only so much of the training images: a fixed random part.")
    workers: Seed = Field(4, description="Decoding processes for an 'imagefolder' that does not fit in memory.")
    memory_gib: Amount = Field(4.0, description="An 'imagefolder' below this size is decoded once and kept in memory.")


class OptimizerConfig(Strict):
    """The optimizer, by its name in torch.optim."""

    name: str = Field("SGD", description="A class of torch.optim: SGD, AdamW, ...")
    lr: Amount = Field(0.05, description="Learning rate.")
    kwargs: dict[str, Any] = Field({}, description="Other keyword arguments, such as momentum or weight_decay.")

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.name not in optimizer_names():
            raise ConfigError(unknown("name", self.name, optimizer_names(), most=20))
        return self


class SchedulerConfig(Strict):
    """The learning rate schedule, by its name in torch.optim.lr_scheduler; stepped after every epoch."""

    name: str = Field(
        "CosineAnnealingLR",
        description="A class of torch.optim.lr_scheduler. CosineAnnealingLR spans the run unless T_max is given.",
    )
    kwargs: dict[str, Any] = Field({}, description="Keyword arguments of the class.")
    warmup: Seed = Field(0, description="Epochs of linear warm-up before it.")

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.name not in scheduler_names():
            raise ConfigError(unknown("name", self.name, scheduler_names(), most=20))
        return self


class LatencyConfig(Strict):
    """How dense and pruned models are timed against each other, in turns."""

    runtime: str = Field("onnxruntime", description="'onnxruntime' or 'torch'.")
    threads: Count = Field(1, description="Threads of the runtime.")
    batch: Count = Field(1, description="Images in a batch.")
    repeats: Count = Field(100, description="Turns of each model, a few runs each; the median counts.")
    warmup: Seed = Field(10, description="Runs before the clock starts.")

    @field_validator("runtime")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return canonical("runtime", value)


class OnnxConfig(Strict):
    """How the pruned model is exported and checked."""

    exporter: Literal["auto", "dynamo", "torchscript"] = Field(
        "auto", description="Which of torch's exporters; `auto`: its own choice, `dynamo` from 2.9 on."
    )
    opset: Count | None = Field(None, description="Version of the operator set; absent: the exporter's own choice.")
    tolerance: Fraction = Field(1e-4, description="Largest difference from PyTorch, relative to the largest output.")


class ExperimentConfig(Strict):
    """A whole experiment: train, regularise, prune, fine-tune, save, export, measure, report."""

    name: str = Field("experiment", description="Name of the run: titles, and the folder runs/<name>.")
    model: ModelConfig = Field(description="The dense network.")
    data: DataConfig = Field(description="The data set and its augmentation.")
    pruning: Annotated[PruningConfig, BeforeValidator(load_config)] = Field(
        description="A pruning config in any form that is understood: inline, or the path of a file or folder relative "
        "to this file."
    )
    epochs: Count = Field(description="Epochs of training, pruning and fine-tuning together.")
    batch_size: Count = Field(128, description="Images in a training batch.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    scheduler: SchedulerConfig | None = Field(SchedulerConfig(), description="The learning rate schedule; null: none.")
    rates: list[RateFunction | SetRate | RateSchedule] = Field(
        [],
        description="Learning rates as in recipes, set before every step instead of the schedule. Absent: those of "
        "the recipe, if 'pruning' is one and there is no 'scheduler'.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the cross entropy, in [0, 1).")
    clip_norm: Amount | None = Field(None, description="Largest norm of all gradients together; absent: not clipped.")
    prune_at: Literal["begin", "end"] = Field(
        "end",
        description="When in its epoch an event takes place: at its end, after the training, or at its begin, as "
        "recipes mean it (their default); what is due when the last epoch ends then takes place there.",
    )
    dense_baseline: bool = Field(
        True,
        description="Train the dense model for as many epochs too, from the same initial weights, to compare with.",
    )
    amp: Literal["none", "bf16", "fp16"] = Field("none", description="Automatic mixed precision; fp16 scales the loss.")
    channels_last: bool = Field(False, description="Keep images and weights in channels-last memory order.")
    seed: Seed = Field(0, description="Seed of initial weights, order and augmentation.")
    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', 'mps', ...")
    threads: Seed = Field(0, description="CPU threads of PyTorch; 0 leaves its own choice.")
    out: str | None = Field(None, description="Folder of the run; absent: runs/<name>.")
    latency: LatencyConfig | None = Field(LatencyConfig(), description="How latency is measured; null: it is not.")
    onnx: OnnxConfig | None = Field(OnnxConfig(), description="How the model is exported to ONNX; null: it is not.")

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, value: str) -> str:
        """It is the name of a folder below runs/."""
        fine = value.strip() and value.isprintable() and not value.startswith(".") and len(value) <= LONGEST_NAME
        if not fine or "/" in value or "\\" in value:
            raise ConfigError(
                f"name: {value!r} is not allowed. Allowed: 1 to {LONGEST_NAME} printable characters without / and "
                "\\, the first one no dot"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _drop_schema_key(cls, values: Any) -> Any:
        return {key: values[key] for key in values if key != "$schema"} if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _has_epochs_for_all(self) -> Self:
        check_epochs(self.pruning, self.epochs, self.prune_at)
        return self

    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.out) if self.out else Path("runs") / self.name

    def resolved(self) -> dict[str, Any]:
        """The experiment as plain data, every default filled in and every path absolute."""
        return anchored(self.model_dump(mode="json"), Path.cwd())


def load_experiment(source: str | os.PathLike[str] | Mapping[str, Any] | ExperimentConfig) -> ExperimentConfig:
    """Read an experiment. Its pruning config comes inline; paths in a file are relative to that file.

    Args:
        source: a .yaml, .yml or .json file, a mapping, or an ExperimentConfig.

    Raises:
        ConfigError: no such file, not parseable, or a key or value that is not allowed; one line for each problem,
            beginning with the file's path if there is one.
    """
    if isinstance(source, ExperimentConfig):
        return source
    if isinstance(source, Mapping):
        return ExperimentConfig.model_validate(_with_recipe(source))
    path = find_file(source)
    _refuse_pruning_alone(path)
    values = _with_recipe(anchored(read_mapping(path), path.parent))
    if isinstance(values.get("pruning"), str):
        values["pruning"] = load_config(values["pruning"])
    try:
        return ExperimentConfig.model_validate(values)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def _refuse_pruning_alone(path: Path) -> None:
    """Say so where a file holds the pruning of an experiment instead of the experiment."""
    values = read_mapping(path)
    if {"model", "data", "pruning"} & set(values):
        return
    try:
        load_config(values)
    except (ConfigError, TypeError):
        return  # neither the one nor the other: what is wrong with it as an experiment is said
    raise ConfigError(
        f"{path}: this is a pruning config, without model and data. Allowed: an experiment config, whose 'pruning' may "
        f"be {path.name!r}"
    )


def _with_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the epochs and learning rates of a recipe, where it gives none of its own."""
    values = dict(values)
    if is_recipe(values.get("pruning")):
        recipe = load_recipe(values["pruning"])
        values["pruning"] = recipe.pruning
        values.setdefault("prune_at", "begin")
        values.setdefault("epochs", recipe.epochs)
        if recipe.rates.modifiers and "scheduler" not in values:
            values.setdefault("rates", list(recipe.rates.modifiers))
    return values


def experiment_schema() -> dict[str, Any]:
    """The JSON schema of an experiment, for editors to complete."""
    schema = complete_schema(ExperimentConfig.model_json_schema())
    pruning = schema["properties"]["pruning"]
    native = {key: value for key, value in pruning.items() if key != "description"}
    other = {"type": "object", "description": "Another form that is understood.", "not": {"required": ["rules"]}}
    schema["properties"]["pruning"] = {
        "description": pruning["description"],
        "anyOf": [native, {"type": "string", "description": "Path of a file or folder."}, other],
    }
    return schema
