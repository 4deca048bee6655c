"""A teacher beside the pruned student: its outputs and hidden features are part of the student's loss.

Shape suffixes: ``_BC`` batch and classes, ``_F`` features on the last axis, ``_NF`` those of all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError
from pruningawaretraining.models.calling import first_line, shown
from pruningawaretraining.session.distillation_losses import (
    FeatureLoss,
    Taps,
    channels_last,
    frozen_teacher,
    logits_loss,
)
from pruningawaretraining.session.projectors import adam_of, fit_projector, follow, moved


class Distiller:
    """A teacher's part of the loss, for one student that is being pruned.

    The loss is ``weight * (logits_loss(student, teacher, temperature) + feature_weight * FeatureLoss)``. Features are
    the outputs of modules of the same names in both; channels are on axis 1 of maps with 4 or 5 dimensions, else on the
    last. Once a removal has made the student's features narrower than the teacher's, a linear projector connects
    them: it starts from a least-squares fit on the current batch and is trained by its own Adam (rate 1e-3), so the
    user's optimizer gets no new parameters. Each process trains its own.

    Args:
        student: the model that is trained.
        teacher: any module that takes the same inputs; it is put in eval mode and run without gradients. None for a
            frozen copy of the student as it is now, so before pruning.
        weight: of the whole, beside the loss of the task.
        temperature: of the logits, above 0.
        features: names of modules whose outputs are compared.
        feature_weight: of the features beside the logits.

    Raises:
        ConfigError: a negative weight, or a temperature that is not above 0.
        ModelError: a feature that one of the two does not have.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        features: Iterable[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        self.own = teacher is None
        self.teacher = frozen_teacher(student) if teacher is None else teacher
        for name, value in (("weight", weight), ("feature_weight", feature_weight)):
            if not value >= 0:
                raise ConfigError(f"{name}: {value!r} is not allowed. Allowed: 0 or more")
        if not temperature > 0:
            raise ConfigError(f"temperature: {temperature!r} is not allowed. Allowed: a number above 0")
        self._student = student
        self.weight, self.temperature, self.feature_weight = weight, temperature, feature_weight
        self.names = tuple(features)
        self._taps = Taps(student, self.names), Taps(self.teacher, self.names)
        self._features: FeatureLoss | None = None
        self._optimizer: torch.optim.Adam | None = None
        self._widths: dict[str, tuple[int, int]] = {}

    def loss(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's part of the loss, to be added to that of the task.

        Args:
            outputs: the student's for these inputs, of its last forward pass: logits, or what holds them as
                ``.logits`` or under "logits".
            args, kwargs: the inputs, for the teacher.

        Raises:
            ModelError: no logits in the outputs, other shapes than the teacher's, a feature that was not run, or inputs
                on which the teacher does not run.
        """
        student_BC = logits_of(outputs)
        if self.own:
            follow(self.teacher, self._student)
        self.teacher.eval()
        with torch.no_grad():
            teacher_BC = logits_of(self._taught(args, kwargs))
        loss = logits_loss(student_BC, teacher_BC, self.temperature)
        if self.names:
            loss = loss + self.feature_weight * self._feature_loss()
        return self.weight * loss

    def _taught(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The teacher's outputs."""
        try:
            return self.teacher(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError) as error:
            given = [*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())]
            raise ModelError(
                f"distillation: the teacher ({type(self.teacher).__name__}) does not run on the inputs "
                f"({', '.join(given) or 'none were given'}): {first_line(error)}. Allowed: "
                "distill_loss(outputs, *inputs), the inputs as the teacher's forward takes them"
            ) from error

    def _feature_loss(self) -> Tensor:
        student, teacher = (self._taken(taps) for taps in self._taps)
        widths = {name: (student[name].shape[-1], teacher[name].shape[-1]) for name in self.names}
        device = student[self.names[0]].device
        self._step(device)
        if self._features is None or widths != self._widths:
            self._build(widths, device)
            assert self._features is not None
            for name, projector in zip(self.names, self._features.projectors, strict=True):
                if isinstance(projector, nn.Linear):
                    fit_projector(projector, student[name], teacher[name])
        assert self._features is not None
        loss: Tensor = self._features(student, teacher)
        return loss

    def _taken(self, taps: Taps) -> dict[str, Tensor]:
        """Take the outputs out of the taps, channels last."""
        missing = [name for name in self.names if name not in taps.outputs]
        if missing:
            raise ModelError(f"features: {missing[0]!r} has not been run. Allowed: modules of every forward pass")
        found = {name: channels_last(taps.outputs.pop(name)) for name in self.names}
        taps.outputs.clear()
        return found

    def _build(self, widths: dict[str, tuple[int, int]], device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):  # what a projector begins with is fitted, not drawn
            self._features = FeatureLoss(widths).to(device)
        self._optimizer = adam_of(self._features)
        self._widths = dict(widths)

    def _step(self, device: torch.device) -> None:
        """Move the projectors by the gradients that the last loss has left, after a student that has been moved."""
        if self._optimizer is None or self._features is None:
            return
        if self._optimizer.param_groups[0]["params"][0].device != device:
            self._optimizer = moved(self._features, self._optimizer, device)
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # with AMP there may be infinities among them
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """Take the hooks out of student and teacher."""
        for taps in self._taps:
            taps.close()

    def state_dict(self) -> dict[str, Any]:
        """The projectors with their optimizer, and the teacher's weights if it is the copy that was made here."""
        built = self._features is not None
        return {
            "teacher": {key: value.cpu() for key, value in self.teacher.state_dict().items()} if self.own else None,
            "widths": {name: list(pair) for name, pair in self._widths.items()} if built else None,
            "projectors": self._features.state_dict() if self._features is not None else None,
            "gradients": self._gradients(),
            "optimizer": self._optimizer.state_dict() if self._optimizer is not None else None,
        }

    def _gradients(self) -> list[Tensor | None]:
        parameters = [] if self._features is None else list(self._features.parameters())
        return [None if one.grad is None else one.grad.clone() for one in parameters]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: its features or its teacher are others.
        """
        widths = state["widths"]
        if widths is not None and tuple(widths) != self.names:
            raise CheckpointError(f"state: its features are {list(widths)}, not {list(self.names)}")
        if (state["teacher"] is not None) != self.own:
            raise CheckpointError("state: its teacher is another. Allowed: a copy of the model where it was one")
        if self.own:
            self.teacher.load_state_dict(state["teacher"])
        if widths is None:
            self._features, self._optimizer, self._widths = None, None, {}
            return
        device = next((one.device for one in self.teacher.parameters()), torch.device("cpu"))
        self._build({name: (int(pair[0]), int(pair[1])) for name, pair in widths.items()}, device)
        assert self._features is not None
        self._features.load_state_dict(state["projectors"])
        for parameter, gradient in zip(self._features.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device).clone()
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or something with ``logits``.

    Raises:
        ModelError: it is neither.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise ModelError(f"outputs: a {type(outputs).__name__} holds no logits. Allowed: a tensor, or one as .logits")
    return found
