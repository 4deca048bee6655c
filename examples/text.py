"""A small BERT on text, pruned 4x1 and 2:4 by SNIP with momentum while its dense self teaches it; a table of the drop.

The model has the size and the names of BERT-mini (4 layers, 256 wide, 4 heads), and its words come from the training
text. The dense model is trained first; each sparse one goes on from it.

    python examples/text.py                                             # a small set that scikit-learn ships: a minute
    python examples/text.py --train sst2_train.tsv.xz --test sst2_dev.tsv.xz --steps 1500 --sparse-steps 700

A line of a file is label, tab, text; .xz and .gz are read too.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gzip
import importlib.resources
import json
import lzma
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruningawaretraining import Pruning

PAD, UNKNOWN, START = 0, 1, 2
DESCRIBED = ("breast_cancer", "california_housing", "covtype", "kddcup99", "twenty_newsgroups")
PATTERNS = {"4x1": 0.8, "2:4": 0.5}


@dataclass(frozen=True)
class Texts:
    """Texts as lists of word numbers, and their labels."""

    words: list[list[int]]
    labels: list[int]

    def batches(self, size: int, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Word numbers (batch, longest) and labels; texts of like length together, in another order for each seed."""
        order = list(range(len(self.words)))
        chance = random.Random(seed)  # noqa: S311
        if seed is not None:
            chance.shuffle(order)
        chunks = [order[start : start + 50 * size] for start in range(0, len(order), 50 * size)]
        order = [number for chunk in chunks for number in sorted(chunk, key=lambda one: len(self.words[one]))]
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        if seed is not None:
            chance.shuffle(groups)
        for group in groups:
            longest = max(len(self.words[number]) for number in group)
            rows = [self.words[number] + [PAD] * (longest - len(self.words[number])) for number in group]
            yield torch.tensor(rows), torch.tensor([self.labels[number] for number in group])


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(label, text) of each line."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        return [tuple(line.rstrip("\n").split("\t", 1)) for line in file if "\t" in line]


def described_sets(length: int = 10) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pieces of scikit-learn's descriptions of data sets, to be told apart: every fourth piece is for the test."""
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for name in DESCRIBED:
        text = (importlib.resources.files("sklearn.datasets.descr") / f"{name}.rst").read_text(encoding="utf-8")
        words = re.findall(r"\w+", text)
        for number, start in enumerate(range(0, len(words), length)):
            parts[number % 4 == 3].append((name, " ".join(words[start : start + length])))
    return parts


def numbered(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> tuple[Texts, Texts, int, int]:
    """Both parts with the words of the first (those that are there twice); the numbers of words and of labels."""
    pattern = re.compile(r"\w+|[^\w\s]")
    counts = collections.Counter(word for _, text in train for word in pattern.findall(text.lower()))
    vocabulary = {word: number + 3 for number, (word, count) in enumerate(counts.most_common()) if count > 1}
    labels = {label: number for number, label in enumerate(sorted({label for label, _ in train}))}

    def part(lines: Sequence[tuple[str, str]]) -> Texts:
        found = [[vocabulary.get(word, UNKNOWN) for word in pattern.findall(text.lower())[:63]] for _, text in lines]
        return Texts([[START, *words] for words in found], [labels[label] for label, _ in lines])

    return part(train), part(test), len(vocabulary) + 3, len(labels)


class Attention(nn.Module):
    """Self-attention with BERT's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        parts = [one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(*parts, attn_mask=seen)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and two linear layers, each with its residual and norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.intermediate, self.output, self.norm = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            nn.LayerNorm(width),
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, seen)))
        out: Tensor = self.norm(x + self.dropout(self.output(functional.gelu(self.intermediate(x)))))
        return out


class BertMini(nn.Module):
    """A classifier of the size of BERT-mini."""

    def __init__(self, words: int, labels: int, width: int = 256, heads: int = 4, inner: int = 1024, depth: int = 4):
        super().__init__()
        self.embeddings = nn.ModuleDict({"words": nn.Embedding(words, width), "places": nn.Embedding(64, width)})
        for one in self.embeddings.values():
            nn.init.normal_(one.weight, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.layer = nn.ModuleList(Layer(width, heads, inner) for _ in range(depth))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, labels)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.dropout(self.norm(self.embeddings["words"](words) + self.embeddings["places"](places)))
        seen = (words != PAD)[:, None, None, :]
        for layer in self.layer:
            x = layer(x, seen)
        out: Tensor = self.classifier(torch.tanh(self.pooler(x[:, 0])))
        return out


def pruning_config(pattern: str, steps: int, distill: float) -> dict[str, Any]:
    """Step-wise pruning: from a tenth of the steps to half of them, the rest is for getting back what was lost."""
    return {
        "pattern": pattern,
        "target_sparsity": PATTERNS[pattern],
        "pruning_type": "snip_momentum",
        "excluded_op_names": ["classifier", "pooler", "embeddings"],
        "pruning_op_types": ["Linear"],
        "start_step": steps // 10,
        "end_step": steps // 2,
        "pruning_frequency": max(1, steps // 25),
        "sparsity_decay_type": "cubic",
        "distill_loss_weight": distill,
    }


def train(model: nn.Module, texts: Texts, steps: int, rate: float, args: Any, pruner: Pruning | None = None) -> None:
    """AdamW with a warm-up and a linear decay; the hooks are those of any step-wise loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (0.1 * steps), (steps - n) / steps))
    step, epoch = 0, 0
    if pruner is not None:
        pruner.on_train_begin()
    while step < steps:
        model.train()
        for words, labels in texts.batches(args.batch_size, seed=epoch):
            if step == steps:
                break
            if pruner is not None:
                pruner.on_step_begin(step)
            scores = model(words)
            loss = functional.cross_entropy(scores, labels)
            if pruner is not None:
                loss = loss + pruner.distill_loss(scores, words)
            loss.backward()
            if pruner is not None:
                pruner.on_before_optimizer_step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if pruner is not None:
                pruner.on_after_optimizer_step()
            optimizer.zero_grad()
            ramp.step()
            step += 1
        epoch += 1
    if pruner is not None:
        pruner.on_train_end()


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """Fraction of the texts that are labelled rightly."""
    model.eval()
    right = sum(int((model(words).argmax(1) == labels).sum()) for words, labels in texts.batches(64))
    return right / len(texts.labels)


def zeros(model: nn.Module) -> float:
    """Fraction of zeros in the weights of the layers that are pruned."""
    weights = [one.weight for one in model.layer.modules() if isinstance(one, nn.Linear)]  # type: ignore[union-attr]
    return float(sum((one == 0).sum() for one in weights) / sum(one.numel() for one in weights))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense model, the dense model trained on for as long as the sparse ones, and these."""
    lines = (read_lines(args.train), read_lines(args.test)) if args.train else described_sets()
    train_texts, test_texts, words, labels = numbered(*lines)
    torch.manual_seed(args.seed)
    dense = BertMini(words, labels)
    start = time.time()
    train(dense, train_texts, args.steps, args.rate, args)
    reached = accuracy(dense, test_texts)
    print(f"dense: {reached:.4f} after {time.time() - start:.0f} s", flush=True)
    rows = [
        {"model": "dense", "sparsity": 0.0, "accuracy": reached, "drop": 0.0, "minutes": (time.time() - start) / 60}
    ]
    for pattern in (None, *args.patterns):
        model, start = copy.deepcopy(dense), time.time()
        torch.manual_seed(args.seed + 1)
        config = {"pattern": "4x1", "target_sparsity": 0.0, "distill_loss_weight": args.distill_loss_weight}
        config = config if pattern is None else pruning_config(pattern, args.sparse_steps, args.distill_loss_weight)
        train(model, train_texts, args.sparse_steps, 0.6 * args.rate, args, Pruning(model, config))
        found = accuracy(model, test_texts)
        name = "dense, trained on" if pattern is None else pattern
        minutes = (time.time() - start) / 60
        rows.append(
            {"model": name, "sparsity": zeros(model), "accuracy": found, "drop": reached - found, "minutes": minutes}
        )
        print(f"{name}: {found:.4f} after {60 * minutes:.0f} s, sparsity {rows[-1]['sparsity']:.4f}", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the drop is in points."""
    lines = ["| model | sparsity | accuracy | drop, points | relative drop | minutes |", "|---|---|---|---|---|---|"]
    dense = rows[0]["accuracy"]
    for row in rows:
        drop, relative = 100 * row["drop"], row["drop"] / dense
        lines.append(
            f"| {row['model']} | {row['sparsity']:.1%} | {row['accuracy']:.2%} | {drop:.2f} | {relative:.2%} | "
            f"{row['minutes']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse, run, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="lines of label, tab, text; without it, descriptions of data sets")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="of the dense model")
    parser.add_argument("--sparse-steps", type=int, default=100, help="of each sparse model, from the dense one on")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--distill_loss_weight", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    args = parser.parse_args(arguments)
    if (args.train is None) != (args.test is None):
        parser.error("--train and --test belong together")
    rows = run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    (args.out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
