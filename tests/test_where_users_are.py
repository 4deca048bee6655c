"""Trainings that public bug reports are about: other optimizers, precisions, wrappers, interrupts and copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_books import CHANNELS, INPUTS, RULES, assert_masked, begun, build, masked, step
from torch import Tensor, nn

from pruningawaretraining import Pruning, save_pruned
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.models import surgery
from pruningawaretraining.models.calling import outputs_of

NOW = {**RULES["channel"], "end": 0}


# --- one pruner after another ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["slice", "4x1", "2:4", "unstructured"])
def test_channels_after_zeros_that_are_finished(pattern: str) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = Pruning(model, {"rules": [{**RULES[pattern], "end": 0}]}, example_inputs=INPUTS, optimizer=optimizer)
    first.prune(model, 0)
    step(model, optimizer)
    first.on_train_end()
    second = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=optimizer)
    assert second.prune(model, 0) == "removed"
    zeros = {name: one == 0 for name, one in model.named_parameters() if one.dim() > 1}
    assert sum(int(one.sum()) for one in zeros.values()) > 0
    for _ in range(3):
        step(model, optimizer)
    assert_masked(first, model)
    for name, gone in zeros.items() if pattern in ("2:4", "unstructured") else ():  # others cross their blocks
        assert not bool(model.get_parameter(name)[gone].any()), name
    assert first.sparsity > 0 and first.report().phase == "done"


# --- optimizers -----------------------------------------------------------------------------------------------------


class EightBit(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: codes of a parameter's shape, and a scale for each block of them."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                state = self.state[one]
                if not state:
                    state["step"] = 0
                    state["state1"] = torch.full_like(one, 127, dtype=torch.uint8)
                    state["absmax1"] = torch.zeros(-(-one.numel() // 8))
                    state["qmap1"] = torch.linspace(-1, 1, 256)
                assert state["state1"].shape == one.shape and len(state["absmax1"]) == -(-one.numel() // 8)
                one.sub_(one.grad, alpha=group["lr"])
                state["step"] += 1
                state["state1"].fill_(200)


@pytest.mark.parametrize("pattern", RULES)
def test_codes_of_eight_bits_are_left_or_cleared(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = EightBit(model.parameters())
    pruner = Pruning(model, {"rules": [{**RULES[pattern], "end": 3}]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(5):
        step(model, optimizer)
        pruner.prune(model, epoch)
        for state in optimizer.state.values():
            assert not state or bool((state["state1"] == 200).all())
    step(model, optimizer)
    if pattern == "channel":
        assert "starts afresh" in caplog.text
    else:
        assert_masked(pruner, model)


def in_backward(model: nn.Module) -> dict[Tensor, torch.optim.Optimizer]:
    """One optimizer for each parameter, stepped in the backward pass."""
    optimizers: dict[Tensor, torch.optim.Optimizer] = {
        one: torch.optim.SGD([one], lr=0.01, momentum=0.9) for one in model.parameters()
    }

    def hook(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for one in model.parameters():
        one.register_post_accumulate_grad_hook(hook)
    return optimizers


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("pattern", RULES)
def test_optimizers_that_step_in_the_backward_pass(pattern: str, given: bool) -> None:
    model = build()
    optimizers = in_backward(model)
    handed = list(optimizers.values()) if given else None
    pruner = Pruning(model, {"rules": [RULES[pattern]]}, example_inputs=INPUTS, optimizer=handed)
    for epoch in range(6):
        pruner.prune(model, epoch)
        for _ in range(2):
            model(INPUTS).square().mean().backward()
            if pruner.sparsity:
                assert_masked(pruner, model)
    assert pruner.sparsity > 0
    assert pruner.steps == 12
    for masks in pruner.engine.masks:
        for member, keep_W in masks.grouping.expand(masks.keep_G.float(), 1.0):
            momentum = optimizers[member.parameter].state[member.parameter]["momentum_buffer"]
            assert not bool(momentum[(keep_W == 0).expand(momentum.shape)].any()), member.name


READ = "reads the gradients of whole steps"


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"criterion": "taylor"}, "r.criterion: 'taylor'"),
        ({"criterion": "snip_momentum"}, "r.criterion: 'snip_momentum'"),
        ({"criterion": "movement", "pattern": "unstructured"}, "r.criterion: 'movement'"),
        ({"criterion": "retrain_free"}, "r.criterion: 'retrain_free'"),
        ({"criterion": "magnitude", "pattern": "unstructured", "dynamic": "regrow"}, "r.dynamic: 'regrow'"),
        ({"criterion": "magnitude"}, None),
        ({"criterion": "wanda", "pattern": "2:4"}, None),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_reads_gradients_is_named_where_they_are_gone(
    rule: dict[str, Any], named: str | None, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizers = list(in_backward(model).values()) if inside else [torch.optim.SGD(model.parameters(), lr=0.01)]
    pruner = Pruning(model, {"rules": [{**CHANNELS, **rule}]}, example_inputs=INPUTS, optimizer=optimizers)
    for epoch in range(3):
        for _ in range(2):
            model(INPUTS).square().mean().backward()
            for one in () if inside else optimizers:
                one.step()
        pruner.prune(model, epoch)
    assert caplog.text.count(READ) == (inside and named is not None)
    assert named is None or not inside or f"{named} {READ}" in caplog.text


def test_a_removal_names_optimizers_that_are_found_by_their_parameter() -> None:
    model = build()
    optimizers = in_backward(model)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=list(optimizers.values()))
    model(INPUTS).square().mean().backward()
    shapes = [one.shape for one in model.parameters()]
    with pytest.raises(ModelError, match=r"removal: hooks step one optimizer for each parameter.*after_removal"):
        pruner.prune(model, 0)
    assert [one.shape for one in model.parameters()] == shapes

    def follow() -> None:
        known = list(optimizers.values())
        optimizers.clear()
        optimizers.update({one.param_groups[0]["params"][0]: one for one in known})

    pruner.after_removal = follow
    pruner.remove()
    assert [one.shape for one in model.parameters()] != shapes
    before = [one.weight.detach().clone() for one in (model[0], model[2][0], model[4])]
    model(INPUTS).square().mean().backward()
    after = [one.weight for one in (model[0], model[2][0], model[4])]
    assert all(bool((one != old).any()) for one, old in zip(after, before, strict=True))


class Wrapped:
    """A wrapper that is no optimizer and calls the one inside by a name of its own."""

    def __init__(self, inner: Any, name: str) -> None:
        self.calls = 0
        setattr(self, name, inner)
        self._name = name

    def step(self) -> None:
        self.calls += 1
        getattr(self, self._name).step()

    def zero_grad(self) -> None:
        getattr(self, self._name).zero_grad()


@pytest.mark.parametrize("name", ["optimizer", "optim", "base", "_inner_opt"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_by_any_name_is_looked_through(name: str, depth: int) -> None:
    model = build()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    outer: Any = inner
    for _ in range(depth):
        outer = Wrapped(outer, name)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=outer)
    step(model, outer)
    assert pruner.steps == 1
    assert pruner.prune(model, 0) == "removed"
    assert {id(one) for one in inner.param_groups[0]["params"]} == {id(one) for one in model.parameters()}
    assert all(inner.state[one]["momentum_buffer"].shape == one.shape for one in model.parameters())


def test_a_wrapper_around_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer: .*Wrapped"):
        Pruning(build(), {"rules": [NOW]}, example_inputs=INPUTS, optimizer=Wrapped(3, "optimizer"))  # type: ignore[arg-type]


# --- quantization-aware training in eager mode ----------------------------------------------------------------------


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.first, self.norm, self.relu = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.relu(self.norm(self.first(self.quant(x)))))
        out: Tensor = self.dequant(self.last(x.flatten(1)))
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
def test_eager_quantization_aware_training(fused: bool) -> None:
    model = Quantized().train()
    if fused:
        torch.ao.quantization.fuse_modules_qat(model, [["first", "norm", "relu"]], inplace=True)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, optimizer)
    pruner = Pruning(model, {"rules": [{**NOW, "end": 1}]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in (0, 1):
        pruner.prune(model, epoch)
        step(model, optimizer)
    assert model.second.out_channels < 8 and model.last.in_features < 32
    for name, module in model.named_modules():
        scale, weight = getattr(module, "scale", None), getattr(module, "weight", None)
        if isinstance(scale, Tensor):
            assert bool(torch.isfinite(scale).all()), name
        if weight is not None and hasattr(module, "weight_fake_quant"):
            assert module.weight_fake_quant.scale.numel() in (1, len(weight)), name
    assert bool(torch.isfinite(model(INPUTS)).all())
    converted = torch.ao.quantization.convert(model.eval())
    assert bool(torch.isfinite(converted(INPUTS)).all())


# --- inference mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", RULES)
def test_a_prune_inside_inference_mode(pattern: str) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruning(model, {"rules": [{**RULES[pattern], "end": 3}]}, optimizer=optimizer)
    with torch.inference_mode():
        model(INPUTS)
    for epoch in range(5):
        with torch.inference_mode():
            assert bool(torch.isfinite(model(INPUTS)).all())
            pruner.prune(model, epoch)
            pruner.report()
        step(model, optimizer)
    assert pruner.phase == "finetune"
    assert not any(one.is_inference() for one in model.parameters())
    if pattern != "channel":
        assert_masked(pruner, model)


# --- copies and pickles while something listens ---------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["groupnorm", "shapes"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda", "random"])
@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_a_model_is_pickled_and_copied_while_it_is_pruned(pattern: str, criterion: str, architecture: str) -> None:
    model, inputs = zoo.architecture(architecture)[:2]
    rule = {**RULES[pattern], "criterion": criterion, "start": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=inputs, optimizer=optimizer)
    for epoch in range(4):
        optimizer.zero_grad()
        sum(one.square().mean() for one in _tensors(model(inputs))).backward()
        optimizer.step()
        pruner.prune(model, epoch)
    assert pruner.engine.masks[0].active
    expected = outputs_of(model, inputs)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for one, mine in zip(outputs_of(other, inputs), expected, strict=True):
            assert torch.equal(one, mine)
        sum(one.square().mean() for one in _tensors(other(inputs))).backward()


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def test_a_model_whose_inputs_are_awaited_is_pickled() -> None:
    model = build()
    pruner = Pruning(model, {"rules": [NOW]})
    other = pickle.loads(pickle.dumps(model))
    other(INPUTS)
    assert pruner.phase == "regularize"
    model(INPUTS)
    assert pruner.prune(model, 0) == "removed"


# --- adapters put on later ------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A layer with a low-rank adapter beside it, as PEFT wraps one."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        base_layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


@pytest.mark.parametrize("pattern", RULES)
def test_an_adapter_that_is_put_on_after_the_pruner(pattern: str, tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, {"rules": [RULES[pattern]]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(6):
        pruner.prune(model, epoch)
    base = model[4]
    model[4] = Adapter(base)
    if pattern == "channel":
        with pytest.raises(ModelError, match=r"4\.weight: .* 4\.base_layer\.weight.* Allowed: .*merge"):
            pruner.remove()
        pruner.on_train_end()
    else:
        pruner.prune(model, 9)
        pruner.report()
        gone = base.weight == 0
        with torch.no_grad():
            base.weight.fill_(1.0)
        pruner.apply_masks()
        assert not bool(base.weight[gone].any()) and bool(base.weight.any())


# --- all or nothing -------------------------------------------------------------------------------------------------


class Interrupted:
    """Raises at the n-th change of a removal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
        self.count, self.error, self.at = 0, error, at
        for name in ("set_attribute", "set_item", "rename_key", "drop_key"):
            monkeypatch.setattr(surgery.Surgery, name, self._counting(getattr(surgery.Surgery, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise self.error
            return real(*args)

        return change


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruning) -> Iterator[Any]:
    yield {name: (tuple(one.shape), float(one.double().sum())) for name, one in model.state_dict().items()}
    yield [(name, getattr(one, "out_channels", None)) for name, one in model.named_modules()]
    yield [[id(one) for one in group["params"]] for group in optimizer.param_groups]
    yield sorted((id(one), float(state["momentum_buffer"].double().sum())) for one, state in optimizer.state.items())
    yield (pruner.sparsity, pruner.macs, pruner.report().to_dict())
    yield {name: keep.tolist() for name, keep in pruner.masks.items()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_an_interrupt_in_the_middle_of_a_removal_changes_nothing(error: BaseException) -> None:
    pruner = begun("channel")[2]
    with pytest.MonkeyPatch.context() as patch:
        counted = Interrupted(patch, error, -1)
        pruner.remove()
        changes = counted.count
    assert changes >= 10
    for at in (1, 2, changes // 3, changes // 2, changes - 1, changes):
        model, optimizer, pruner = begun("channel")
        before = list(state_of(model, optimizer, pruner))
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, error, at)
            with pytest.raises(type(error)):
                pruner.remove()
        assert list(state_of(model, optimizer, pruner)) == before
        step(model, optimizer)
        assert_masked(pruner, model)
        pruner.remove()
        assert pruner.report().masked == 0 and model[0].out_channels < 8
        step(model, optimizer)


@pytest.mark.parametrize("place", ["follow_removal", "forget_compiled", "after_removal"])
def test_an_interrupt_after_the_removal_leaves_pruner_and_model_of_one_mind(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, pruner = begun("channel")
    before = list(state_of(model, optimizer, pruner))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "follow_removal":
            patch.setattr(type(pruner.channel_pruner), place, interrupt)
        elif place == "forget_compiled":
            patch.setattr("pruningawaretraining.engine.removal.forget_compiled", interrupt)
        else:
            pruner.after_removal = interrupt
        with pytest.raises(KeyboardInterrupt):
            pruner.remove()
        pruner.after_removal = lambda: None
    if place == "after_removal":  # it has happened, and all know it
        assert pruner.report().masked == 0 and model[0].out_channels < 8
    else:
        assert list(state_of(model, optimizer, pruner)) == before
    step(model, optimizer)
    pruner.remove()
    assert pruner.report().masked == 0 and model[0].out_channels < 8
    step(model, optimizer)


# --- what a forward pass raises -------------------------------------------------------------------------------------


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.first, self.second, self.error = nn.Linear(4, 8), nn.Linear(8, 4), error
        self.armed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise self.error
        out: Tensor = self.second(self.first(x))
        return out


def test_a_key_that_a_forward_pass_misses_is_about_the_inputs() -> None:
    said = r"example_inputs: Raising rejects .* \[\(1, 4\)\]: its forward pass raised KeyError: 'pixel_values'\. "
    with pytest.raises(ModelError, match=said):
        Pruning(Raising(KeyError("pixel_values")), {"rules": [NOW]}, example_inputs=torch.randn(1, 4))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_memory_that_is_full_is_not_about_the_inputs(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as caught:
        Pruning(Raising(error), {"rules": [NOW]}, example_inputs=torch.randn(1, 4))
    assert caught.value is error


# --- averages that nobody mentioned ---------------------------------------------------------------------------------


class Keeper:
    """An average that is no module, as timm's first one and ultralytics' are not."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model)

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            for mine, other in zip(self.ema.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.5)


class Averaged(torch.optim.swa_utils.AveragedModel):
    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


class Loop:
    """A trainer that has the average among its attributes."""

    def __init__(self, model: nn.Module, average: Callable[[nn.Module], Any]) -> None:
        self.model, self.ema = model, average(model)


@pytest.mark.parametrize("average", [Averaged, Keeper])
@pytest.mark.parametrize("place", ["a variable", "an attribute", "made later"])
@pytest.mark.parametrize("pattern", ["channel", "2:4"])
def test_a_forgotten_average_is_found_and_follows(pattern: str, place: str, average: Any) -> None:
    model = build()
    loop = Loop(model, average) if place == "an attribute" else None
    ema = average(model) if place == "a variable" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rule = {**RULES[pattern], "end": 3}
    pruner = Pruning(model, {"rules": [rule]}, example_inputs=INPUTS, optimizer=optimizer)
    ema = average(model) if place == "made later" else ema
    own = loop.ema if loop is not None else ema
    for epoch in range(5):
        pruner.prune(model, epoch)
        step(model, optimizer)
        own.update(model)
        inner = getattr(own, "ema", None) or own.module
        assert {name: one.shape for name, one in inner.named_parameters()} == {
            name: one.shape for name, one in model.named_parameters()
        }
        if pattern == "2:4":
            assert_masked(pruner, inner)
    assert (model[0].out_channels < 8) == (pattern == "channel")
    assert pruner._session.followers == [inner if average is Keeper else own]


class Awkward:
    """Has ``update``, and an attribute that cannot be read."""

    def update(self) -> None: ...

    @property
    def module(self) -> nn.Module:
        raise RuntimeError("not set up yet")


def test_what_is_no_average_does_not_follow() -> None:
    """A teacher, a best copy, a wrapper of the model itself, an average of another model; nothing of them is called."""
    model = build()
    teacher, best = build(), copy.deepcopy(model)
    wrapped, other = nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(nn.Linear(3, 3))
    awkward, dead = Awkward(), weakref.proxy(Awkward())
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS)
    pruner.prune(model, 0)
    assert pruner._session.followers == []
    assert teacher[0].out_channels == best[0].out_channels == 8 and model[0].out_channels < 8
    assert wrapped.module is model and other.module.in_features == 3
    assert "update" in dir(awkward) and type(dead) is weakref.ProxyType


def test_averages_of_other_models_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A twin with a pruner of its own, from the same weights; a model of other weights; two that look alike."""
    model, twin, stranger = build(), build(), build()
    torch.manual_seed(7)
    for module in stranger.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    of_twin, of_stranger = Averaged(twin), Keeper(stranger)
    other = Pruning(twin, {"rules": [NOW]}, example_inputs=INPUTS, ema=of_twin)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS)
    pruner.prune(model, 0)
    assert pruner._session.followers == [] and of_twin.module[0].out_channels == of_stranger.ema[0].out_channels == 8
    other.prune(twin, 0)
    assert of_twin.module[0].out_channels == twin[0].out_channels < 8
    again = build()
    one, two = Averaged(again), Keeper(again)
    Pruning(again, {"rules": [NOW]}, example_inputs=INPUTS).prune(again, 0)
    assert one.module[0].out_channels == two.ema[0].out_channels == 8
    assert "Averaged, Keeper look like averages of the model, and none follows it" in caplog.text


def test_an_average_that_cannot_be_found_is_named_by_the_removal(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS, optimizer=optimizer)
    hidden = {torch.optim.swa_utils.AveragedModel(model)}  # nothing says which of a set is meant
    pruner.prune(model, 0)
    assert "1 copy of the model made since" in caplog.text and "attach_ema" in caplog.text
    del hidden


def test_copies_that_are_gone_or_known_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    pruner = Pruning(model, {"rules": [NOW]}, example_inputs=INPUTS)
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner.attach_ema(average)
    copy.deepcopy(model)
    gc.collect()
    pruner.prune(model, 0)
    assert "made since" not in caplog.text
    average.update_parameters(model)


# --- what holds today -----------------------------------------------------------------------------------------------


def test_a_gradient_scaler_skips_steps_and_masks_hold() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pruner = Pruning(model, {"rules": [RULES["2:4"]]}, example_inputs=INPUTS, optimizer=optimizer)
    for epoch in range(6):
        pruner.prune(model, epoch)
        optimizer.zero_grad()
        loss = model(INPUTS).square().mean() * (float("inf") if epoch == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if pruner.sparsity:
            assert_masked(pruner, model)
    assert pruner.steps == 5


def test_saving_says_nothing_of_generators(tmp_path: Path) -> None:
    model, _, pruner = begun("channel")
    before = torch.get_rng_state()
    pruner.report()
    save_pruned(model, tmp_path / "m.safetensors")
    pruner.apply_masks()
    pruner.on_train_end()
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(len(one) for _, one in masked(pruner, model)) > 0
