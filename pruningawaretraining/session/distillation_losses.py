"""Losses between a teacher and a student: of logits, and of hidden features through projectors.

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

from pruningawaretraining.errors import ModelError, unknown
from pruningawaretraining.session.projectors import projected


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


def channels_last(values: Tensor) -> Tensor:
    """Features on the last axis: of maps with 4 or 5 dimensions, the channels."""
    return values.movedim(1, -1) if values.dim() in (4, 5) else values
