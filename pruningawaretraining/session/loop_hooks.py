"""The part of the facade that a training loop calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from typing import Any

from torch import Tensor, nn

from pruningawaretraining.criteria.second_order.gradients import LossFn
from pruningawaretraining.errors import ConfigError
from pruningawaretraining.models.calling import outside_inference
from pruningawaretraining.session.arguments import epoch_of
from pruningawaretraining.session.bound import Bound
from pruningawaretraining.session.epoch_counter import in_epochs
from pruningawaretraining.session.reporting import sparsity_of, tell_of_masked

logger = logging.getLogger(__name__)

Log = Callable[[str], None] | logging.Logger


class LoopHooks(Bound):
    """The hooks of a training loop."""

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Before the first epoch: from here on, settings cannot change.

        Args:
            dataloader: the loader of the training; how many batches it has matters where events are at fractions of
                epochs.
        """
        self._session.begun = True
        self._session.count_epochs(len(dataloader) if isinstance(dataloader, Sized) else None)

    def calibrate_with(self, dataloader: Iterable[Any], loss_fn: LossFn) -> None:
        """Give second-order criteria their own data: at every event they measure curvature on it and update the
        remaining weights so that the loss rises least (OBS, CAP, FastCAP, SparseGPT; see docs/second_order.md).
        A rule's ``compensation`` is fitted on it, too.

        Args:
            dataloader: batches ``(inputs, targets)``, or mappings of keyword inputs with "labels"; the loader of the
                training, with its augmentation, as the norms are measured on it.
            loss_fn: ``(outputs, targets) -> loss``.

        Raises:
            ConfigError: the loss is not a function.
        """
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn: {loss_fn!r} is not a function. Allowed: a function of (outputs, targets)")
        self._session.calibrate_with(dataloader, loss_fn)

    def on_epoch_begin(self, epoch: int | None = None) -> None:
        """At the start of an epoch. Configs of systems that have this hook (Intel Neural Compressor), or count epochs
        themselves (SparseML), take the events of the epoch; others leave them to ``prune``.

        Args:
            epoch: counted from 0; absent: the next one.
        """
        counter, engine = self._session.epochs, self._session.engine
        now = counter.begins(None if epoch is None else epoch_of(epoch), engine)
        if counter.by_itself and in_epochs(engine):
            self.prune(epoch=now)

    def on_step_begin(self, step: int = 0) -> None:
        """At the start of a step: rules that count steps have the event that is due.

        Args:
            step: of the epoch or the training. It decides nothing, since the pruner counts the optimizer's real steps
                itself; where it begins anew without a call of ``prune`` that is needed, a warning says so.
        """
        self._session.on_step_begin(step)

    def on_before_optimizer_step(self) -> None:
        """After backward, before clipping and the optimizer's step: regularise, and mask the gradients."""
        self._says_before = True
        self.channel_regularize()
        self._session.engine.mask_gradients()

    def on_after_optimizer_step(self) -> None:
        """After the optimizer's step: masked weights are set to 0 again."""
        if not self._steps.optimizers and (self._steps.by_hand or not self._says_before):
            self._steps.stepped_by_hand()  # else the optimizer's own hooks have done it, or an earlier call

    def on_step_end(self) -> None:
        """At the end of a step; nothing is done then."""

    def on_epoch_end(self, epoch: int = 0) -> None:
        """At the end of an epoch; nothing is done then.

        Args:
            epoch: not used.
        """

    @property
    def calls_prune(self) -> bool:
        """Whether the loop calls ``prune`` for its epochs, as it shows by the first call. Set it where that may come
        later than the first epoch: until then, SparseML's and Intel's configs count epochs from the optimizer's steps.
        """
        return self._session.epochs.called

    @calls_prune.setter
    def calls_prune(self, value: bool) -> None:
        self._session.epochs.called = value

    def on_train_end(self) -> None:
        """After the last epoch: nothing prunes or regularises any more; masks stay.

        Masks that are still to come are put in force: of events that wait for gradients, and of groups that fade.
        """
        self._settle()
        self._session.end()
        tell_of_masked(self._session)
        logger.info("training ended: sparsity %.4f", sparsity_of(self._session))

    def channel_regularize(self, model: nn.Module | None = None) -> None:
        """Add the channel regularisers to ``.grad``, in place; call it after ``loss.backward()``.

        With an optimizer attached this happens in the optimizer's step, after a gradient scaler has divided its scale
        out and once for any number of accumulated backward passes; the call then changes nothing.
        """
        self._check_same(model)
        if not self._steps.optimizers and not (self._says_before and self._steps.by_hand):
            self._steps.gradients_by_hand()

    def slice_regularize(self, model: nn.Module | None = None) -> Tensor:
        """The penalty of the slice rules, to be added to the loss: 0 without any."""
        self._check_same(model)
        session = self._session
        return session.engine.loss_penalty(ended=session.ended)

    def distill_loss(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's part of the loss, to be added to the task's: ``loss + pruner.distill_loss(outputs, inputs)``.

        Args:
            outputs: the model's for these inputs, of its last forward pass: logits, or what holds them as ``.logits``.
            args, kwargs: the inputs, for the teacher.

        Returns:
            ``weight * (logits + feature_weight * features)``; 0 without ``distillation`` or a teacher.

        Raises:
            ModelError: outputs without logits, or of another shape than the teacher's.
        """
        distiller = self._session.distiller
        return (
            self._session.engine.loss_penalty(ended=True)
            if distiller is None
            else distiller.loss(outputs, *args, **kwargs)
        )

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher of :meth:`distill_loss`, or None."""
        distiller = None if self._known is None else self._known.distiller
        return None if distiller is None else distiller.teacher

    def prune(self, model: nn.Module | None = None, epoch: int | None = None, log: Log | None = None) -> str | None:
        """Take the events of this epoch: nothing, mask, or mask and remove.

        Args:
            model: the model given at construction (or its wrapper).
            epoch: counted from 0; an epoch fires at most once. It may be left out where the rules have no schedule.
            log: a logger or a function of one line; told what happened, and of events that wait for a later step.

        Returns:
            "removed", "masked", or None where nothing has happened. After a removal the best checkpoint so far is of
            the larger model: reset the best metric.

        Raises:
            ValueError: another model, no epoch where rules have a schedule, no example inputs, or a removal that would
                change the model's outputs.
        """
        self._check_same(model)
        now = None if epoch is None else epoch_of(epoch)
        self._settle()
        self._session.epochs.called = True
        with outside_inference():
            done = self._session.prune(now, log)
        self._watch.epoch(self._session.engine, 0 if now is None else now, self._steps.count)
        if done == "removed" and now is not None and not self.best_begins_anew:  # without an epoch, nothing was before
            self.best_begins_anew = True
            logger.warning(
                "best: channels were removed: begin the best metric anew. "
                "Set pruner.best_begins_anew = True to silence this"
            )
        return done

    def remove(self) -> None:
        """Physically remove what is masked now, whatever the schedule says; zeros inside a weight stay there."""
        self._settle()
        with outside_inference():
            self._session.remove()
