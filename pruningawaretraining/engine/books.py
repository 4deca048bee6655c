"""The books are true: what masks say is compared with the weights that are there, and made true again.

Masked weights come back when a state_dict is loaded, when parameters are exchanged (``assign=True``, another layer, a
conversion), and when an optimizer wrapper copies values of its own into the model after its step. A step hook could not
see that without waiting for the device, so the weights are looked at whenever something is said or done because of the
masks: in ``prune``, ``report``, ``save_pruned``, ``export_onnx`` and at the end of a training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pruningawaretraining.config.computed_weights import why_computed
from pruningawaretraining.engine.domain import Domain
from pruningawaretraining.engine.engine import Engine
from pruningawaretraining.errors import ModelError
from pruningawaretraining.masks.masks import Masks
from pruningawaretraining.models.fake_quant import is_converted

logger = logging.getLogger(__name__)


def settle(engine: Engine, optimizers: Iterable[torch.optim.Optimizer], sharded: bool = False) -> None:
    """Let masks act on the parameters that the model has now, and set masked weights to 0 again.

    Args:
        engine: its masks.
        optimizers: of the model; named if they hold parameters that have been exchanged.
        sharded: whether ``fully_shard`` exchanges parameters in every forward pass, so that they say nothing.

    Raises:
        ModelError: a masked layer is gone, or has another shape; it is named.
    """
    if not sharded:
        _rebind(engine, optimizers)
    restored: dict[str, int] = {}
    for masks in engine.masks:
        restored |= masks.restore()
    if restored:
        logger.warning(
            "%d masked weights were not 0 any more (in %s) and are 0 again: weights were loaded, exchanged or copied "
            "into the model after it was masked",
            sum(restored.values()),
            _listed(list(restored)),
        )


def _rebind(engine: Engine, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    here = dict(engine.model.named_parameters(remove_duplicate=False))
    known = {id(one) for one in here.values()}
    domains = [
        one
        for one in engine.domains
        if any(rule.works for rule in one.rules) or any(masks.active for masks in _masks_of(engine, one))
    ]
    stale = {
        name: tensor
        for domain in domains
        for masks in _masks_of(engine, domain)
        for name, tensor in tensors_of(masks)
        if isinstance(tensor, nn.Parameter) and id(tensor) not in known
    }
    if not stale or any(is_converted(here[name]) for name in stale if name in here):
        return
    for name, tensor in stale.items():
        _check_fits(engine.model, name, tensor, here.get(name))
    for domain in domains:
        domain.follow_tensors()
    engine.penalties.forget()
    if any(masks.active for masks in engine.masks):
        logger.warning(
            "%d parameters were exchanged (%s): their masked weights are 0 again", len(stale), _listed(list(stale))
        )
    left = {id(one) for one in stale.values()}
    for optimizer in optimizers:
        if any(id(one) in left for group in optimizer.param_groups for one in group["params"]):
            logger.warning(
                "%s still holds parameters that were exchanged (%s): it trains what the model no longer has. Make a "
                "new optimizer",
                *(type(optimizer).__name__, _listed(list(stale))),
            )


def tensors_of(masks: Masks) -> list[tuple[str, Tensor]]:
    """Names and parameters of all members, as the masks know them."""
    return [(member.name, member.parameter) for member in masks.grouping.members]


def _masks_of(engine: Engine, domain: Domain) -> list[Masks]:
    """The masks of one domain."""
    own = [] if engine.weights is None else engine.weights.masks
    return own if domain is engine.weights else [one for one in engine.masks if one not in own]


def _check_fits(model: nn.Module, name: str, old: Tensor, new: Tensor | None) -> None:
    kind = type(model).__name__
    if new is None:
        raise ModelError(
            f"{name}: the layer that was masked is gone from the {kind}{_computed(model, name)}. Allowed: make the "
            "Pruning once the model has all its layers"
        )
    if new.shape != old.shape:
        raise ModelError(
            f"{name}: it had the shape {tuple(old.shape)} when it was masked and now has {tuple(new.shape)}: the layer "
            "was exchanged. Allowed: make the Pruning once the model has all its layers"
        )


def _computed(model: nn.Module, name: str) -> str:
    """What has taken the place of a parameter, where that is known."""
    owner, _, own = name.rpartition(".")
    layer = dict(model.named_modules()).get(owner)
    problem = "" if layer is None else why_computed(layer, own)
    return f": {problem}" if problem else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class WriteWatch:
    """Notices that weights were written between two steps: masked ones are set to 0 again before the next, and named
    once. PyTorch counts writes on the host; only where there were some are values looked at.
    """

    PATIENCE = 3
    """Looks at values that find nothing, after which masks are applied unseen: no step waits for the device."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int]] = []
        self._looks = 0

    def stepped(self, engine: Engine) -> None:
        """A step is over, and masks are applied."""
        self._known = [(one, one._version) for masks in engine.masks if masks.active for one in masks.watched]

    def forget(self) -> None:
        """The weights have been looked at, and masks applied."""
        self._known = []

    def begins(self, engine: Engine) -> None:
        """The next step begins."""
        if all(one._version == count for one, count in self._known):
            return
        if self._looks >= self.PATIENCE:
            engine.apply_masks()
            return
        self._looks += 1
        found: dict[str, int] = {}
        for masks in engine.masks:
            found |= masks.restore()
        if found:
            self._looks = self.PATIENCE
            logger.warning(
                "%d masked weights were not 0 any more when a step began (in %s) and are 0 again: weights were loaded, "
                "or are written after the optimizer's step, as by a Lookahead that does not call super().__init__(). "
                "Call pruner.apply_masks() after whatever writes them",
                sum(found.values()),
                _listed(list(found)),
            )


class StepWatch:
    """Notices epochs in which masks are active and no optimizer step is seen: the masks may not hold then."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._told = False

    def epoch(self, engine: Engine, epoch: int, steps: int) -> None:
        """An epoch's events have taken place.

        Args:
            engine: its masks.
            epoch: its number.
            steps: how many real steps there have been.
        """
        before, active = self._last, any(masks.active for masks in engine.masks)
        self._last = (epoch, steps) if active else None
        if before is None or not active or self._told or epoch <= before[0] or steps > before[1]:
            return
        self._told = True
        logger.warning(
            "masks are active and no optimizer step has been seen since epoch %d: masked weights are set to 0 only at "
            "prune, report and saving. Allowed: optimizer= of the model's own parameters, or on_after_optimizer_step() "
            "after every step",
            before[0],
        )
