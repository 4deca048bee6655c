"""Which files of other systems load, and run for a few steps on a fitting model: a table over a folder of them.

    python benchmarks/foreign_configs.py FOLDER --set NAME=VALUE --page docs/foreign_configs.md

Models are small ones of timm, torchvision and transformers with random weights; where none fits, one is made of the
names that the config has. Rules by curvature take few gradients and small blocks; of the events, the first ones and the
last one are called.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pruningawaretraining import Pruning
from pruningawaretraining.config import PruningConfig
from pruningawaretraining.config.plan import Plan, events_of, read_plan
from pruningawaretraining.errors import PruningError

ENDINGS = (".yaml", ".yml", ".json", ".md")
MOST_EVENTS = 2
STEPS = 6
STEPS_PER_EPOCH = 2
MOST_EPOCHS = 40
FEW = {"num_grads": 4, "fisher_block_size": 16, "micro_batch": 2, "traces_backup_dir": None}
SMALL: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 64},
    "xcit_nano_12_p16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet26d": {"channels": (8, 16, 24, 32)},
    "efficientnet_lite0": {},
}
"""timm models, made narrower and shallower."""
BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


def image_model(name: str, size: int = 64) -> tuple[nn.Module, list[Any]]:
    """A timm model, and batches for it."""
    import timm

    model = timm.create_model(name, num_classes=4, **SMALL[name])
    return model, [(torch.randn(2, 3, size, size), torch.arange(2)) for _ in range(STEPS)]


def torchvision_model(name: str) -> tuple[nn.Module, list[Any]]:
    """A torchvision model, and batches for it."""
    import torchvision

    model = torchvision.models.get_model(name, num_classes=4)
    return model, [(torch.randn(2, 3, 64, 64), torch.arange(2)) for _ in range(STEPS)]


def text_model(kind: str) -> tuple[nn.Module, list[Any]]:
    """A transformers model, and batches for it."""
    import transformers as t

    torch_names = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)),
        "qa": lambda: t.BertForQuestionAnswering(t.BertConfig(**BERT)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(dim=32, n_layers=4, n_heads=2, hidden_dim=64, vocab_size=50)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=50,
                num_key_value_heads=2,
            )
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32, ffn_dim=64, num_hidden_layers=24, num_attention_heads=2, vocab_size=50,
                word_embed_proj_dim=32, max_position_embeddings=32,
            )
        ),
    }  # fmt: skip
    model = torch_names[kind]()
    labels = torch.zeros(2, dtype=torch.long)
    return model, [({"input_ids": torch.randint(0, 50, (2, 8))}, labels) for _ in range(STEPS)]


class Named(nn.Module):
    """A chain of convolutions with given names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            *parents, last = name.split(".")
            module: nn.Module = self
            for part in parents:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.add_module(last, nn.Conv2d(8, 8, 3, padding=1))
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.first(images)
        for name in self.names:
            values = functional.relu(self.get_submodule(name)(values))
        return self.head(values.mean((2, 3)))


class NamedLinear(Named):
    """The same with linear layers."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, nn.Linear(8, 8))
        self.first = nn.Linear(8, 8)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.first(values)
        for name in self.names:
            values = functional.relu(self.get_submodule(name)(values))
        return self.head(values)


KNOWN: list[tuple[str, str, Callable[[], tuple[nn.Module, list[Any]]]]] = [
    (r"distilbert", "transformers DistilBERT", lambda: text_model("distilbert")),
    (r"squad|question|qa_", "transformers BERT", lambda: text_model("qa")),
    (r"bert|mnli|qqp|mrpc|sst2|mlm|text-classification", "transformers BERT", lambda: text_model("bert")),
    (r"mobilenet|modifiers_refactor", "torchvision mobilenet_v2", lambda: torchvision_model("mobilenet_v2")),
    (r"beans|template|predefined", "torchvision resnet50", lambda: torchvision_model("resnet50")),
    (r"image_recognition", "torchvision resnet50", lambda: torchvision_model("resnet50")),
    (r"resnet", "timm resnet26d", lambda: image_model("resnet26d")),
    (r"convnext", "timm convnext_atto", lambda: image_model("convnext_atto")),
    (r"xcit", "timm xcit_nano_12_p16_224", lambda: image_model("xcit_nano_12_p16_224")),
    (r"efficientnet", "timm efficientnet_lite0", lambda: image_model("efficientnet_lite0")),
    (r"vit|deit|fast_cap|finetun|10ep", "timm deit_tiny_patch16_224", lambda: image_model("deit_tiny_patch16_224")),
    (r"opt|obcq__example\.", "transformers OPT", lambda: text_model("opt")),
    (r"llama|mistral|text-generation|obcq", "transformers Llama", lambda: text_model("llama")),
]
"""Part of a file's name -> a fitting model."""


def exact_names(config: PruningConfig) -> list[str]:
    """Layers that a config names one by one."""
    entries = [entry for rule in config.rules for entry in rule.layers or ()]
    return list(dict.fromkeys(entry for entry in entries if ":" not in entry))


def fitting(path: Path, plan: Plan) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Models to try, with what they are called and batches."""
    text = path.name.lower()
    for part, name, make in KNOWN:
        if re.search(part, text):
            yield name, *make()
            break
    names = exact_names(plan.config)
    if not names:
        return
    if any(rule.example_inputs for rule in [plan.config]):
        images = torch.randn(2, 3, 16, 16)
        yield "convolutions of these names", Named(names), [((images,), torch.arange(2))] * STEPS
    yield "linear layers of these names", NamedLinear(names), [(torch.randn(2, 8), torch.arange(2))] * STEPS


def smaller(config: PruningConfig) -> PruningConfig:
    """With few gradients and small blocks for rules by curvature, and the inputs of the small model."""
    rules = []
    for rule in config.rules:
        criterion = rule.criterion
        if isinstance(criterion, dict) and "num_grads" in criterion:
            criterion = {key: FEW.get(key, value) for key, value in criterion.items()}
        rules.append(rule.model_copy(update={"criterion": criterion}))
    return config.model_copy(update={"rules": rules, "example_inputs": None})


def logits(outputs: Any) -> torch.Tensor:
    """Whatever a model gives, as rows of scores."""
    if hasattr(outputs, "start_logits"):
        return outputs.start_logits
    found = outputs.logits if hasattr(outputs, "logits") else outputs
    return found[:, -1] if found.dim() == 3 else found


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def loss_of(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits(outputs), targets)


def epochs_of(config: PruningConfig) -> list[int]:
    """The epochs that are run: those of the first events and the last one; all where events lie between epochs."""
    rules = [rule for rule in config.rules if rule.enabled and rule.unit == "epoch"]
    if any(rule.timeline(STEPS_PER_EPOCH).counts == "step" for rule in rules):
        moments = [rule.timeline(STEPS_PER_EPOCH) for rule in rules]
        last = max(one.last if one.counts == "step" else one.last * STEPS_PER_EPOCH for one in moments)
        return list(range(min(last // STEPS_PER_EPOCH, MOST_EPOCHS) + 1))
    ticks = sorted({now for rule in rules for now, _ in events_of(rule)} | {0})
    return [*ticks[:MOST_EVENTS], *ticks[-1:]]


def run(plan: Plan, model: nn.Module, batches: list[Any]) -> str:
    """Some events and steps; the sparsity that is reached, or why it cannot be."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs = batches[0][0]
    config = smaller(plan.config)
    pruner = Pruning(model, config, example_inputs=inputs, optimizer=optimizer)
    pruner.on_train_begin(range(STEPS_PER_EPOCH))
    pruner.calibrate_with(batches, loss_of)
    for epoch in epochs_of(config):
        pruner.prune(model, epoch)
        for number, (given, targets) in enumerate(batches[:STEPS_PER_EPOCH]):
            pruner.on_step_begin(number)
            optimizer.zero_grad()
            loss_of(call(model, given), targets).backward()
            optimizer.step()
    pruner.on_train_end()
    finals = {f"{events[-1][1]:g}" for rule in config.rules if (events := events_of(rule))}
    macs = [rule.target.macs for rule in config.rules if rule.enabled and rule.target.macs is not None]
    if macs:
        return f"{pruner.macs.fraction:.3f} of the MACs (asked {macs[0]:g})"
    return f"{pruner.sparsity:.3f} (asked {', '.join(sorted(finals)) or 'nothing'})"


def row_of(path: Path, folder: Path, variables: dict[str, Any]) -> list[str]:
    """The table's row for one file."""
    name = str(path.relative_to(folder))
    try:
        plan = read_plan(path, variables)
    except PruningError as error:
        reason = str(error).splitlines()[0].replace(f"{path}: ", "")
        return [name, "", f"no: {reason[:160]}", "", ""]
    said = [note for note in plan.notes if note.partition(" is ignored")[0] not in variables]
    notes = "; ".join(dict.fromkeys(re.sub(r" is ignored:.*", "", note).rpartition("].")[2] for note in said))
    if not any(rule.enabled for rule in plan.config.rules):
        return [name, plan.form, "yes", "prunes nothing", notes]
    tried = []
    for called, model, batches in fitting(path, plan):
        try:
            return [name, plan.form, "yes", f"{run(plan, model, batches)} on {called}", notes]
        except PruningError as error:
            tried.append(f"no, on {called}: {str(error).splitlines()[0][:160]}")
    return [name, plan.form, "yes", "; ".join(tried) or "no fitting model", notes]


def page(rows: list[list[str]]) -> str:
    """The result page."""
    loads = sum(row[2] == "yes" for row in rows)
    runs = sum(row[3][:1].isdigit() or row[3] == "prunes nothing" for row in rows)
    text = f"""# Files of other systems

Config files as the authors of CAP, SparseML, Intel Neural Compressor and the sirc benchmark published them, loaded
unchanged and run for some events and steps on small models with random weights, by

```text
python benchmarks/foreign_configs.py FOLDER --set NAME=VALUE --page docs/foreign_configs.md
```

Rules by curvature take {FEW["num_grads"]} gradients and Fisher blocks of {FEW["fisher_block_size"]} there. The sparsity
is what was reached after the first events and the last one, over all layers that a config names; a MAC target, N:M
windows, caps, events at steps of which few are run, and layers that only some phases prune make it differ from what is
asked. Where events lie between epochs, an epoch is {STEPS_PER_EPOCH} steps.
How to read the rest: [migration.md](migration.md).

{loads} of {len(rows)} files load, {runs} run. Files of training settings alone are configs of no form.
"""
    lines = [
        *text.splitlines(),
        "",
        "| file | form | loads | sparsity reached, and the model | keys without effect, or different here |",
        "|---|---|---|---|---|",
    ]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files are")
    parser.add_argument("--page", type=Path, help="write the page here")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="variables of recipes")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    logging.getLogger("pruningawaretraining").setLevel(logging.ERROR)
    logging.getLogger("pruningawaretraining.config").setLevel(logging.WARNING)  # what the last column is made of
    variables = {name: float(value) for name, _, value in (pair.partition("=") for pair in options.set)}
    found = [path for path in sorted(options.folder.rglob("*")) if path.suffix in ENDINGS and path.stem != "README"]
    rows = []
    for path in found:
        rows.append(row_of(path, options.folder, variables))
        print(" | ".join(rows[-1]), flush=True)
    if options.page:
        options.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
