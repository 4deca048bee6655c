"""Rounding is told from misunderstanding: under emulated TF32, in half precision, and without a float64 form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tf32
import torch
import torchvision
import zoo
from torch import Tensor, nn

from pruningawaretraining import Pruning
from pruningawaretraining.errors import ModelError
from pruningawaretraining.experiment.models import cifar_resnet56
from pruningawaretraining.experiment.verify import scores
from pruningawaretraining.export import onnx as export
from pruningawaretraining.export.program import export_program
from pruningawaretraining.models import comparison, precision
from pruningawaretraining.models.calling import outputs_of
from pruningawaretraining.models.comparison import Comparison
from pruningawaretraining.models.masked_norms import KeptLayerNorm
from pruningawaretraining.models.probes import probes_of

HALF = {"rules": [{"target": {"macs": 0.5}, "start": 0, "end": 0}]}
DOZEN = (*zoo.NAMES, "resnet50", "efficientnet_b0", "vit_b_16", "resnet56")


def small_vit() -> nn.Module:
    """vit_b_16's code, narrower."""
    return torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 256, num_classes=10)


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in zoo.SMALL:
        return zoo.architecture(name)
    made = {"vit_b_16": small_vit, "resnet56": cifar_resnet56}.get(name)
    return zoo.vision(name) if made is None else zoo.scramble(made()), zoo.images(32)


@pytest.mark.parametrize("name", DOZEN)
def test_tf32_changes_no_choice_and_no_target(name: str) -> None:
    model, inputs = network(name)
    plain = set(Pruning(model, HALF, example_inputs=inputs).masks)
    with tf32.EmulatedTF32() as emulated:
        pruner = Pruning(model, HALF, example_inputs=inputs)
        assert set(pruner.masks) == plain
        pruner.prune(model, 0)
    assert emulated.rounded > 0
    assert pruner.channel_pruner.removed
    assert pruner.report().macs["fraction"] <= 0.5


class Mixes(nn.Module):
    """Channels of one layer are weighed by their number, which removal changes: a little, or a lot."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.mixed, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.norm(self.first(x)).relu()).relu()
        numbers = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return self.last(x.mean((2, 3)) * (1 + self.weight * numbers))


class Fixed(nn.Module):
    """Code that fixes its dtype, and so has no float64 form."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype))


ARITHMETIC: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "float32": (torch.float32, nullcontext),
    "tf32": (torch.float32, tf32.EmulatedTF32),
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
}


def left_out(model: nn.Module, inputs: Tensor) -> set[str]:
    """The layers that a rule leaves alone, of those that it might prune."""
    sets = set(Pruning(model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs).masks)
    layers = {name for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))}
    return layers - sets


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("fixed", [False, True])
def test_what_mixes_channels_is_found(arithmetic: str, fixed: bool) -> None:
    dtype, mode = ARITHMETIC[arithmetic]
    torch.manual_seed(0)
    model = Fixed(Mixes(), dtype) if fixed else Mixes().to(dtype)
    prefix = "model." if fixed else ""
    with mode():
        assert left_out(model, zoo.images(8).to(dtype)) == {f"{prefix}mixed", f"{prefix}last"}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", ["groupnorm", "vit_b_16", "resnet18"])
def test_a_model_without_a_float64_form_is_pruned_whatever_its_rounding(name: str, arithmetic: str) -> None:
    if name == "resnet18" and arithmetic != "tf32":
        pytest.skip("the others are quicker")
    dtype, mode = ARITHMETIC[arithmetic]
    model, inputs = network(name)
    expected = set(Pruning(model, HALF, example_inputs=inputs).masks)
    fixed = Fixed(model, dtype)
    assert not Comparison(fixed, inputs).outputs().exact
    with mode():
        pruner = Pruning(fixed, HALF, example_inputs=inputs)
        pruner.prune(fixed, 0)
    assert set(pruner.masks) == {f"model.{one}" for one in expected}
    assert pruner.channel_pruner.removed


def test_a_mistake_smaller_than_float32_rounds_is_found() -> None:
    torch.manual_seed(0)
    assert "mixed" in left_out(Mixes(1e-8), zoo.images(8))
    assert "mixed" not in left_out(Mixes(0.0), zoo.images(8))


class Cancels(nn.Module):
    """Activations near 1 cancel: what is left of them in the outputs is a millionth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 3)
        with torch.no_grad():
            self.first.weight.mul_(1e-6)
            self.first.bias.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x))
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("fixed", [False, True])
def test_outputs_that_are_what_cancellation_leaves_are_no_mistake(fixed: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Cancels(), torch.randn(4, 6)
    model = Fixed(model) if fixed else model
    assert left_out(model, inputs) == {"model.last" if fixed else "last"}


class Keeps(nn.Module):
    """Tied and plain tensors, a list of parameters, a cache that forward fills, a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)
        self.b.weight = self.a.weight
        self.plain, self.cache, self.calls = torch.ones(4), {}, []
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        assert self.a.weight is self.b.weight
        self.cache["x"] = x
        self.calls.append(x)
        self.late = x
        self.seen += 1
        made: Tensor = self.rnn(self.b(self.a(x)) * self.plain + self.seen)[0]
        return made


def test_float64_is_lent_and_leaves_no_trace() -> None:
    model, inputs = Keeps(), torch.randn(3, 2, 4)
    before = {id(one): dict(vars(one)) for one in model.modules()}
    values = {name: (one, one.clone()) for name, one in model.state_dict(keep_vars=True).items()}
    comparing = Comparison(model, inputs)
    found = comparing.outputs()
    assert found.exact
    assert found.tensors[0].dtype is torch.float64
    for module in model.modules():
        assert vars(module).keys() == before[id(module)].keys()
        assert all(value is before[id(module)][name] for name, value in vars(module).items())
    for name, one in model.state_dict(keep_vars=True).items():
        assert one is values[name][0]
        assert torch.equal(one, values[name][1])
    assert (model.cache, model.calls) == ({}, [])
    assert torch.allclose(outputs_of(model, comparing.inputs)[0], found.tensors[0].float(), atol=1e-6)


def test_it_is_given_back_when_the_model_fails() -> None:
    model = nn.Linear(4, 4)
    weight = model.weight
    with pytest.raises(ModelError, match="rejects inputs"):
        Comparison(model, torch.randn(2, 5)).outputs()
    assert model.weight is weight
    comparing = Comparison(model, torch.randn(2, 5))
    with pytest.raises(ModelError):
        comparing.outputs()
    assert comparing.exact, "it was not float64 that the model could not do"


def test_without_memory_for_float64_the_own_dtype_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    monkeypatch.setattr(precision, "_free_memory", lambda: 100.0)
    assert not Comparison(model, inputs).outputs().exact

    class Full(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise torch.OutOfMemoryError("no memory left")
            return super().forward(x)

    monkeypatch.undo()
    assert not Comparison(Full(4, 4), inputs).outputs().exact
    assert Comparison(model, inputs).outputs().exact


class Chance(nn.Module):
    """Draws random numbers whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(nn.functional.dropout(self.a(x), 0.5, training=True))


class OwnChance(Chance):
    """Draws from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.f(x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype))


class Reparametrised(Chance):
    """Noise on the input, and a hidden layer that is sampled."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x + 0.1 * torch.randn_like(x))
        return self.f(x + torch.randn(x.shape, dtype=x.dtype) * x.abs().sqrt())


class MixesByChance(Chance):
    """Draws random numbers, and weighs channels by their number."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.a(x), 0.5, training=True)
        return self.f(x * torch.arange(1, 1 + x.shape[1], dtype=x.dtype))


@pytest.mark.parametrize(
    ("kind", "left", "told"),
    [
        (Chance, {"f"}, False),
        (Reparametrised, {"f"}, False),
        (OwnChance, {"f"}, True),
    ],
)
def test_chance_is_not_called_a_mistake(
    kind: type[nn.Module], left: set[str], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, inputs = kind(), torch.randn(4, 6)
    with caplog.at_level(logging.WARNING):
        assert left_out(model, inputs) == left
    assert ("nothing can be compared but shapes" in caplog.text) is told
    pruner = Pruning(model, HALF, example_inputs=inputs)
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed and model.a.out_features == 8


def test_a_mistake_beside_chance_is_found() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="a: removed, some of it would leave another model"):
        Pruning(MixesByChance(), HALF, example_inputs=torch.randn(4, 6))


def settings() -> dict[str, Any]:
    """Everything global that a comparison might have to do with."""
    found = {
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "rng": torch.get_rng_state().tolist(),
    }
    if hasattr(torch.backends, "fp32_precision"):
        places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        onednn = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn)
        found["new"] = [one.fp32_precision for one in (*places, *onednn)]
    return found


def products() -> str:
    """How float32 matrices are multiplied on the CPU at the moment."""
    if hasattr(torch.backends, "fp32_precision"):
        return str(torch.backends.mkldnn.matmul.fp32_precision)
    return {"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "bf16")


class Watches(nn.Linear):
    """Remembers how float32 matrices were multiplied when it ran."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(products())
        return super().forward(x)


SEEN: list[str] = []


@pytest.fixture
def coarse() -> Any:
    """float32 products in lower precision, as a user may have asked for."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("make", [Mixes, lambda: Fixed(Mixes()), Chance])
def test_settings_are_those_of_the_user(make: Callable[[], nn.Module]) -> None:
    model = make()
    inputs = torch.randn(2, 6) if isinstance(model, Chance) else zoo.images(8)
    before = settings()
    comparing = Comparison(model, inputs)
    first = comparing.outputs()
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    comparing.verdict(first, comparing.outputs())
    assert settings() == before


@pytest.mark.usefixtures("coarse")
def test_what_others_are_compared_with_is_computed_in_float32(tmp_path: Any) -> None:
    model, inputs = Watches(), torch.randn(2, 4)
    before = settings()
    for run in (
        lambda model, x: scores(model, x),
        lambda model, x: export.export_onnx(model, x, tmp_path / "m.onnx", exporter="torchscript"),
        lambda model, x: export_program(model, x, tmp_path / "m.pt2"),
        lambda model, x: Comparison(Fixed(model), x).outputs(),
    ):
        SEEN.clear()
        run(model, inputs)
        assert "ieee" in SEEN
    assert settings() == before


@pytest.mark.parametrize(
    ("expected", "actual", "gap", "scale"),
    [
        ([1.0, -4.0], [1.5, -4.0], 0.5, 4.0),
        ([1.0, float("nan")], [1.0, 3.0], float("inf"), 1.0),
        ([1.0, float("-inf")], [1.0, float("-inf")], 0.0, 1.0),
        ([1.0, 2.0], [1.0, float("nan")], float("inf"), 2.0),
        ([1.0, 2.0], [1.0, float("inf")], float("inf"), 2.0),
        ([1.0, 2.0], [1.0], float("inf"), 0.0),
        ([float("inf")], [0.0], float("inf"), 0.0),
        ([], [], 0.0, 0.0),
    ],
)
def test_gaps(expected: list[float], actual: list[float], gap: float, scale: float) -> None:
    assert comparison.gap_of(torch.tensor(expected), torch.tensor(actual)) == (gap, scale)


class Limits(nn.Module):
    """Weighs channels by their number, and puts minus infinity into one place of its output, as masks of scores do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.f(x * torch.arange(1, 1 + x.shape[1], dtype=x.dtype))
        return torch.where(torch.arange(3) == 2, -torch.inf, x)


def test_one_infinity_does_not_hide_a_mistake() -> None:
    with pytest.raises(ModelError, match="a: removed, some of it would leave another model"):
        Pruning(Limits(), HALF, example_inputs=torch.randn(4, 6))


class Shuffles(nn.Module):
    """Without biases, and with a channel shuffle written by hand: an example of zeros shows nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        same = {"kernel_size": 3, "padding": 1, "bias": False}
        self.a, self.b = nn.Conv2d(3, 16, **same), nn.Conv2d(16, 16, **same)
        self.c, self.o = nn.Conv2d(16, 16, groups=2, **same), nn.Conv2d(16, 3, **same)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        return self.o(self.c(x).relu())


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.rand(2, 3, 8, 8) * 1e-6])
def test_examples_that_show_nothing_are_replaced(example: Tensor) -> None:
    torch.manual_seed(0)
    model, images = Shuffles(), torch.randn(4, 3, 8, 8)
    pruner = Pruning(model, HALF, example_inputs=example)
    seen: dict[str, Tensor] = {}
    pruner.before_removal = lambda: seen.update(masked=outputs_of(model, images)[0])
    pruner.prune(model, 0)
    removed = outputs_of(model, images)[0]
    assert pruner.channel_pruner.removed
    assert float((seen["masked"] - removed).abs().max()) <= 1e-5 * float(removed.abs().max())


def test_probes_keep_what_means_something() -> None:
    numbers, switches = torch.arange(6), torch.tensor([0.0, 1.0, 1.0])
    endless, single = torch.tensor([0.0, -torch.inf]), torch.tensor(0.5)
    given = {"ids": numbers, "mask": (switches, endless), "time": single, "image": torch.rand(2, 3) * 4 - 1}
    found = probes_of(given)
    assert found["ids"] is numbers and found["mask"][0] is switches and found["mask"][1] is endless
    assert found["time"] is single
    image = found["image"]
    assert image.shape == (2, 3) and not torch.equal(image, given["image"])
    assert given["image"].min() <= image.min() and image.max() <= given["image"].max()
    assert float(probes_of(torch.zeros(64)).std()) > 0.5
    assert probes_of(torch.rand(4, dtype=torch.float16)).dtype is torch.float16


class Picky(nn.Module):
    """Takes no values but those of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != 2).any()):
            raise ValueError("twos, please")
        return self.f(self.a(x).relu())


def test_a_model_that_rejects_random_inputs_gets_the_example() -> None:
    model = Picky()
    pruner = Pruning(model, HALF, example_inputs=torch.full((2, 6), 2.0))
    pruner.prune(model, 0)
    assert pruner.channel_pruner.removed


def test_outputs_that_are_constant_are_said_to() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].weight.zero_()
    comparing = Comparison(model, torch.randn(2, 4))
    first = comparing.outputs()
    assert comparing.verdict(first, comparing.outputs()) == comparison.Verdict(0.0, False)


def test_outputs_that_tell_nothing_are_said_to() -> None:
    model, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    comparing = Comparison(model, inputs)
    first = comparing.outputs()
    assert comparing.verdict(first, comparing.outputs()) == comparison.Verdict(0.0, True)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    nothing = comparing.outputs()
    assert comparing.verdict(nothing, nothing) == comparison.Verdict(0.0, False)
    assert comparing.verdict(first, nothing).difference == 1.0
    assert comparing.verdict(nothing, first).difference > 1e100
    wider = nn.Linear(4, 5)
    assert Comparison(wider, inputs).verdict(Comparison(wider, inputs).outputs(), first).difference == float("inf")


@pytest.mark.parametrize(
    ("mode", "dtype", "least", "most"),
    [
        (nullcontext, torch.float32, 1e-8, 1e-6),
        (tf32.EmulatedTF32, torch.float32, 1e-4, 1e-3),
        (nullcontext, torch.bfloat16, 5e-4, 5e-3),
        (nullcontext, torch.float64, 0.0, 1e-14),
    ],
)
def test_the_error_of_products_is_measured(mode: Any, dtype: torch.dtype, least: float, most: float) -> None:
    with mode():
        assert least <= precision.product_error(torch.device("cpu"), dtype) <= most


@pytest.mark.parametrize("axis", [1, -1])
def test_the_axis_of_a_norm_is_seen_in_half_precision(axis: int) -> None:
    class Images(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(axis, -1)).movedim(-1, axis)

    torch.manual_seed(0)
    norm, x = Images(8).to(torch.bfloat16), torch.randn(2, 8, 5, 8).to(torch.bfloat16)
    nn.init.normal_(norm.weight)
    hook = KeptLayerNorm(norm, x.device)
    output = norm(x)
    assert torch.allclose(hook(norm, (x,), output).float(), output.float(), atol=0.1)
    assert hook.axis == axis
