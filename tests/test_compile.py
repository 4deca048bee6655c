"""torch.compile: masks break no graph and are not compiled anew at every event; a removed model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pruningawaretraining import Pruning


class BatchNormNet(nn.Module):
    """A residual block with BatchNorm, the norm that needs no hook while it is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc((x + self.conv2(torch.relu(self.norm1(self.conv1(x))))).mean((2, 3)))


def batch(number: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (BatchNormNet() if name == "batch norm" else zoo.architecture("groupnorm")[0]).train()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def outside(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, **options)


def in_place(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    model.compile(fullgraph=True, **options)
    return model


def train(
    model: nn.Module, call: Callable[[Tensor], Tensor], pruner_of: Callable[..., Pruning], epochs: int = 6
) -> tuple[Pruning, list[int]]:
    """Two steps an epoch and a pruning event; returns how many graphs there were at the end of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner, made = pruner_of(optimizer), []
    for epoch in range(epochs):
        for step in range(2):
            optimizer.zero_grad()
            call(batch(2 * epoch + step)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        made.append(graphs())
        pruner.prune(model, epoch)
    return pruner, made


def rules(**rule: Any) -> dict[str, Any]:
    return {"rules": [{"target": {"sparsity": 0.5}, "start": 1, "end": 3, "regularizer": "growing_l2", **rule}]}


@pytest.mark.parametrize("compiled", [outside, in_place])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch norm", [1, 1, 1, 1, 2, 2]),  # events after epochs 1, 2 and 3, of which the last removes
        ("norms over channels", [1, 1, 2, 2, 3, 3]),  # these are hooked at the first mask, and told of the others
    ],
)
def test_masks_break_no_graph_and_removal_compiles_once(
    name: str, expected: list[int], backend: str, compiled: Callable[..., Any]
) -> None:
    model, plain = build(name), build(name)
    call = compiled(model, backend=backend)

    def pruner_of(one: nn.Module) -> Callable[[Any], Pruning]:
        return lambda optimizer: Pruning(one, rules(), example_inputs=batch(0), optimizer=optimizer)

    pruner, made = train(model, call, pruner_of(call))
    assert made == expected
    assert sum(counters["graph_break"].values()) == 0
    other, _ = train(plain, plain, pruner_of(plain))
    assert pruner.phase == other.phase == "finetune"
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), key


@pytest.mark.parametrize("name", ["batch norm", "norms over channels"])
def test_the_masked_compiled_model_computes_what_the_masked_model_does(name: str) -> None:
    model = build(name).eval()
    call = torch.compile(model, backend="eager", fullgraph=True)
    call(batch(0))
    pruner = Pruning(model, rules(), example_inputs=batch(0))
    for epoch in range(1, 4):
        pruner.prune(model, epoch)
        assert torch.allclose(call(batch(epoch)), model(batch(epoch)), atol=1e-6)


def test_a_model_that_shrinks_at_every_event_is_compiled_every_time() -> None:
    model = build("batch norm")
    call = torch.compile(model, backend="eager", fullgraph=True)
    config = rules(start=0, end=11, application="remove", scope="local", target={"sparsity": 0.75})

    def pruner_of(optimizer: torch.optim.Optimizer) -> Pruning:
        return Pruning(model, config, example_inputs=batch(0), optimizer=optimizer)

    _, made = train(model, call, pruner_of, 13)
    assert model.conv1.out_channels == 8
    assert made == list(range(1, 14))  # more than torch._dynamo.config.recompile_limit
    assert sum(counters["graph_break"].values()) == 0


class Counter:
    """A backend that counts what it compiles and how often that runs."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


class Broken(BatchNormNet):
    """Its forward pass is compiled in two pieces."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        torch._dynamo.graph_break()
        return self.fc((x + self.conv2(torch.relu(self.norm1(self.conv1(x))))).mean((2, 3)))


class Training(nn.Module):
    """A module that has the model, as Lightning's has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, x: Tensor) -> Tensor:
        return self.model(x) * 1.0


def sequential() -> nn.Sequential:
    norm = nn.GroupNorm(4, 16)
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def compiled_here(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


WAYS: dict[str, Callable[[nn.Module, Any], Callable[[Tensor], Tensor]]] = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": compiled_here,
    "a function of the model": lambda model, backend: torch.compile(lambda x: model(x) * 1.0, backend=backend),
    "a step of another module": lambda model, backend: torch.compile(Training(model).training_step, backend=backend),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": BatchNormNet,
    "norms over channels": lambda: zoo.architecture("groupnorm")[0],
    "graph break": Broken,
    "sequential": sequential,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_removal_resets_what_compiled_this_model_and_nothing_else(kind: str, way: str) -> None:
    torch.manual_seed(0)
    mine, function, module = Counter(), Counter(), Counter()
    model = MODELS[kind]().eval()
    call = WAYS[way](model, mine)
    other = torch.compile(lambda x: x.sin() + 1, backend=function)
    teacher = torch.compile(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), backend=module)
    given = batch(0), torch.randn(2, 3, 8)

    def run() -> None:
        assert torch.allclose(call(batch(1)), model(batch(1)), atol=1e-6)
        other(given[0]), teacher(given[1])

    run()
    others, pieces = (function.compiled, module.compiled), mine.compiled
    assert others == (1, module.compiled) and module.compiled > 0
    counters.clear()  # anyone may do that
    config = rules(start=0, end=2, application="remove", target={"sparsity": 0.6}, schedule="linear")
    pruner, removed = Pruning(model, config, example_inputs=batch(0)), 0
    with torch._dynamo.config.patch(recompile_limit=1):
        for epoch in range(3):
            removed += pruner.prune(model, epoch) == "removed"
            ran = mine.ran
            run()
            assert mine.ran - ran >= pieces, "it runs uncompiled"
    assert removed > 0 and mine.compiled >= (1 + removed) * pieces
    assert (function.compiled, module.compiled) == others


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm", "norms over channels"])
def test_inductor_trains_masked_and_removed_models(name: str) -> None:
    model, plain = build(name), build(name)
    call = torch.compile(model, fullgraph=True)

    def pruner_of(one: nn.Module) -> Callable[[Any], Pruning]:
        return lambda optimizer: Pruning(one, rules(), example_inputs=batch(0), optimizer=optimizer)

    train(model, call, pruner_of(call))
    train(plain, plain, pruner_of(plain))
    for (key, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3), key
