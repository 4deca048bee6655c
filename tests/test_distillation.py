"""Losses from a teacher: their values, who gets gradients, and that a pruned student comes nearer to its teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pruningawaretraining import Pruning
from pruningawaretraining.distillation import FeatureLoss, ReusedClassifier, Taps, frozen_teacher, logits_loss
from pruningawaretraining.errors import ModelError


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "expected"),
    [
        ([[0.0, 0.0]], [[0.0, 0.0]], 1.0, 0.0),
        ([[0.0, 0.0]], [[math.log(3), 0.0]], 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([[0.0, 0.0]], [[2 * math.log(3), 0.0]], 2.0, 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),
    ],
)
def test_logits_loss(
    student: list[list[float]], teacher: list[list[float]], temperature: float, expected: float
) -> None:
    loss = logits_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="temperature: 0"):
        logits_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)
    with pytest.raises(ModelError, match=r"\(1, 2\) are not the teacher's \(1, 3\)"):
        logits_loss(torch.zeros(1, 2), torch.zeros(1, 3))


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def test_features_of_another_width_go_through_a_projector() -> None:
    student, teacher = net(4), frozen_teacher(net(8))
    mine, theirs = Taps(student, ["0"]), Taps(teacher, ["0"])
    features = FeatureLoss({"0": (4, 8)})
    student(X)
    teacher(X)
    loss = features(mine.outputs, theirs.outputs)
    expected = (features.projectors[0](student[0](X)) - teacher[0](X)).square().mean()
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert student[0].weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    mine.close()
    theirs.close()
    assert not student[0]._forward_hooks
    assert mine.outputs == {}
    with pytest.raises(ModelError, match="features: '9'"):
        Taps(student, ["9"])


def test_the_teachers_classifier_is_reused_and_stays() -> None:
    teacher = net(8)
    reused = ReusedClassifier(teacher[2], 4, 8)
    student_features = torch.randn(5, 4)
    expected = teacher[2](reused.projector(student_features))
    assert torch.equal(reused(student_features), expected)
    reused.loss(student_features, torch.randn(5, 8)).backward()
    assert [name for name, parameter in reused.named_parameters() if parameter.requires_grad] == [
        "projector.weight", "projector.bias",
    ]  # fmt: skip


def test_a_pruned_student_comes_nearer_to_its_teacher() -> None:
    model = net(16)
    teacher = frozen_teacher(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    pruner = Pruning(model, {"rules": [{"pattern": "2:4", "target": {"sparsity": 0.5}}]}, optimizer=optimizer)
    pruner.prune(model, 0)
    distances = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = logits_loss(model(X), teacher(X), 2.0)
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.3 * distances[0]
    assert pruner.sparsity == 0.5
    assert float((model[0].weight == 0).double().mean()) == 0.5
