"""Losses from a teacher: their values, who gets gradients, and that a pruned student comes nearer to its teacher."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pruningawaretraining import Distiller, Pruning, load_config
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.session.distillation_losses import (
    FeatureLoss,
    ReusedClassifier,
    Taps,
    frozen_teacher,
    logits_loss,
)
from pruningawaretraining.session.projectors import fit_projector


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


# --- beside a pruner ------------------------------------------------------------------------------------------------

SPARSE = {"pattern": "2:4", "target": {"sparsity": 0.5}}


def sparse(**distillation: Any) -> dict[str, Any]:
    return {"rules": [SPARSE], "distillation": distillation}


def test_the_teacher_is_the_model_before_pruning() -> None:
    model = net(16)
    dense = copy.deepcopy(model)
    pruner = Pruning(model, {"rules": [{**SPARSE, "at_init": True}], "distillation": {"weight": 3.0}})
    assert pruner.sparsity == 0.5
    outputs = model(X)
    loss = pruner.distill_loss(outputs, X)
    expected = 3.0 * logits_loss(outputs, dense(X), 2.0)
    assert loss.item() == pytest.approx(expected.item())
    assert loss.item() > 1e-3
    loss.backward()
    teacher = pruner.teacher
    assert teacher is not None
    assert not any(one.requires_grad or one.grad is not None for one in teacher.parameters())


def test_a_teacher_may_be_any_module_and_is_run_as_the_model_is() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(32)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> SimpleNamespace:
            return SimpleNamespace(logits=self.body(self.drop(x)) * scale)

    model, teacher = net(16), Wrapped()
    pruner = Pruning(model, {"rules": [SPARSE]}, teacher=teacher)
    outputs = model(X)
    loss = pruner.distill_loss({"logits": outputs}, X, scale=2.0)
    assert loss.item() == pytest.approx(logits_loss(outputs, teacher.body(X) * 2.0, 2.0).item())
    assert all(one.grad is None for one in teacher.parameters())
    with pytest.raises(ModelError, match="holds no logits"):
        pruner.distill_loss((outputs,), X)
    with pytest.raises(ModelError, match="teacher: 'dense' is a str"):
        Pruning(net(16), {"rules": [SPARSE]}, teacher="dense")  # type: ignore[arg-type]


def test_without_a_teacher_the_term_is_0() -> None:
    model = net(16)
    pruner = Pruning(model, {"rules": [SPARSE]})
    assert pruner.teacher is None
    assert pruner.distill_loss(model(X), X).item() == 0.0


def test_features_add_their_distance_until_a_removal_and_through_a_projector_after_it() -> None:
    model = net(16)
    dense = copy.deepcopy(model)
    config = {
        "rules": [{"layers": ["0"], "target": {"sparsity": 0.5}, "application": "remove"}],
        "distillation": {"weight": 2.0, "features": ["0"], "feature_weight": 0.5},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, config, example_inputs=X[:1], optimizer=optimizer)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    outputs = model(X)
    distance = (model[0](X) - dense[0](X)).square().mean()
    model(X)  # what the taps keep is of the last pass
    expected = 2.0 * (logits_loss(outputs, dense(X), 2.0) + 0.5 * distance)
    assert pruner.distill_loss(outputs, X).item() == pytest.approx(expected.item(), rel=1e-5)
    pruner.prune(model, 0)
    assert model[0].out_features == 8
    assert len([one for group in optimizer.param_groups for one in group["params"]]) == 4
    random_state = torch.get_rng_state()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(X)
        loss = pruner.distill_loss(outputs, X)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_projector_begins_as_the_least_squares_fit() -> None:
    generator = torch.Generator().manual_seed(1)
    student, mix, offset = torch.randn(500, 4, generator=generator), torch.randn(6, 4, generator=generator), 3.0
    projector = nn.Linear(4, 6)
    fit_projector(projector, student.view(50, 10, 4), (student @ mix.T + offset).view(50, 10, 6))
    assert torch.allclose(projector.weight, mix, atol=0.01)
    assert torch.allclose(projector.bias, torch.full((6,), offset), atol=0.01)


def test_channels_of_maps_are_compared_on_axis_1() -> None:
    student = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 36, 2))
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 2))
    distiller = Distiller(student, teacher, features=["0"])
    images = torch.randn(4, 1, 8, 8)
    distiller.loss(student(images), images).backward()
    assert student[0].weight.grad is not None
    assert distiller.state_dict()["widths"] == {"0": [3, 5]}


def test_the_tapped_model_can_be_copied_and_saved_in_the_middle_of_a_step() -> None:
    model = net(16)
    pruner = Pruning(model, sparse(features=["0"]))
    outputs = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), outputs)
    torch.save(model, io.BytesIO())
    assert pruner.distill_loss(outputs, X).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ModelError, match="features: '0' has not been run"):
        pruner.distill_loss(outputs, X)
    with pytest.raises(ModelError, match="features: 'zero'"):
        Pruning(net(16), sparse(features=["zero"]))


def steps_of(model: nn.Module, pruner: Pruning, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        outputs = model(X)
        pruner.distill_loss(outputs, X).backward()
        optimizer.step()


def build(seed: int) -> tuple[nn.Module, Pruning, torch.optim.Optimizer]:
    model = net(seed)
    config = {
        "rules": [{"layers": ["0"], "target": {"sparsity": 0.5}}],
        "distillation": {"features": ["0"]},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, Pruning(model, config, example_inputs=X[:1], optimizer=optimizer), optimizer


def test_a_resumed_run_has_its_teacher_and_projector() -> None:
    model, pruner, optimizer = build(16)
    steps_of(model, pruner, optimizer, 3)
    pruner.prune(model, 0)
    steps_of(model, pruner, optimizer, 3)
    file = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps_of(model, pruner, optimizer, 5)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, resumed, its_optimizer = build(16)
    with torch.no_grad():
        again[0].weight.zero_()  # so that the teacher cannot come from the model
    again, resumed = again, Pruning(again, resumed.config, example_inputs=X[:1], optimizer=its_optimizer)
    resumed.load_state_dict(state["pruner"], generators=True)
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    steps_of(again, resumed, its_optimizer, 5)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# --- configs --------------------------------------------------------------------------------------------------------


def test_the_step_wise_forms_weight() -> None:
    flat = load_config({"pattern": "4x1", "distill_loss_weight": 4.5}).distillation
    assert flat is not None
    assert (flat.weight, flat.temperature) == (4.5, 2.0)
    section = {
        "target_sparsity": 0.8,
        "distill_loss_weight": 8.0,
        "pruners": [{"pattern": "2:4", "target_sparsity": 0.5}],
    }
    file = load_config({"pruning": {"approach": {"weight_compression_pytorch": section}}})
    assert file.distillation is not None
    assert file.distillation.weight == 8.0
    assert load_config({"pattern": "4x1", "distill_loss_weight": 0}).distillation is None
    assert load_config({"pattern": "4x1"}).distillation is None
    with pytest.raises(ConfigError, match="distill_loss_weight: -1"):
        load_config({"pattern": "4x1", "distill_loss_weight": -1})


def test_the_weight_may_be_set_as_a_scripts_argument_would() -> None:
    model = net(16)
    pruner = Pruning({"pattern": "4x1"})
    pruner.update_items_for_all_pruners(distill_loss_weight=8.0, start_step=3, end_step=5)
    assert pruner.config.rules[0].start == 3
    pruner.model = model
    other = torch.randn(32, 3)
    teacher = pruner.teacher
    assert teacher is not None
    assert pruner.distill_loss(other, X).item() == pytest.approx(8.0 * logits_loss(other, model(X), 2.0).item())
    pruner.update_items_for_all_pruners(distill_loss_weight=0)
    assert pruner.teacher is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weigth": 1.0}, "did you mean 'weight'"),
        ({"temperature": 0}, "distillation.temperature: 0 is not allowed. Allowed: a number above 0"),
        ({"weight": -1}, "distillation.weight: -1 is not allowed"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(sparse(**wrong))


def test_inputs_on_which_the_teacher_does_not_run_are_named() -> None:
    model = nn.Linear(4, 2)
    pruner = Pruning(model, sparse(), teacher=nn.Linear(6, 2))
    x = torch.randn(3, 4)
    with pytest.raises(
        ModelError, match=r"the teacher \(Linear\) does not run on the inputs \(a tensor of shape \(3, 4\)"
    ):
        pruner.distill_loss(model(x), x)
    with pytest.raises(ModelError, match="none were given.*distill_loss"):
        pruner.distill_loss(model(x))
