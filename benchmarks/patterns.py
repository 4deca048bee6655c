"""Masks of every pattern: the time to compute them, and what they cost in a step, beside torchao's and Intel's.

One event at 10 (or 90) million weights of linear layers by magnitude: scores, ranking and masks, in CPU seconds on one
thread. In a step with masks in place: gradients and weights of what is masked are zeroed, as a fraction of forward +
backward on a model of BERT-mini's size and on resnet50. Medians of rounds in which all take turns.

    pip install torchao; pip install --no-deps 'neural-compressor==2.6' 'setuptools<81'  # both optional
    python benchmarks/patterns.py [--weights 10] [--rounds 5] [--only masks steps]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import interleaved, markdown, save
from torch import Tensor, nn

from pruningawaretraining import Pruning

sys.path.append(str(Path(__file__).parents[1] / "examples"))

PATTERNS = {
    "unstructured": 0.8,
    "4x1": 0.8,
    "1x16": 0.8,
    "2:4": 0.5,
    "slice": 0.8,
    "channelx1": 0.8,
    "1xchannel": 0.8,
}
Event = Callable[[], Any]
Pair = tuple[Event, Event]
"""One event, and what its masks cost in a step from then on."""


def stack(millions: int, width: int = 1024) -> nn.Sequential:
    """Linear layers of about so many million weights, and a small last one that nobody prunes."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(round(millions * 1e6 / width**2))]
    return nn.Sequential(*layers, nn.Linear(width, 8, bias=False))


def pruned_layers(model: nn.Module) -> list[str]:
    """All layers but the last."""
    return [name for name, _ in model.named_children()][:-1]


def rule_of(pattern: str, scope: str = "global") -> dict[str, Any]:
    """One event by magnitude; slices are of linear layers here too."""
    sparsity = PATTERNS[pattern]
    spec: Any = {"type": "slice", "types": ["Linear", "Conv"]} if pattern == "slice" else pattern
    return {"pattern": spec, "criterion": "weight", "scope": scope, "target": {"sparsity": sparsity}}


def ours(model: nn.Module, pattern: str) -> Pair:
    """Scores, ranking and masks of one event (the groups are there already); masks on gradients and on weights."""
    pruner = Pruning(model, {"rules": [{**rule_of(pattern), "layers": pruned_layers(model)}]})
    (rule,) = pruner.engine.weights.rules

    def step() -> None:
        rule.masks.apply_to_gradients()
        rule.masks.apply()

    return lambda: pruner.prune(epoch=0), step


def torchao(model: nn.Module, pattern: str) -> Pair | None:
    """WeightNormSparsifier, which ranks each layer by itself; in a step, masked copies of the weights and their
    gradients. None for what it does not have."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.prototype.sparsity.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    shapes = {"unstructured": ((1, 1), 1), "4x1": ((4, 1), 4), "1x16": ((1, 16), 16), "2:4": ((1, 4), 2)}
    if pattern not in shapes:
        return None
    shape, zeros = shapes[pattern]
    level = 1.0 if pattern == "2:4" else PATTERNS[pattern]
    sparsifier = WeightNormSparsifier(level, shape, zeros)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in pruned_layers(model)])
    layers = [model.get_submodule(name) for name in pruned_layers(model)]
    ones = [torch.ones_like(one.parametrizations.weight.original) for one in layers]

    def step() -> None:
        for one, gradient in zip(layers, ones, strict=True):
            one.weight.backward(gradient)

    return sparsifier.step, step


def intel(model: nn.Module, pattern: str) -> Pair | None:
    """neural-compressor 2.6's pruner at its one event; in a step, masks on the weights alone. None for what it does not
    have."""
    if importlib.util.find_spec("neural_compressor") is None or pattern == "slice":
        return None
    from neural_compressor.compression.pruner.pruning import PRUNINGS
    from neural_compressor.compression.pruner.utils import process_config
    from neural_compressor.config import WeightPruningConfig

    logging.disable(logging.WARNING)
    name = "1x1" if pattern == "unstructured" else pattern
    keys = {"target_sparsity": PATTERNS[pattern], "pattern": name, "pruning_type": "magnitude", "start_step": 0}
    config = WeightPruningConfig([{}], **keys, end_step=0, excluded_op_names=["^$"], pruning_op_types=["Linear"])
    (pruner,) = PRUNINGS["basic_pruning"](process_config(config), model).pruners
    return lambda: pruner.update_masks(0), pruner.mask_weights


def sparsity_of(model: nn.Module) -> float:
    """Zeros among the weights of these layers."""
    weights: list[Tensor] = [model.get_submodule(name).weight for name in pruned_layers(model)]
    return float(sum((one == 0).sum() for one in weights) / sum(one.numel() for one in weights))


def mask_row(pattern: str, millions: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of one event of each library, on a fresh model each time, and the sparsities reached."""
    makers = {"ours": ours, "torchao": torchao, "neural-compressor": intel}
    times: dict[str, list[float]] = {name: [] for name in makers}
    steps: dict[str, list[float]] = {name: [] for name in makers}
    reached: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, make in makers.items():
            model = stack(millions)
            pair = make(model, pattern)
            if pair is None:
                continue
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            for event, found in zip(pair, (times, steps), strict=True):
                start = time.process_time()
                event()
                if turn:
                    found[name].append(time.process_time() - start)
            reached[name] = sparsity_of(model)
    seconds = {name: statistics.median(values) for name, values in times.items() if values}
    row: dict[str, Any] = {"million weights": millions, "pattern": pattern}
    row |= {f"{name}, CPU s": round(seconds[name], 3) if name in seconds else "-" for name in makers}
    row |= {
        f"{name}, step, ms": round(1e3 * statistics.median(steps[name]), 1) if steps[name] else "-" for name in makers
    }
    others = {name: seconds[name] / seconds["ours"] for name in seconds if name != "ours"}
    row |= {
        f"{name} / ours, event": f"{others[name]:.1f}" if name in others else "-" for name in makers if name != "ours"
    }
    row["sparsity asked"] = f"{PATTERNS[pattern]:.4f}"
    row["reached: ours, torchao, n.-c."] = ", ".join(f"{reached[one]:.4f}" if one in reached else "-" for one in makers)
    return row


def bert_mini() -> tuple[nn.Module, Tensor]:
    """The model of examples/text.py and a batch of 16 texts of 64 words."""
    text = importlib.import_module("text")
    torch.manual_seed(0)
    return text.BertMini(30_522, 2), torch.randint(3, 30_522, (16, 64))


def resnet50() -> tuple[nn.Module, Tensor]:
    """resnet50 and a batch of 32 images of 64 pixels."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None), torch.randn(32, 3, 64, 64)


def step_row(name: str, make: Callable[[], tuple[nn.Module, Tensor]], pattern: str, rounds: int) -> dict[str, Any]:
    """Cost of the masks in a step: gradients as they come, and weights after the step."""
    model, inputs = make()
    pruner = Pruning(model, {"rules": [rule_of(pattern)]}, example_inputs=inputs[:1])

    def forward_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(inputs).sum().backward()

    forward_backward()
    pruner.prune(epoch=0)
    (rule,) = pruner.engine.weights.rules
    forward_backward()
    functions = {
        "step": forward_backward,
        "gradients": rule.masks.apply_to_gradients,
        "weights": rule.masks.apply,
    }
    found = interleaved(functions, rounds, clock=time.process_time)
    step = found["step"] - found["gradients"]  # the gradients are masked in backward already
    cost = found["gradients"] + found["weights"]
    members = {id(one.parameter): one.parameter.numel() for one in rule.grouping.members}
    return {
        "model": name,
        "pattern": pattern,
        "pruned weights, million": round(sum(members.values()) / 1e6, 1),
        "sparsity": f"{pruner.sparsity:.4f}",
        "forward + backward, CPU ms": round(1e3 * step, 1),
        "masks on gradients": f"{found['gradients'] / step:.1%}",
        "masks on weights": f"{found['weights'] / step:.1%}",
        "both": f"{cost / step:.1%}",
        "bytes of masks per weight": round(rule.masks.keep_G.numel() / sum(members.values()), 3),
    }


def main() -> None:
    """Measure, print the tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=10, help="million weights; 90 takes minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=("masks", "steps"), default=["masks", "steps"])
    parser.add_argument("--patterns", nargs="*", choices=list(PATTERNS), default=list(PATTERNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if "masks" in args.only:
        rows = [mask_row(pattern, args.weights, args.rounds) for pattern in args.patterns]
        print(markdown(rows), flush=True)
        suffix = "" if args.weights == 10 else f"_{args.weights}"
        print("saved", save(f"patterns{suffix}", rows, f"Masks of {args.weights} million weights", MASKS))
    if "steps" in args.only:
        models = {"BERT-mini": bert_mini, "resnet50": resnet50}
        steps = [step_row(name, make, one, args.rounds) for name, make in models.items() for one in args.patterns]
        print(markdown(steps))
        print("saved", save("patterns_steps", steps, "Masks in a training step", STEPS))


MASKS = (
    "One event by magnitude over linear layers of 1024 x 1024: scores, ranking, masks, zeroed weights. Ours and "
    "neural-compressor 2.6 rank all layers together, torchao 0.18 (WeightNormSparsifier) each by itself. In a step, "
    "ours zeroes gradients and weights, torchao masks a copy of the weights and their gradients, neural-compressor the "
    "weights alone. Ours with numba (`pip install '.[fast]'`). -: not there, or not installed."
)
STEPS = (
    "Batch of 16 texts of 64 words, or of 32 images of 64 px; with numba (`pip install '.[fast]'`). Masks are applied "
    "twice in a step: to each gradient when it is complete, and to the weights after the step. A mask has one byte a "
    "group."
)


if __name__ == "__main__":
    main()
