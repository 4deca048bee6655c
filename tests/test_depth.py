"""Whole residual blocks as groups: which are, that the removed model is the masked one, and which block goes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from attention_models import IDS, TRACED_MASK, build
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning, count_macs, export_onnx, load_pruned, one_shot, save_pruned
from pruningawaretraining.checkpoint.files import read_file
from pruningawaretraining.config.schema import Rule
from pruningawaretraining.criteria.second_order.gradients import Calibration
from pruningawaretraining.errors import CheckpointError, ConfigError, ModelError
from pruningawaretraining.models.calling import call, outputs_of
from pruningawaretraining.models.optimizer_state import follow
from pruningawaretraining.models.skipped_blocks import PassThrough
from pruningawaretraining.models.surgery import Surgery
from pruningawaretraining.models.trees import float_tensors_of
from pruningawaretraining.patterns.depth import find_blocks
from pruningawaretraining.registry import build as registered
from pruningawaretraining.registry import names
from pruningawaretraining.session.plan import plan

WIDTH, IDLE = 8, 1


class Residual(nn.Module):
    """Pre-norm (or post-norm) MLP block; ``form`` says what it hands on."""

    def __init__(self, post: bool = False, form: int = 0, width: int = WIDTH) -> None:
        super().__init__()
        self.post, self.form = post, form
        self.up, self.down, self.norm = nn.Linear(width, 16), nn.Linear(16, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        mixed = self.down(functional.relu(self.up(x if self.post else self.norm(x)))) * scale
        out = self.norm(x + mixed) if self.post else x + mixed
        return (out, *([None] * (self.form - 1))) if self.form else out


class Stack(nn.Module):
    """Blocks called with keywords, which may hand on tuples."""

    def __init__(self, blocks: int = 4, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Residual(**options) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            out = block(scale=0.5, x=x)
            x = out[0] if isinstance(out, tuple) else out
        return self.last(x)


def stack(**options: Any) -> tuple[nn.Module, Tensor]:
    """A stack whose second block does almost nothing, though its weights are the largest."""
    torch.manual_seed(0)
    model = Stack(**options)
    with torch.no_grad():
        model.blocks[IDLE].up.weight.mul_(9)
        model.blocks[IDLE].down.weight.zero_()
        model.blocks[IDLE].down.bias.fill_(1e-3)
    return model, torch.randn(6, 4)


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval(), torch.randn(2, 3, 32, 32)


MODELS: dict[str, Any] = {
    "resnet": resnet,
    "pre-norm": stack,
    "post-norm": lambda: stack(post=True),
    "tuples": lambda: stack(form=3),
    **{
        name: functools.partial(build, name)
        for name in ("timm_vit", "timm_swin", "bert", "llama", "gpt2", "swin", "t5")
    },
}


def pruner_of(model: nn.Module, inputs: Any, optimizer: Any = None, ema: Any = None, **rule: Any) -> Pruning:
    rule = {"pattern": "depth", "target": {"sparsity": 0.5}, **rule}
    return Pruning(model, {"rules": [rule]}, example_inputs=inputs, optimizer=optimizer, ema=ema)


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    scale = max(float(one.abs().max()) for one in first)
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True)) / scale


@pytest.mark.parametrize("name", MODELS)
def test_masked_equals_removed_and_analytic_costs_equal_counted_ones(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    model.eval()
    dense = copy.deepcopy(model)
    before = outputs_of(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner = pruner_of(model, inputs, optimizer, average, start=1)
    assert largest_difference(before, outputs_of(model, inputs)) == 0.0
    engine = pruner.channel_pruner
    _step(model, inputs, optimizer)
    engine.keep_D = torch.arange(engine.found.grouping.size) % 2 == 1
    engine.masks.set(engine.keep_D)
    masked_rows, macs = pruner.report().layers, engine.macs_cost(engine.keep_D)
    parameters = engine.parameters_cost(engine.keep_D)
    _masked_weights_stay_zero(pruner, model, inputs, optimizer)
    masked = outputs_of(model, inputs)
    assert largest_difference(before, masked) > 1e-3
    pruner.remove()
    assert 0 < pruner.sparsity < 1
    assert largest_difference(masked, outputs_of(model, inputs)) <= 1e-6
    assert macs == pytest.approx(count_macs(model, inputs), abs=0.5) and macs < engine.macs_cost.dense
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    gone = [block for block, keep in zip(engine.dense_sets[0].layers, engine.keep_D, strict=True) if not keep]
    assert [key for key, one in model.named_modules() if isinstance(one, PassThrough)] == gone != []
    rows = pruner.report().layers
    for left, right in zip(masked_rows, rows, strict=True):
        assert {**left, "parameters": 0} == {**right, "parameters": 0}
    assert [row["name"] for row in rows if row["kept_out"] == 0] == [
        row["name"] for row in rows if row["name"].startswith(tuple(f"{one}." for one in gone))
    ]
    known = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert known == {id(one) for one in model.parameters()}
    assert {id(one) for one in optimizer.state} <= known
    assert [one.shape for one in average.module.parameters()] == [one.shape for one in model.parameters()]
    assert _step(model, inputs, optimizer) > 0.7
    average.update_parameters(model)
    model.eval()
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(dense, tmp_path / "model.safetensors").eval()
    assert largest_difference(outputs_of(model, inputs), outputs_of(loaded, inputs)) == 0.0


def _step(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer) -> float:
    """One step; the fraction of the parameters that it has moved."""
    model.train()
    before = [one.detach().clone() for one in model.parameters()]
    optimizer.zero_grad()
    sum(one.square().mean() for one in float_tensors_of(call(model, inputs))).backward()
    optimizer.step()
    model.eval()
    moved = [bool((one != two).any()) for one, two in zip(before, model.parameters(), strict=True)]
    return sum(moved) / len(moved)


def _masked_weights_stay_zero(pruner: Pruning, model: nn.Module, inputs: Any, optimizer: Any) -> None:
    _step(model, inputs, optimizer)
    masks = pruner.channel_pruner.masks
    expanded = masks.grouping.expand(masks.keep_G.float(), 1.0)
    masked = [member for member, keep_W in expanded if bool((keep_W == 0).any())]
    assert masked and all(not bool(member.parameter.any()) for member in masked)


def test_a_mac_target_is_met_and_no_block_could_be_given_back() -> None:
    model, inputs = resnet()
    pruner = pruner_of(model, inputs, start=0, end=9, target={"macs": 0.7})
    masked = []
    for epoch in range(10):
        pruner.prune(epoch=epoch)
        masked.append(int((~pruner.masks["layer1.0"]).sum()))
    engine = pruner.channel_pruner
    assert masked == sorted(masked) and pruner.phase == "finetune" and pruner.macs.fraction <= 0.7
    for group in torch.nonzero(~engine.keep_D).flatten().tolist():
        more = engine.keep_D.clone()
        more[group] = True
        assert engine.macs_cost(more) > 0.7 * engine.macs_cost.dense
    assert pruner.describe_sets()[0]["kept"] == 5 - masked[-1]


def test_blocks_of_a_resnet_are_those_that_keep_the_shape() -> None:
    model, inputs = resnet()
    pruner = pruner_of(model, inputs)
    assert list(pruner.channel_pruner.found.grouping.sets[0].layers) == [
        "layer1.0",
        "layer1.1",
        "layer2.1",
        "layer3.1",
        "layer4.1",
    ]
    assert set(pruner.channel_pruner.found.skipped) == {"layer2.0", "layer3.0", "layer4.0"}
    assert (
        "it changes the shape from (2, 64, 8, 8) to (2, 128, 4, 4)" in pruner.channel_pruner.found.skipped["layer2.0"]
    )
    chosen = pruner_of(resnet()[0], inputs, layers=["layer1", "layer3", "layer4"], exclude=["layer4.1"])
    assert list(chosen.channel_pruner.found.grouping.sets[0].layers) == ["layer1.0", "layer1.1", "layer3.1"]


def test_stages_are_no_blocks_and_what_has_no_residual_sum_is_none() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Residual()])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](self.inner[0](x))

    stage = nn.Sequential(Residual(), Residual(post=True))
    shared = Residual()
    other = Residual()
    other.up = shared.up
    often = Residual()
    model = nn.Sequential(stage, Plain(), nn.Sequential(Residual()), Twice(), shared, other, Residual(), often, often)
    found = find_blocks(model, torch.randn(2, WIDTH), {name for name, _ in model.named_modules()})
    assert list(found.grouping.sets[0].layers) == ["0.0", "0.1", "2.0", "3", "6"]
    assert found.skipped == {
        "0": "it is made of blocks, which go one by one",
        "1": "it does not add its input to what it computes",
        "2": "it is made of blocks, which go one by one",
        "4": "its up.weight is shared with another module",
        "5": "its up.weight is shared with another module",
        "7": "it runs 2 times on the example inputs",
    }


def test_the_block_that_changes_its_input_least_goes_however_large_it_is() -> None:
    model, inputs = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    pruner = pruner_of(model, inputs, optimizer, criterion="block_change", target={"sparsity": 0.25})
    model.train()
    x = model.first(inputs)
    seen = []
    for block in model.blocks:
        y = block(x=x, scale=0.5)
        seen.append(1 - functional.cosine_similarity(x, y, dim=-1).mean().item())
        x = y
    heard = pruner.engine.rules[0].feed.collector
    heard.own = {}  # what the lines above have shown it
    model(inputs)
    found = [float(heard.tensors()[f"block_change.blocks.{number}"]) for number in range(4)]
    assert found == pytest.approx(seen, abs=1e-6)
    _step(model, inputs, optimizer)
    pruner.prune(epoch=0)
    assert pruner.masks["blocks.0"].tolist() == [True, False, True, True]
    assert isinstance(model.blocks[IDLE], PassThrough) and not model.blocks[IDLE].post
    by_size, _ = stack()
    pruner_of(by_size, inputs, target={"sparsity": 0.25}).prune(epoch=0)
    assert not isinstance(by_size.blocks[IDLE], PassThrough), "by size it stays"


def test_images_are_compared_by_position() -> None:
    model, inputs = resnet()
    pruner = pruner_of(model, inputs, criterion="block_change")
    kept: dict[str, Any] = {}
    model.layer1[0].register_forward_hook(lambda module, args, output: kept.update(x=args[0], y=output))
    with torch.no_grad():
        model(inputs)
    expected = 1 - functional.cosine_similarity(kept["x"], kept["y"], dim=1).mean()
    heard = pruner.engine.rules[0].feed.collector.tensors()["block_change.layer1.0"]
    assert float(heard) == pytest.approx(float(expected), abs=1e-6) and heard > 1e-4


@pytest.mark.parametrize("application", ["mask", "remove"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(application: str) -> None:
    def started() -> tuple[Pruning, nn.Module, Tensor, torch.optim.Optimizer]:
        model, inputs = stack(post=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        rule = {"criterion": "block_change", "start": 0, "end": 3, "schedule": "linear", "application": application}
        return pruner_of(model, inputs, optimizer, **rule), model, inputs, optimizer

    def train(run: tuple[Pruning, nn.Module, Tensor, Any], epochs: range) -> None:
        for epoch in epochs:
            _step(*run[1:])
            run[0].prune(epoch=epoch)

    whole = started()
    train(whole, range(5))
    for stop in (2, 4):
        first, again = started(), started()
        train(first, range(stop))
        again[0].load_state_dict(first[0].state_dict(), generators=True)
        again[1].load_state_dict(first[1].state_dict())
        again[3].load_state_dict(first[3].state_dict())
        train(again, range(stop, 5))
        assert again[0].masks["blocks.0"].tolist() == whole[0].masks["blocks.0"].tolist()
        assert whole[1].state_dict().keys() == again[1].state_dict().keys()
        assert all(torch.equal(value, again[1].state_dict()[key]) for key, value in whole[1].state_dict().items())
    assert sum(isinstance(one, PassThrough) for one in whole[1].blocks) == 2


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model, inputs = stack()
    pruner = pruner_of(model, inputs)
    pruner.prune(epoch=0)
    state = pruner.state_dict()
    state["channels"]["widths"]["last"] = [7, 7]
    other, _ = stack()
    optimizer = torch.optim.Adam(other.parameters())
    _step(other, inputs, optimizer)
    parameters, remembered = list(other.parameters()), dict(optimizer.state)
    resumed = pruner_of(other, inputs, optimizer)
    with pytest.raises(CheckpointError, match="last"):
        resumed.load_state_dict(state)
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))
    assert all(one is two for one, two in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.state.keys() == remembered.keys()
    assert not any(isinstance(one, PassThrough) for one in other.modules())


@pytest.mark.parametrize("name", ["resnet", "timm_vit", "bert", pytest.param("llama", marks=TRACED_MASK)])
def test_the_removed_model_exports(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    pruner = pruner_of(model, inputs)
    pruner.prune(epoch=0)
    assert any(isinstance(one, PassThrough) for one in model.modules())
    assert export_onnx(model, inputs, tmp_path / "model.onnx").max_abs_diff <= 1e-4


def test_a_file_says_which_blocks_are_gone_and_a_model_without_them_is_refused(tmp_path: Path) -> None:
    model, inputs = stack(form=2)
    pruner_of(model, inputs).prune(epoch=0)
    path = save_pruned(model, tmp_path / "model.safetensors")
    gone = {f"blocks.{number}": 2 for number, one in enumerate(model.blocks) if isinstance(one, PassThrough)}
    assert read_file(path)[1]["passed"] == gone and len(gone) == 2
    shorter = Stack(blocks=1, form=2)
    with pytest.raises(CheckpointError, match="has no block 'blocks"):
        load_pruned(shorter, path)
    assert not any(isinstance(one, PassThrough) for one in shorter.modules())
    further = load_pruned(stack(form=2)[0], path)
    again = pruner_of(further, inputs)
    assert again.phase == "finetune" and again.report().macs["fraction"] < 1


def test_a_masked_block_is_saved_as_one_that_is_gone(tmp_path: Path) -> None:
    model, inputs = stack(post=True)
    pruner = pruner_of(model, inputs, start=0, end=1)
    pruner.prune(epoch=0)
    assert pruner.phase == "prune" and pruner.sparsity > 0
    loaded = load_pruned(stack(post=True)[0], save_pruned(model, tmp_path / "model.safetensors"))
    assert largest_difference(outputs_of(model, inputs), outputs_of(loaded, inputs)) == 0.0
    zeros = stack(post=True)[0]
    zeros.load_state_dict(model.state_dict())
    assert largest_difference(outputs_of(model, inputs), outputs_of(zeros, inputs)) > 1e-3, "zeros alone will not do"


def test_the_state_of_lbfgs_loses_the_rows_of_blocks() -> None:
    model, inputs = stack()
    parameters = [*model.blocks[0].parameters(), *model.last.parameters()]
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[parameters[0]]
    row, total = state["d"], sum(one.numel() for one in model.last.parameters())
    surgery = Surgery()
    follow(optimizer, {}, surgery, list(model.blocks[0].parameters()))
    assert optimizer.param_groups[0]["params"] == list(model.last.parameters())
    assert torch.equal(optimizer.state[model.last.weight]["d"], row[-total:])
    optimizer.step(closure)
    surgery.undo()
    assert all(one is two for one, two in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert torch.equal(optimizer.state[parameters[0]]["d"], row)


def test_one_shot_takes_blocks_too() -> None:
    model, inputs = stack()
    data = [(inputs, torch.arange(6) % 3)]
    rule = {"pattern": "depth", "criterion": "block_change"}
    pruned = one_shot(model, rule, data, functional.cross_entropy, [0.25, 0.5])
    kinds = {key: [isinstance(one, PassThrough) for one in one.blocks] for key, one in pruned.items()}
    assert kinds[0.25] == [False, True, False, False] and sum(kinds[0.5]) == 2 and kinds[0.5][IDLE]
    assert not any(isinstance(one, PassThrough) for one in model.modules())


def test_one_shot_and_a_plan_let_blocks_compete_with_channels_as_a_pruner_does() -> None:
    model, inputs = stack()
    data = [(inputs, torch.arange(6) % 3)]
    rule = {"pattern": ["channel", "depth"], "criterion": "taylor", "target": {"macs": 0.6}}
    pruner = Pruning(copy.deepcopy(model), {"rules": [{**rule, "start": 0, "end": 0}]}, example_inputs=inputs)
    pruner.calibrate_with(data, functional.cross_entropy)
    pruner.prune(epoch=0)
    pruner.remove()
    (pruned,) = one_shot(model, rule, data, functional.cross_entropy).values()
    gone = [isinstance(one, PassThrough) for one in pruned.blocks]
    assert gone[IDLE] and gone == [isinstance(one, PassThrough) for one in pruner.model.blocks]
    assert count_macs(pruned, inputs) == count_macs(pruner.model, inputs) <= 0.6 * count_macs(model, inputs)
    calibration = Calibration(model, data, functional.cross_entropy)
    planned = plan(model, Rule.model_validate(rule), inputs, [("macs", 0.6)], calibration)
    kept = {one.name: sum(map(int, mask)) for one in planned.sets for mask in [pruner.masks[one.name]]}
    assert {one.name: one.kept[0] for one in planned.sets} == kept
    assert kept.keys() >= {f"blocks.{number}" for number in range(4)} and planned.targets[0].macs == pruner.macs.kept


def test_one_shot_refuses_a_sparsity_where_blocks_compete_with_channels() -> None:
    model, inputs = stack()
    rule = {"pattern": ["channel", "depth"], "criterion": "taylor", "target": {"macs": 0.6}}
    with pytest.raises(ConfigError, match="^sparsities: a count of groups means nothing where blocks"):
        one_shot(model, rule, [(inputs, torch.arange(6) % 3)], functional.cross_entropy, [0.5])


def test_every_criterion_ranks_blocks_or_is_refused_by_name() -> None:
    refused = set()
    for criterion in names("criterion"):
        model, inputs = stack()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        rule = {"criterion": criterion, "regularizer": "growing_l2", "target": {"macs": 0.6}}
        try:
            pruner = pruner_of(model, inputs, optimizer, **rule)
        except ConfigError as error:
            assert f"criterion: {criterion!r} scores {'experts' if criterion == 'reap' else 'channels'}" in str(error)
            refused.add(criterion)
            continue
        _step(model, inputs, optimizer)
        pruner.prune(epoch=0)
        assert pruner.macs.fraction <= 0.6 and pruner.sparsity == 0.5, criterion
    readers = {"variance", "variance_next", "variance_magnitude", "geometric_median", "reconstruction"}
    assert refused == {"obs", "cap", "fast_cap", "sparse_gpt", "reap", *readers}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"pattern": "depth"}, {"pattern": "channel"}], r"rules\[0\].pattern: 'depth' .* rules\[1\] would prune"),
        ([{"pattern": "head", "name": "heads"}, {"pattern": "residual_block"}], r"rules\[1\].pattern: .* heads would"),
        ([{"pattern": "depth"}, {"pattern": "depth", "layers": ["blocks.0"]}], r"rules\[1\] would"),
        ([{"pattern": "channel", "criterion": "block_change"}], "criterion: 'block_change' scores whole blocks"),
        ([{"pattern": "unstructured", "criterion": "block_change"}], "criterion: 'block_change' scores whole blocks"),
        (
            [{"pattern": "depth", "target": {"latency": 0.5}}],
            "target.latency: 0.5 is not supported by the pattern 'depth'",
        ),
        (
            [{"pattern": "depth", "target": {"peak_memory": 0.5}}],
            "target.peak_memory: 0.5 is not supported by the pattern",
        ),
        (
            [{"pattern": "depth", "target": {"macs": 0.5}, "allocation": "macs"}],
            "allocation: 'macs' is not supported by the pattern",
        ),
        ([{"pattern": "depth", "multiple": 8}], "multiple: 8 is not supported by the pattern"),
        ([{"pattern": "depth", "layers": ["block"]}], "layers: 'block' is not known; did you mean 'blocks"),
        ([{"pattern": "depth", "layers": ["first"]}], "selects no block|no residual block that could go"),
        ([{"pattern": {"type": "depth", "unit": 2}}], "unit"),
    ],
)
def test_what_cannot_be_meant_is_refused(rules: list[dict[str, Any]], message: str) -> None:
    model, inputs = stack()
    with pytest.raises((ConfigError, ModelError), match=message):
        Pruning(model, {"rules": [{"target": {"sparsity": 0.5}, **one} for one in rules]}, example_inputs=inputs)


def test_a_block_that_the_code_needs_stays_by_name(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), torch.randn(2, 5, 32)
    model = nn.TransformerEncoder(layer, 3).eval()  # it looks into its first layer
    pruner = pruner_of(model, inputs)
    assert list(pruner.channel_pruner.found.grouping.sets[0].layers) == ["layers.1", "layers.2"]
    assert "layers.0 stays: without it the model does not run" in caplog.text
    pruner.prune(epoch=0)
    assert pruner.phase == "finetune" and pruner.sparsity == 0.5


def test_a_criterion_of_blocks_refuses_other_groups() -> None:
    model, inputs = stack()
    grouping = Pruning(
        model, {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=inputs
    ).channel_pruner.found.grouping
    with pytest.raises(ConfigError, match="'block_change' scores whole blocks"):
        registered("criterion", "block_change").collector().attach(model, grouping)


def test_a_decoder_without_its_first_block_generates_with_its_cache_and_without() -> None:
    model, inputs = build("llama")
    pruner = pruner_of(model, inputs, start=1)
    pruner.channel_pruner.keep_D = torch.tensor([False, True])
    pruner.channel_pruner.masks.set(pruner.channel_pruner.keep_D)
    pruner.remove()
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(IDS, use_cache=one, **options).scores for one in (True, False))
    assert largest_difference(list(plain), list(cached)) <= 1e-5


def test_a_sparsity_of_less_than_one_block_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rule = {"pattern": "depth", "target": {"sparsity": 0.2}}
    pruner = Pruning(Stack(3), {"rules": [rule]}, example_inputs=torch.randn(2, 4))
    pruner.prune(epoch=0)
    assert pruner.sparsity == 0
    assert "nothing is pruned: target.sparsity 0.2 of 3 groups is less than one" in caplog.text
