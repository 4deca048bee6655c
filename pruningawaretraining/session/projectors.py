"""Linear projectors of a student's features: fitted, applied and trained, and moved with the student.

Shape suffixes: ``_F`` features on the last axis, ``_NF`` those of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def floating(module: nn.Module) -> Tensor | None:
    """A module's first parameter of a floating dtype."""
    return next((one for one in module.parameters() if one.is_floating_point()), None)


def follow(module: nn.Module, other: nn.Module) -> None:
    """Move a module to the device and dtype of another one, if it has others."""
    mine, its = floating(module), floating(other)
    if mine is not None and its is not None and (mine.device, mine.dtype) != (its.device, its.dtype):
        module.to(its.device, its.dtype)


def projected(projector: nn.Module, student_F: Tensor) -> Tensor:
    """A student's features through a projector, in the projector's dtype; through none as they are."""
    return projector(student_F.to(projector.weight.dtype)) if isinstance(projector, nn.Linear) else student_F


def adam_of(projectors: nn.Module) -> torch.optim.Adam | None:
    """The optimizer of projectors (rate 1e-3), None where they have no parameters; on a GPU it counts steps there."""
    parameters = list(projectors.parameters())
    return torch.optim.Adam(parameters, lr=1e-3, capturable=parameters[0].is_cuda) if parameters else None


def moved(projectors: nn.Module, adam: torch.optim.Adam, device: torch.device) -> torch.optim.Adam:
    """Move projectors to a device; returns what trains them there, with the state of what has trained them."""
    state = adam.state_dict()
    projectors.to(device)
    made = adam_of(projectors)
    assert made is not None
    made.load_state_dict({**state, "param_groups": made.state_dict()["param_groups"]})
    return made


@torch.no_grad()
def fit_projector(projector: nn.Linear, student_F: Tensor, teacher_F: Tensor) -> None:
    """Set a projector to the ridge regression of the teacher's features on the student's (ridge 1e-3 of the mean)."""
    student_NF, teacher_NF = student_F.detach().double().flatten(0, -2), teacher_F.double().flatten(0, -2)
    student_mean, teacher_mean = student_NF.mean(0), teacher_NF.mean(0)
    student_NF, teacher_NF = student_NF - student_mean, teacher_NF - teacher_mean
    gram = student_NF.T @ student_NF
    ridge = 1e-3 * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(ridge)
    weight = torch.linalg.solve(gram, student_NF.T @ teacher_NF).T
    projector.weight.copy_(weight)
    projector.bias.copy_(teacher_mean - weight @ student_mean)
