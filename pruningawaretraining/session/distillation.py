"""A teacher beside the pruned student: its outputs and hidden features are part of the student's loss.

Shape suffixes: ``_BC`` batch and classes, ``_F`` features on the last axis, ``_NF`` those of all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError, unknown
from pruningawaretraining.models.calling import first_line, shown
from pruningawaretraining.session.projectors import adam_of, fit_projector, follow, moved, projected


def frozen_teacher(model: nn.Module) -> nn.Module:
    """A copy of a model (make it before pruning), in eval mode and without gradients."""
    teacher = copy.deepcopy(model).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def logits_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch (Hinton et al. 2015).

    Args:
        student_BC, teacher_BC: outputs before the softmax; classes on the last axis.
        temperature: T, above 0.

    Raises:
        ModelError: a temperature or shapes that cannot be.
    """
    if not temperature > 0:
        raise ModelError(f"temperature: {temperature!r} must be above 0")
    if student_BC.shape != teacher_BC.shape:
        raise ModelError(f"logits: the student's {tuple(student_BC.shape)} are not the teacher's "
                         f"{tuple(teacher_BC.shape)}")  # fmt: skip
    student = functional.log_softmax(student_BC.float().flatten(0, -2) / temperature, -1)
    teacher = functional.log_softmax(teacher_BC.detach().float().flatten(0, -2) / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Taps:
    """Keeps the outputs of some modules of a model, of its last forward pass.

    Args:
        model: the model.
        names: names of its modules.

    Raises:
        ModelError: a name that is no module.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name in names:
            if name not in modules:
                raise ModelError(unknown("features", name, [one for one in modules if one]))
            self._handles.append(modules[name].register_forward_hook(partial(self._keep, name)))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.outputs[name] = output if isinstance(output, Tensor) else output[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        """In a copy of the model the hooks keep what the copy gives; what is kept now is no part of it."""
        other = Taps.__new__(Taps)
        other.outputs, other._handles = {}, []
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"outputs": {}, "_handles": []}

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.outputs = [], {}


class FeatureLoss(nn.Module):
    """Mean squared distance between hidden features, through a linear projector where the student's are narrower.

    Args:
        widths: name -> (width of the student's features, of the teacher's), on the last axis. Equal widths need no
            projector. The projectors are parameters: give them to the optimizer.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.names = list(widths)
        self.projectors = nn.ModuleList(
            nn.Identity() if student == teacher else nn.Linear(student, teacher) for student, teacher in widths.values()
        )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The mean over the features of both, which :class:`Taps` keep."""
        losses = [
            functional.mse_loss(projected(projector, student[name]).float(), teacher[name].detach().float())
            for name, projector in zip(self.names, self.projectors, strict=True)
        ]
        return torch.stack(losses).mean()


class ReusedClassifier(nn.Module):
    """The teacher's own classifier over projected features of the student (Chen et al. 2022).

    The loss is the squared distance of the features before the classifier; at inference the student runs with the
    projector and the teacher's classifier.

    Args:
        classifier: the teacher's; a frozen copy is kept.
        student_width, teacher_width: of the features before it.
    """

    def __init__(self, classifier: nn.Module, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.projector = nn.Linear(student_width, teacher_width)
        self.classifier = frozen_teacher(classifier)

    def forward(self, student_F: Tensor) -> Tensor:
        """The classifier's outputs for the student's features."""
        outputs: Tensor = self.classifier(self.projector(student_F))
        return outputs

    def loss(self, student_F: Tensor, teacher_F: Tensor) -> Tensor:
        """Mean squared distance between projected and teacher's features."""
        return functional.mse_loss(self.projector(student_F), teacher_F.detach())


class Distiller:
    """A teacher's part of the loss, for one student that is being pruned.

    The loss is ``weight * (logits_loss(student, teacher, temperature) + feature_weight * FeatureLoss)``. Features are
    the outputs of modules of the same names in both; channels are on axis 1 of maps with 4 or 5 dimensions, else on the
    last. Once a removal has made the student's features narrower than the teacher's, a linear projector stands between
    them: it begins as the least-squares fit on the batch at hand, and is trained by an Adam of its own (rate 1e-3), so
    the user's optimizer gets no new parameters. Each process trains its own.

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
        """What the taps hold, channels last; they let go of it."""
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
        """The teacher's weights where it is our own copy, and the projectors with what trains them."""
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


def channels_last(values: Tensor) -> Tensor:
    """Features on the last axis: of maps with 4 or 5 dimensions, the channels."""
    return values.movedim(1, -1) if values.dim() in (4, 5) else values
