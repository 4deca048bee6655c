"""Optimizers that evaluate the model inside their step: masked weights train on as in a loop without a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_loops import fitted, network, step
from torch import Tensor, nn

from pruningawaretraining import Pruning

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}
PATTERNS = {"unstructured": "unstructured", "2:4": "2:4", "channel": "channel"}
EPOCHS, STEPS = 4, 3


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(STEPS)
    ]


def config(pattern: str = "unstructured") -> dict[str, Any]:
    dynamic = {"type": "straight_through", "refresh": 2, "decay": 1e-2}
    rule = {"pattern": pattern, "criterion": "l1", "target": {"sparsity": 0.5}, "start": 0, "end": 2, "exclude": ["4"]}
    return {"rules": [{**rule, "dynamic": dynamic, "application": "mask"}]}


def trained(name: str, pattern: str, closure: bool) -> tuple[list[Tensor], list[int]]:
    """Weights, dense ones of masked entries among them, and how many were 0 in each forward pass."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruning(model, config(pattern), optimizer=optimizer, example_inputs=torch.zeros(1, 16))
    seen: list[int] = []
    for epoch in range(EPOCHS):
        for inputs, targets in data():

            def evaluate(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                optimizer.zero_grad()
                seen.append(sum(int((one == 0).sum()) for one in model.parameters()))
                loss = nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss

            step(optimizer, evaluate, closure)
        pruner.prune(model, epoch)
    dense: list[Tensor] = []
    for masks in pruner.engine.masks:
        if masks.store is not None:
            dense += masks.store.packed(masks.names).values()
    return [one.detach().clone() for one in model.parameters()] + dense, seen


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_closure_changes_nothing(name: str, pattern: str) -> None:
    plain, seen = trained(name, PATTERNS[pattern], closure=False)
    found, again = trained(name, PATTERNS[pattern], closure=True)
    assert seen == again and (pattern == "channel" or max(seen) > 16 * 32 // 2)
    assert len(plain) == len(found) and all(torch.equal(*both) for both in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_lightning_trains_as_a_loop_of_ones_own(name: str) -> None:
    model, _ = fitted(config(), OPTIMIZERS[name], data(), EPOCHS)
    plain, _ = trained(name, "unstructured", closure=False)
    found = list(model.parameters())
    assert all(torch.equal(*both) for both in zip(plain[: len(found)], found, strict=True))


class SharpnessAware(torch.optim.SGD):
    """Steps with the gradient a little uphill: weights are moved, evaluated and put back in one step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        parameters = [one for group in self.param_groups for one in group["params"]]
        before = [one.clone() for one in parameters]
        for one in parameters:
            one.add_(one.grad, alpha=0.1)
        with torch.enable_grad():
            closure()
        for one, value in zip(parameters, before, strict=True):
            one.copy_(value)
        super().step()
        return loss


@pytest.mark.parametrize("kind", ["LBFGS", "sharpness-aware"])
def test_dense_weights_move_however_often_the_model_is_evaluated(kind: str) -> None:
    """Loss ``(w - goal)^2`` over masked weights; masked ones move by the gradient at 0."""
    weights, goal = [1.0, 0.9, 0.2, 0.1], torch.tensor([[1.0, 1.0, 0.3, -0.5]])
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    makers = {
        "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1),
        "sharpness-aware": lambda p: SharpnessAware(p, lr=0.1),
    }
    optimizer = makers[kind](model.parameters())
    rule = {
        "pattern": {"type": "unstructured", "spare_last": False}, "criterion": "l1", "target": {"sparsity": 0.5},
        "schedule": "one_shot", "dynamic": {"type": "straight_through", "decay": 0.0, "refresh": 0},
    }  # fmt: skip
    pruner = Pruning(model, {"rules": [rule]}, optimizer=optimizer)
    pruner.prune(model, 0)
    seen: list[list[float]] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        seen.append(model.weight.detach().flatten().tolist())
        loss = 0.5 * (model.weight - goal).square().sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    store = pruner._session.engine.masks[0].store
    assert store is not None and all(one[2:] == [0.0, 0.0] for one in seen)
    dense = store.packed({id(model.weight): "w"})["w"].tolist()
    rate = min(1.0, 1 / 0.9) * 0.1 if kind == "LBFGS" else 0.1  # LBFGS: 1 / the sum of |gradients|, 0.1 + 0.3 + 0.5
    assert dense == pytest.approx([0.2 + rate * 0.3, 0.1 - rate * 0.5])
    assert model.weight.detach().flatten().tolist()[2:] == [0.0, 0.0]
