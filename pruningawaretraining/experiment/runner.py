"""Trains the dense and the pruned model of one experiment, epoch by epoch, with a checkpoint after each."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pruningawaretraining.config.rates import LearningRates
from pruningawaretraining.config.recovery import for_pruner
from pruningawaretraining.distributed.collectives import Ranks, rank, same_buffers, world_size
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.build import initial_model
from pruningawaretraining.experiment.calibration import TrainingBatches, loss_of
from pruningawaretraining.experiment.checks import check_scores, check_share, late_ends
from pruningawaretraining.experiment.data import Batch, DataSet, Pipeline
from pruningawaretraining.experiment.display import Display, StageDisplay, epochs_text
from pruningawaretraining.experiment.family import keep_member
from pruningawaretraining.experiment.finish import Trained, prunes, save_dense
from pruningawaretraining.experiment.lock import check_mine
from pruningawaretraining.experiment.optim import build_optimizer, build_scheduler, check_scheduler
from pruningawaretraining.experiment.phase import EpochPhase
from pruningawaretraining.experiment.recovering import RunRecovery, final_accuracy, teacher_of
from pruningawaretraining.experiment.removing import change_model
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.stage import SilentRecorder, Stage, control_grouping
from pruningawaretraining.experiment.state import ALLOWED, RunState, rng_state, save_state, set_rng_state
from pruningawaretraining.experiment.stopping import StopRequest
from pruningawaretraining.experiment.train import Learner, Precision, Sums, evaluate, train_epoch
from pruningawaretraining.files import reading
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
        stop: whether a signal has asked the run to end; None for never.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        data: DataSet,
        device: torch.device,
        display: Display,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.data, self.device, self.display = config, data, device, display
        self.folder = config.folder()
        share = Ranks.current()
        self.pipeline = Pipeline(data.mean, data.std, config.data.flip, config.data.crop, config.channels_last, share)
        check_share(min(config.batch_size, max(1, len(data.train))))
        self.rates = LearningRates(tuple(config.rates))
        self.recorder = self.new_recorder()
        self.state = RunState(stage="dense" if config.dense_baseline else "pruned")
        self.stop = stop or StopRequest()
        self.locked = False  # then the folder is looked at before anything is written to it
        self.images = next(self.pipeline.test(data.test, VERIFIED_IMAGES, device))[0]
        self._since = time.perf_counter()

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return rank() == 0

    def new_recorder(self, rows: int = 0, norms: int = 0) -> record.Recorder:
        """A recorder with the metrics of the first epochs."""
        return (record.Recorder if self.writes else SilentRecorder)(self.folder, rows, norms)

    def new_model(self) -> nn.Module:
        """The dense model on the device, with the initial weights of the seed."""
        return initial_model(self.config, len(self.data.classes), self.data.shape[0], self.device)

    def new_stage(self, name: str) -> Stage:
        """A model before its first epoch.

        Raises:
            ConfigError, ModelError, TargetError: what is wrong with the config.
        """
        config, model = self.config, self.new_model()
        check_scores(model, self.images[:1], len(self.data.classes))
        optimizer = build_optimizer(config.optimizer, model)
        check_scheduler(config)
        scheduler = build_scheduler(config, optimizer)
        pruner = control = recovery = None
        example, steps = self.images[:1], self.data.steps(config.batch_size)
        if name == "dense":
            control = control_grouping(model, config.pruning, example)
        else:
            teacher, recovery = teacher_of(self), RunRecovery.of(config, optimizer, scheduler, steps)
            asked = for_pruner(config.pruning)
            pruner = Pruning(model, asked, example_inputs=example, optimizer=optimizer, teacher=teacher)
            pruner.best_begins_anew = True  # the last epoch is kept, whatever was best
            pruner.calls_prune = True
            pruner.on_train_begin(range(steps))
            pruner.calibrate_with(self.batches(), loss_of)  # read by criteria and compensation that want data
        precision = Precision.of(config, self.device)
        wrapped = DistributedDataParallel(model) if world_size() > 1 else None
        learner = Learner(model, optimizer, precision, config.label_smoothing, config.clip_norm, pruner, wrapped)
        if pruner is not None:
            pruner.on_member = partial(keep_member, self, learner)
        torch.manual_seed(config.seed + rank())
        return Stage(name, learner, scheduler, config.epochs, recovery, control)

    def batches(self) -> TrainingBatches:
        """The training images as training sees them."""
        return TrainingBatches(self.pipeline, self.data.train, self.config.batch_size, self.device)

    def run(self) -> Trained:
        """Train what is left to train; what is only masked at the end is removed."""
        for text in late_ends(self.config, self.data.steps(self.config.batch_size)):
            self.display.say(f"warning: {text}")
        if self.state.stage == "dense":
            self._save_dense(self.train("dense").learner.model)
            self.state = replace(self.state, stage="pruned", epoch=0, training={})
            self._save(None)
        elif not self.config.dense_baseline and self.state.epoch == 0:
            self._save_dense(self.new_model())
        stage = self.train("pruned")
        model, pruner = stage.learner.model, stage.learner.pruner
        assert pruner is not None
        last = self.recorder.rows[-1]["accuracy"]
        recovered = stage.recovered(self.batches(), lambda: self.accuracy(stage.learner), last)
        if prunes(pruner):
            change_model(self, model, pruner, pruner.remove)
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
            accuracy=final_accuracy(recovered, last),
            dense_accuracy=rows["dense"][-1]["accuracy"] if rows["dense"] else self._given_accuracy(),
            dense_seconds=seconds["dense"] if rows["dense"] else None,
            pruned_seconds=seconds["pruned"],
            masked_removed=self.state.masked_removed,
            before=self.state.seconds,
            members=self.state.members,
            recovery=recovered,
        )

    def train(self, name: str) -> Stage:
        """Train one model from where the run's state says it is; a signal ends that with a KeyboardInterrupt."""
        stage = self.restored(self.new_stage(name))
        config, steps = self.config, self.data.steps(self.config.batch_size)
        while self.state.epoch < (epochs := stage.epochs):
            title = f"{name} {config.model.name} on {config.data.name}: {epochs_text(epochs)} on {self.device}"
            with self.display.stage(title, epochs, self.state.epoch, steps) as shown:
                while self.state.epoch < stage.epochs == epochs:
                    self._epoch(stage, self.state.epoch, shown)
        return stage

    def _check_folder(self) -> None:
        if self.locked and self.writes:
            check_mine(self.folder)

    def restored(self, stage: Stage) -> Stage:
        """A new stage, brought to where the run's state says it is; a CheckpointError where that does not fit."""
        if self.state.training:
            with reading(self.folder / record.CHECKPOINT, "--resume", ALLOWED, used=True):
                stage.load_state_dict(self.state.training)
                set_rng_state(self.state.rng)
            stage.rewrapped()
        return stage

    def _epoch(self, stage: Stage, epoch: int, shown: StageDisplay) -> None:
        started, learner, pruner = time.perf_counter(), stage.learner, stage.learner.pruner
        begins, within = self.config.prune_at == "begin", self.state.within
        phase = EpochPhase(pruner, within.get("phase"))
        if begins and not within:
            self._events(learner, epoch)
            learner = stage.rewrapped()
        rate = self._rate(stage, epoch) or float(learner.optimizer.param_groups[0]["lr"])
        started -= float(within.get("seconds", 0.0))
        loss, train_accuracy = self._steps(stage, epoch, shown, {"phase": phase, "started": started})
        same_buffers(learner.model)
        if not begins or epoch == stage.epochs - 1:
            self._events(learner, epoch + begins)
            learner = stage.rewrapped()
        accuracy = self.accuracy(learner)
        stage.epoch_over(epoch, loss, lambda: self.new_model().to(self.device), self.batches())
        row = {
            "model": stage.name,
            "epoch": epoch,
            "phase": phase.name,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "accuracy": accuracy,
            "lr": rate,
            "macs": 1.0 if pruner is None else pruner.macs.fraction,
            "sparsity": 0.0 if pruner is None else pruner.sparsity,
            "seconds": time.perf_counter() - started,
        }
        self._check_folder()
        self.recorder.add(row, stage.norms())
        self.state.epoch = epoch + 1
        self._save(stage)
        shown.epoch(row)
        if self.display.watch is not None:
            self.display.watch(row)
        if self.stop.signal is not None:  # during the last step, or after it
            raise self.stop.error(f"--resume goes on after epoch {epoch}")

    def _steps(self, stage: Stage, epoch: int, shown: StageDisplay, line: Mapping[str, Any]) -> tuple[float, float]:
        """The steps of an epoch that are left; after a signal the checkpoint is written between two of them."""
        learner, steps, within = stage.learner, self.data.steps(self.config.batch_size), self.state.within
        sums = Sums.on(self.device, within if rank() == 0 else None)

        def tick() -> None:
            shown.tick()
            if stage.recovery is not None:
                stage.recovery.stepped(learner.model)
            if self.stop.signal is not None and sums.steps < steps:
                seconds = time.perf_counter() - line["started"]
                self._save(stage, {**sums.values(), "phase": line["phase"].name, "seconds": seconds})
                raise self.stop.error(f"--resume goes on from epoch {epoch}, step {sums.steps}")

        batches = self._rated(stage, epoch, int(within.get("steps", 0)))
        with self.stop.waiting() if world_size() == 1 else contextlib.nullcontext():
            return train_epoch(learner, batches, tick, sums)

    def _events(self, learner: Learner, epoch: int) -> None:
        """Tasks that are due in an epoch."""
        pruner = learner.pruner
        if pruner is not None and prunes(pruner):
            change_model(self, learner.model, pruner, lambda: pruner.prune(learner.model, epoch))

    def _rate(self, stage: Stage, epoch: float) -> float | None:
        """Set the learning rate of a moment; None where the scheduler's holds."""
        optimizer = stage.learner.optimizer
        rate = None if stage.recovery is None else stage.recovery.apply(optimizer, epoch)
        steps = self.data.steps(self.config.batch_size)
        return self.rates.apply(optimizer, epoch, steps) if rate is None else rate

    def _rated(self, stage: Stage, epoch: int, done: int) -> Iterator[Batch]:
        """The batches of an epoch after the first ``done``, with the learning rate of its moment set before each."""
        steps, generator = self.data.steps(self.config.batch_size), torch.Generator()
        generator.manual_seed(self.config.seed * EPOCH_SEEDS + epoch)
        batches = self.pipeline.train(self.data.train, self.config.batch_size, generator, self.device)
        for number, batch in enumerate(batches):
            if number < done:
                continue
            if number == done > 0:
                set_rng_state(self.state.rng)  # passing over batches may have drawn
            self._rate(stage, epoch + number / steps)
            yield batch

    def accuracy(self, learner: Learner) -> float:
        """Accuracy on the test images; the model is left in eval mode."""
        batches = self.pipeline.test(self.data.test, TEST_BATCH, self.device, self.pipeline.share)
        return evaluate(learner.model, batches, learner.precision)

    def _given_accuracy(self) -> float | None:
        """Without a baseline: the accuracy of the weights that the user gave, if any."""
        given = self.config.model.weights or self.config.model.kwargs.get("weights")
        given = given or self.config.model.kwargs.get("pretrained")
        return self.accuracy(self.new_stage("dense").learner) if given else None

    def _save_dense(self, model: nn.Module) -> None:
        if self.writes:
            save_dense(model, self.folder)

    def _save(self, stage: Stage | None, within: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint: of a stage in training (within an epoch: what it has come to), or between stages."""
        now = time.perf_counter()
        self.state.seconds += now - self._since
        self._since = now
        self.state.within = dict(within or {})
        self.state.training = {} if stage is None else stage.state_dict()
        self.state.rng = rng_state()
        self.state.rows, self.state.norms = len(self.recorder.rows), len(self.recorder.norms)
        self._check_folder()
        if self.writes:
            save_state(self.state, self.folder)
