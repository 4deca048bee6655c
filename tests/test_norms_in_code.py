"""Norms over channels that the code of a block or of the model spells out: masked as removed, and how far they go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kinds import floor_of, gap
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, save_pruned
from pruningawaretraining.errors import ModelError
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.probes import perturbed

Norm = Callable[[Tensor, int], Tensor]


def standard(x: Tensor, dim: int) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True) + 1e-6).sqrt()


def by_hand(x: Tensor, dim: int) -> Tensor:
    centred = x - torch.mean(x, dim=dim, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(dim, keepdim=True) + 1e-6)


def rms(x: Tensor, dim: int) -> Tensor:
    return x * (x.square().mean(dim, keepdim=True) + 1e-6).rsqrt()


def pixel(x: Tensor, dim: int) -> Tensor:
    return x / torch.sqrt(torch.mean(x**2, dim=dim, keepdim=True) + 1e-8)


def joint(x: Tensor, dim: int) -> Tensor:
    variance, mean = torch.var_mean(x, dim, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def centred_length(x: Tensor, dim: int) -> Tensor:
    """A length of what is not 0 where channels are masked."""
    centred = x - x.mean(dim, keepdim=True)
    return centred / (centred.norm(dim=dim, keepdim=True) + 1e-6)


def functional(x: Tensor, dim: int) -> Tensor:
    x = x.movedim(dim, -1)
    return F.layer_norm(x, x.shape[-1:]).movedim(-1, dim)


def largest(x: Tensor, dim: int) -> Tensor:
    return x / (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True) + 1e-3)


NORMS: dict[str, Norm] = {
    one.__name__: one for one in (standard, by_hand, rms, pixel, joint, centred_length, functional, largest)
}


class Block(nn.Module):
    """Two layers with a norm in between that its own code spells out."""

    def __init__(self, norm: Norm, images: bool) -> None:
        super().__init__()
        self.norm, self.dim = norm, 1 if images else -1
        self.first, self.second = _layer(images, 16, 24), _layer(images, 24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x), self.dim).relu())


class Net(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, norm: Norm, images: bool) -> None:
        super().__init__()
        self.stem, self.head = _layer(images, 3, 16), _layer(images, 16, 4)
        self.blocks = nn.Sequential(*(Block(norm, images) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Flat(nn.Module):
    """All layers of one width and all norms in the model's own code, in a loop."""

    def __init__(self, norm: Norm, images: bool) -> None:
        super().__init__()
        self.norm, self.dim = norm, 1 if images else -1
        widths = (3, 16, 16, 16)
        self.layers = nn.ModuleList(_layer(images, a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.head = _layer(images, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(layer(x), self.dim).relu()
        return self.head(x)


@pytest.fixture(autouse=True)
def modes() -> Iterator[None]:
    """A forward pass leaves no mode of PyTorch behind."""
    yield
    assert _modes_left() == 0


def _modes_left() -> int:
    return int(torch.overrides._len_torch_function_stack())  # type: ignore[attr-defined]


def _layer(images: bool, inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1) if images else nn.Linear(inputs, outputs)


def _inputs(images: bool, batch: int = 2, seed: int = 0) -> Tensor:
    shape = (batch, 3, 6, 6) if images else (batch, 5, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _built(kind: type[nn.Module], norm: Norm, images: bool) -> nn.Module:
    torch.manual_seed(0)
    model = kind(norm, images)
    with perturbed(model):
        return copy.deepcopy(model)


def _rule(sparsity: float = 0.5, end: int = 0, **more: Any) -> dict[str, Any]:
    return {"rules": [{"target": {"sparsity": sparsity}, "start": 0, "end": end, **more}]}


@pytest.mark.parametrize("images", [True, False], ids=["images", "tokens"])
@pytest.mark.parametrize("kind", [Net, Flat])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_in_code_is_pruned_exactly_and_far_enough(
    name: str, kind: type[nn.Module], images: bool, tmp_path: Path
) -> None:
    model = _built(kind, NORMS[name], images)
    dense, inputs = copy.deepcopy(model), _inputs(images)
    pruner = Pruning(model, _rule(), example_inputs=inputs)
    assert floor_of(pruner) <= 0.05
    other = _inputs(images, batch=3, seed=5)
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, other))
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed
    removed = outputs_of(model, other)
    assert gap(seen["masked"], removed) <= 1e-5
    assert pruner.macs.kept == count_macs(model, inputs) < 0.6 * count_macs(dense, inputs)
    again = load_pruned(dense, save_pruned(model, tmp_path / "pruned.safetensors"))
    assert gap(removed, outputs_of(again, other)) == 0.0


# --- while masked -------------------------------------------------------------------------------------------------


def _masked(kind: type[nn.Module] = Net, norm: Norm = standard, images: bool = True) -> tuple[nn.Module, Any, Tensor]:
    """A model with about half of its channels masked, its pruner, and inputs."""
    model, inputs = _built(kind, norm, images), _inputs(images)
    pruner = Pruning(model, _rule(0.4, end=4, schedule="linear"), example_inputs=inputs)
    pruner.prune(model, 0)
    assert pruner.sparsity > 0 and not pruner.channel_pruner.removed
    return model, pruner, inputs


@pytest.mark.parametrize("kind", [Net, Flat])
@pytest.mark.parametrize("name", ["standard", "rms", "functional"])
def test_masked_gradients_are_those_of_the_removed_model(name: str, kind: type[nn.Module]) -> None:
    model, _, inputs = _masked(kind, NORMS[name])
    twin, removed, _ = _masked(kind, NORMS[name])
    removed.remove()
    for one in (model, twin):
        one(inputs).square().mean().backward()
    for name, parameter in twin.named_parameters():
        whole = dict(model.named_parameters())[name].grad
        assert whole is not None and parameter.grad is not None and float(parameter.grad.norm()) > 0
        assert abs(float(whole.norm()) - float(parameter.grad.norm())) <= 1e-5 * float(parameter.grad.norm())


def test_masks_that_grow_are_followed_and_training_goes_on() -> None:
    """Masked in two events with steps in between; after the removal the outputs are the same."""
    model, pruner, inputs = _masked(Flat)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner.attach(optimizer)
    for epoch in (1, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.prune(model, epoch)
    masked = outputs_of(model, inputs)
    pruner.remove()
    assert gap(masked, outputs_of(model, inputs)) <= 1e-5
    assert model.layers[0].out_channels < 16  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Net, Flat])
def test_the_compiled_model_computes_what_the_model_does(kind: type[nn.Module]) -> None:
    """Also where the norm is in the code of the outermost module that is compiled."""
    model, pruner, inputs = _masked(kind)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)
    pruner.prune(model, 2)
    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)
    model.compile(backend="eager", fullgraph=True)
    expected = copy.deepcopy(model)._call_impl(inputs)  # type: ignore[no-untyped-call]
    assert torch.allclose(model(inputs), expected, atol=1e-6)
    torch._dynamo.reset()


def test_copies_of_a_masked_model_compute_the_same() -> None:
    model, _, inputs = _masked()
    expected = model(inputs)
    assert torch.equal(copy.deepcopy(model)(inputs), expected)


def test_a_model_that_was_saved_masked_goes_on(tmp_path: Path) -> None:
    model, pruner, inputs = _masked()
    expected = model(inputs)
    dense = _built(Net, standard, images=True)
    again = load_pruned(copy.deepcopy(dense), save_pruned(model, tmp_path / "m.safetensors"))
    assert torch.equal(again(inputs), expected) and torch.equal(copy.deepcopy(again)(inputs), expected)
    twice = load_pruned(copy.deepcopy(dense), save_pruned(again, tmp_path / "n.safetensors"))
    assert torch.equal(twice(inputs), expected)
    other = Pruning(again, {"rules": [{"target": {"sparsity": 0.5}, "start": 9}]}, example_inputs=inputs)
    assert torch.equal(again(inputs), expected)
    gone = {name: torch.nonzero(~keep).flatten().tolist() for name, keep in pruner.masks.items()}
    other.remove_channels({name: numbers for name, numbers in gone.items() if numbers})
    assert torch.allclose(again(inputs), expected, atol=1e-5)
    assert count_macs(again, inputs) < count_macs(dense, inputs)


def test_a_failing_forward_pass_leaves_nothing_behind() -> None:
    model, pruner, inputs = _masked()
    expected = model(inputs)
    with pytest.raises(RuntimeError):
        model(inputs[:, :2])
    assert _modes_left() == 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    block: Any = model.blocks[0]  # type: ignore[index]
    block.norm = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(inputs)
    block.norm = standard
    left, other = _modes_left(), torch.randn(2, 24, 4, 4)
    assert torch.allclose(other.mean(1), other.flatten(2).permute(0, 2, 1).sum(-1).view(2, 4, 4) / 24, atol=1e-6)
    assert torch.equal(model(inputs), expected) and _modes_left() <= left
    pruner.remove()
    assert torch.allclose(model(inputs), expected, atol=1e-5)
    while _modes_left():
        torch.overrides._pop_mode()  # type: ignore[attr-defined]


class Checkpointed(nn.Module):
    """Its code is computed again in the backward pass, where the module itself is not called."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always, self.stem, self.block = always, _layer(True, 3, 16), Block(standard, True)
        self.head = _layer(True, 16, 4)

    def inner(self, x: Tensor) -> Tensor:
        return standard(self.stem(x), 1)

    def forward(self, x: Tensor) -> Tensor:
        again = self.always or self.training
        x = checkpoint(self.inner, x, use_reentrant=False) if again else self.inner(x)
        return self.head(checkpoint(self.block, x, use_reentrant=False) if again else self.block(x))


def test_code_that_is_computed_again_is_named_and_whole_modules_are_exact(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    rule, inputs = _rule(0.4, end=4, schedule="linear", scope="local"), _inputs(True)
    model = Checkpointed(always=True)
    pruner = Pruning(model, rule, example_inputs=inputs)
    assert set(pruner.masks) == {"block.first"} and "stem: reaches a mean over channels in the model's" in caplog.text
    pruner.prune(model, 0)
    twin = Checkpointed(always=True)
    twin.load_state_dict(model.state_dict())
    other = Pruning(twin, rule, example_inputs=inputs)
    other.prune(twin, 0)
    other.remove()
    for one in (model, twin):
        one.train()
        one(inputs).square().mean().backward()
    assert model.stem.weight.grad is not None and twin.stem.weight.grad is not None
    assert torch.allclose(model.stem.weight.grad, twin.stem.weight.grad, atol=1e-6)
    model = Checkpointed(always=False).eval()
    pruner = Pruning(model, rule, example_inputs=inputs)
    pruner.prune(model, 0)
    assert set(pruner.masks) == {"stem", "block.first"} and not bool(pruner.masks["stem"].all())
    with pytest.raises(ModelError, match="is called by torch.utils.checkpoint inside a module"):
        model.train()(inputs)


# --- what is no norm ----------------------------------------------------------------------------------------------


class Attended(nn.Module):
    """Attention over positions by mean and maximum over channels, in the block's own code."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.first, self.look, self.second = _layer(True, 3, 24), nn.Conv2d(2, 1, 3, padding=1), _layer(True, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return self.second(x * self.look(seen).sigmoid())


def test_attention_over_positions_is_exact() -> None:
    model, inputs = _built(Attended, standard, images=True), _inputs(True)
    pruner = Pruning(model, _rule(), example_inputs=inputs)
    assert floor_of(pruner) <= 0.1
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, inputs))
    pruner.prune(model, 0)
    assert model.first.out_channels == 12 and model.look.in_channels == 2  # type: ignore[union-attr]
    assert gap(seen["masked"], outputs_of(model, inputs)) <= 1e-5


class Affine(nn.Module):
    """Functional norms with weights of the block's own."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = _layer(False, 3, 24), _layer(False, 24, 16), _layer(False, 16, 4)
        self.weight, self.bias, self.scale = (nn.Parameter(torch.randn(size)) for size in (24, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.layer_norm(x, normalized_shape=x.shape[-1:], weight=self.weight, bias=self.bias)
        x = self.second(x.relu())
        return self.head(F.rms_norm(x, x.shape[-1:], self.scale).relu())


def test_functional_norms_with_weights_are_exact(tmp_path: Path) -> None:
    model, inputs = _built(Affine, standard, images=False), _inputs(False)
    pruner = Pruning(model, _rule(), example_inputs=inputs)
    assert floor_of(pruner) <= 0.05
    seen: dict[str, list[Tensor]] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, inputs))
    pruner.prune(model, 0)
    assert len(model.weight) + len(model.scale) == 20  # type: ignore[arg-type]
    assert gap(seen["masked"], outputs_of(model, inputs)) <= 1e-5


def test_a_masked_model_is_exported(tmp_path: Path) -> None:
    model, _, inputs = _masked()
    assert export_onnx(model, inputs, tmp_path / "m.onnx").max_abs_diff <= 1e-5


class Twice(nn.Module):
    """Means over two sets of channels of one size, after one layer: which is which cannot be told."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (_layer(True, *one) for one in ((3, 8), (3, 8), (8, 4), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(x), self.b(x)
        one, other = (part / (part.square().mean(1, keepdim=True) + 1e-6).sqrt() for part in (one, other))
        return self.c(one) + self.d(other)


class Coincidence(nn.Module):
    """Channels and rows are reduced along one dimension after one layer; an input may have as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _layer(True, 3, 16), _layer(True, 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = standard(self.first(x), 1).transpose(1, 2)
        return self.second(standard(rows, 1).transpose(1, 2))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "3.a, 3.b: reaches a mean over channels in 3 (test_norms_in_code.py"),
        (Coincidence, "3.first: reaches a "),
    ],
)
def test_reductions_that_cannot_be_told_apart_keep_their_channels_by_name(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(_layer(True, 3, 16), nn.ReLU(), _layer(True, 16, 3), kind())
    pruner = Pruning(model, _rule(), example_inputs=_inputs(True))
    assert set(pruner.masks) == {"0", "2"}
    assert reason in caplog.text


class PixelNorm(nn.Module):
    """A norm without weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel(x, 1)


class Generator(nn.Module):
    """One pixel norm and one activation behind all layers, as GANs have them; in training some modules more run."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(True, a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.act, self.norm, self.drop = nn.LeakyReLU(0.2), PixelNorm(), nn.Dropout(0.0)
        self.head = _layer(True, widths[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
            x = standard(self.norm(self.drop(x) if self.training else x), 1)
        return self.head(x)


@pytest.mark.parametrize("widths", [(16, 16, 16), (16, 24, 12)])
def test_a_norm_that_several_layers_share_is_exact_in_training_too(widths: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Generator(widths), _inputs(True)
    dense = copy.deepcopy(model)
    pruner = Pruning(model, _rule(0.4, end=4, schedule="linear"), example_inputs=inputs)
    assert floor_of(pruner) <= 0.05
    pruner.prune(model, 0)
    masked = model.train()(inputs), model.eval()(inputs)
    again = load_pruned(dense, save_pruned(model, tmp_path / "m.safetensors"))
    assert torch.equal(again.eval()(inputs), masked[1])
    pruner.remove()
    assert gap(list(masked), [model.train()(inputs), model.eval()(inputs)]) <= 1e-5


class Width(nn.Module):
    """A root mean square that divides by the width itself."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.first, self.second = _layer(True, 3, 24), _layer(True, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x / ((x * x).sum(1, keepdim=True) / x.shape[1] + 1e-6).sqrt())


def test_a_norm_that_divides_by_the_width_is_masked_as_removed_or_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(_layer(True, 3, 16), nn.ReLU(), _layer(True, 16, 3), Width())
    pruner = Pruning(model, _rule(), example_inputs=_inputs(True))
    assert set(pruner.masks) == {"0", "2"}
    assert "3.first stays as it is" in caplog.text


def test_an_exported_graph_cannot_be_masked_there() -> None:
    model, pruner, inputs = _masked()
    found = pruner.channel_pruner.found
    problems = [problem for one in found.attachments if (problem := one.graph_problem(model))]
    assert len(problems) == 1 and problems[0].startswith("the code of blocks.0 reduces over channels")
