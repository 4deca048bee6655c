"""Trains the dense and the pruned model of one experiment, epoch by epoch, with a checkpoint after each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.distributed.collectives import Ranks, rank, same_buffers, world_size
from pruningawaretraining.distributed.ddp import outdated, rewrapped
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.build import build_model
from pruningawaretraining.experiment.calibration import TrainingBatches, loss_of
from pruningawaretraining.experiment.data import Batch, DataSet, Pipeline
from pruningawaretraining.experiment.display import Display, StageDisplay
from pruningawaretraining.experiment.finish import Trained, prunes, save_dense
from pruningawaretraining.experiment.optim import (
    build_optimizer,
    build_scheduler,
    check_scheduler,
    step_scheduler,
)
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.stage import SilentRecorder, Stage
from pruningawaretraining.experiment.state import RunState, rng_state, save_state, set_rng_state
from pruningawaretraining.experiment.train import Learner, Precision, evaluate, scores_of, train_epoch
from pruningawaretraining.experiment.verify import difference, masked_scores, scores
from pruningawaretraining.models.calling import checked_call, evaluating
from pruningawaretraining.session.pruning import Pruning

logger = logging.getLogger(__name__)
EPOCH_SEEDS = 1_000_003  # distance of the data seeds of neighbouring run seeds: more than any run has epochs
VERIFIED_IMAGES = 64
TEST_BATCH = 500


class Runner:
    """Trains the dense and the pruned model of one experiment.

    Args:
        config: the experiment.
        data: its data set.
        device: where to train.
        display: where progress is shown.
    """

    def __init__(self, config: ExperimentConfig, data: DataSet, device: torch.device, display: Display) -> None:
        self.config, self.data, self.device, self.display = config, data, device, display
        self.folder = config.folder()
        share = Ranks.current()
        self.pipeline = Pipeline(data.mean, data.std, config.data.flip, config.data.crop, config.channels_last, share)
        _check_share(min(config.batch_size, max(1, len(data.train))))
        self.rates = LearningRates(tuple(config.rates))
        self.recorder = self.new_recorder()
        self.state = RunState(stage="dense" if config.dense_baseline else "pruned")
        self.images = next(self.pipeline.test(data.test, VERIFIED_IMAGES, device))[0]
        self._since = time.perf_counter()

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return rank() == 0

    def new_recorder(self, rows: int = 0, norms: int = 0) -> record.Recorder:
        """The metrics so far, up to so many epochs."""
        return (record.Recorder if self.writes else SilentRecorder)(self.folder, rows, norms)

    def new_model(self) -> nn.Module:
        """The dense model on the device, with the initial weights of the seed."""
        torch.manual_seed(self.config.seed)
        model = build_model(self.config.model, len(self.data.classes), self.data.shape[0]).to(self.device)
        if world_size() > 1 and self.device.type == "cuda":  # statistics of whole batches, as on one process
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return model.to(memory_format=torch.channels_last) if self.config.channels_last else model

    def new_stage(self, name: str) -> Stage:
        """A model before its first epoch.

        Raises:
            ConfigError, ModelError, TargetError: what is wrong with the config.
        """
        config, model = self.config, self.new_model()
        _check_scores(model, self.images[:1], len(self.data.classes))
        optimizer = build_optimizer(config.optimizer, model)
        check_scheduler(config)
        scheduler = build_scheduler(config, optimizer)
        pruner = None
        if name == "pruned":
            pruner = Pruning(model, config.pruning, example_inputs=self.images[:1], optimizer=optimizer)
            batches = TrainingBatches(self.pipeline, self.data.train, config.batch_size, self.device)
            pruner.on_train_begin(range(self._steps))
            pruner.calibrate_with(batches, loss_of)  # read by criteria and compensation that want data
        precision = Precision.of(config, self.device)
        wrapped = DistributedDataParallel(model) if world_size() > 1 else None
        learner = Learner(model, optimizer, precision, config.label_smoothing, config.clip_norm, pruner, wrapped)
        torch.manual_seed(config.seed + rank())
        return Stage(name, learner, scheduler)

    @property
    def _steps(self) -> int:
        """Optimizer steps of an epoch."""
        return max(1, len(self.data.train) // self.config.batch_size)

    def _warn_of_late_ends(self) -> None:
        """Say at the start that a rule's last event lies after the training, and its target will not be met."""
        for number, rule in enumerate(self.config.pruning.rules):
            last = self.config.epochs * (self._steps if rule.unit == "step" else 1) - (self.config.prune_at == "end")
            end = rule.start if rule.end is None else rule.end
            if rule.enabled and end > last:
                key = rule.name or f"pruning.rules[{number}]"
                self.display.say(
                    f"warning: {key}.end: {end} lies after the last {rule.unit}, {last}: the target will not be reached"
                )

    def run(self) -> Trained:
        """Train what is left to train; what is only masked at the end is removed."""
        self._warn_of_late_ends()
        if self.state.stage == "dense":
            self._save_dense(self.train("dense").learner.model)
            self.state = replace(self.state, stage="pruned", epoch=0, training={})
            self._save(None)
        elif not self.config.dense_baseline and self.state.epoch == 0:
            self._save_dense(self.new_model())
        stage = self.train("pruned")
        model, pruner = stage.learner.model, stage.learner.pruner
        assert pruner is not None
        if prunes(pruner):
            self._change(model, pruner, pruner.remove)
        pruner.on_train_end()
        rows = {name: [row for row in self.recorder.rows if row["model"] == name] for name in ("dense", "pruned")}
        seconds = {name: sum(row["seconds"] for row in found) for name, found in rows.items()}
        return Trained(
            self.config,
            self.data,
            self.pipeline,
            self.device,
            model,
            pruner,
            accuracy=rows["pruned"][-1]["accuracy"],
            dense_accuracy=rows["dense"][-1]["accuracy"] if rows["dense"] else self._given_accuracy(),
            dense_seconds=seconds["dense"] if rows["dense"] else None,
            pruned_seconds=seconds["pruned"],
            masked_removed=self.state.masked_removed,
            before=self.state.seconds,
        )

    def train(self, name: str) -> Stage:
        """Train one model from where the run's state says it is."""
        stage = self.new_stage(name)
        if self.state.training:
            stage.load_state_dict(self.state.training)
            self._rewrap(stage)
            if rank() == 0:  # the checkpoint has the first process's generators
                set_rng_state(self.state.rng)
        config, steps = self.config, max(1, len(self.data.train) // self.config.batch_size)
        title = f"{name} {config.model.name} on {config.data.name}: {config.epochs} epochs on {self.device}"
        with self.display.stage(title, config.epochs, self.state.epoch, steps) as shown:
            for epoch in range(self.state.epoch, config.epochs):
                self._epoch(stage, epoch, shown)
        return stage

    def _epoch(self, stage: Stage, epoch: int, shown: StageDisplay) -> None:
        started, learner, pruner = time.perf_counter(), stage.learner, stage.learner.pruner
        generator = torch.Generator().manual_seed(self.config.seed * EPOCH_SEEDS + epoch)
        begins = self.config.prune_at == "begin"
        if begins:
            self._events(learner, epoch)
            learner = self._rewrap(stage)
        phase = "train" if pruner is None else pruner.phase
        self.rates.apply(learner.optimizer, epoch, self._steps)
        rate = float(learner.optimizer.param_groups[0]["lr"])
        batches = self._rated(learner.optimizer, epoch, generator)
        loss, train_accuracy = train_epoch(learner, batches, shown.tick)
        same_buffers(learner.model)
        if not begins or epoch == self.config.epochs - 1:
            self._events(learner, epoch + begins)
            learner = self._rewrap(stage)
        accuracy = self._accuracy(learner)
        step_scheduler(stage.scheduler, loss)
        row = {
            "model": stage.name,
            "epoch": epoch,
            "phase": phase,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "accuracy": accuracy,
            "lr": rate,
            "macs": 1.0 if pruner is None else pruner.macs.fraction,
            "sparsity": 0.0 if pruner is None else pruner.sparsity,
            "seconds": time.perf_counter() - started,
        }
        self.recorder.add(row, pruner.norms() if pruner is not None and prunes(pruner) else None)
        self.state.epoch = epoch + 1
        self._save(stage)
        shown.epoch(row)
        if self.display.watch is not None:
            self.display.watch(row)

    def _rewrap(self, stage: Stage) -> Learner:
        """The stage's learner; several processes get a new wrapper where channels have gone."""
        wrapped = stage.learner.wrapped
        if wrapped is not None and outdated(wrapped):
            stage.learner = replace(stage.learner, wrapped=rewrapped(wrapped))
        return stage.learner

    def _events(self, learner: Learner, epoch: int) -> None:
        """What is due in an epoch."""
        pruner = learner.pruner
        if pruner is not None and prunes(pruner):
            self._change(learner.model, pruner, lambda: pruner.prune(learner.model, epoch))

    def _rated(self, optimizer: torch.optim.Optimizer, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of an epoch, with the learning rate of its moment set before each."""
        batches = self.pipeline.train(self.data.train, self.config.batch_size, generator, self.device)
        for number, batch in enumerate(batches):
            self.rates.apply(optimizer, epoch + number / self._steps, self._steps)
            yield batch

    def _change(self, model: nn.Module, pruner: Pruning, change: Callable[[], object]) -> None:
        """Let the pruner change the model; the first time that it removes something, compare with the masked model."""
        if self.state.masked_removed is not None:
            change()
            return
        before: dict[str, Tensor] = {}

        def remember() -> None:
            before.update({key: value.detach().clone() for key, value in model.state_dict().items()})

        pruner.before_removal = remember
        change()
        if before:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                masked = masked_scores(self.new_model(), before, self.config.pruning, pruner.masks, self.images)
            if masked is not None:
                self.state.masked_removed = difference(masked, scores(model, self.images))

    def _accuracy(self, learner: Learner) -> float:
        batches = self.pipeline.test(self.data.test, TEST_BATCH, self.device, self.pipeline.share)
        return evaluate(learner.model, batches, learner.precision)

    def _given_accuracy(self) -> float | None:
        """Without a baseline: the accuracy of the weights that the user gave, if any."""
        given = self.config.model.weights or self.config.model.kwargs.get("weights")
        given = given or self.config.model.kwargs.get("pretrained")
        return self._accuracy(self.new_stage("dense").learner) if given else None

    def _save_dense(self, model: nn.Module) -> None:
        if self.writes:
            save_dense(model, self.folder)

    def _save(self, stage: Stage | None) -> None:
        """Write the checkpoint: of a stage in training, or between stages."""
        now = time.perf_counter()
        self.state.seconds += now - self._since
        self._since = now
        self.state.training = {} if stage is None else stage.state_dict()
        self.state.rng = rng_state()
        self.state.rows, self.state.norms = len(self.recorder.rows), len(self.recorder.norms)
        if self.writes:
            save_state(self.state, self.folder)


def _check_share(size: int) -> None:
    """Refuse batches that cannot be shared out equally: gradients are averaged over processes."""
    if size % world_size():
        raise ConfigError(
            f"batch_size: {size} images cannot be shared by {world_size()} processes. Allowed: a multiple"
        )


def _check_scores(model: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a model that does not give a score for every class, before anything is spent on it."""
    with torch.no_grad(), evaluating(model):
        found = scores_of(checked_call(model, images)).shape[1]
    if found < classes:
        raise ConfigError(f"model.kwargs: the model gives {found} scores. Allowed: one for each of {classes} classes")
