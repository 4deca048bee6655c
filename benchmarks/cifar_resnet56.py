"""ResNet-56 on CIFAR-10 at 2.11 and 2.57 times fewer MACs: this library and Torch-Pruning, trained alike.

    python benchmarks/cifar_resnet56.py --budget small --data FOLDER
    python benchmarks/cifar_resnet56.py --budget medium --data FOLDER
    python benchmarks/cifar_resnet56.py --budget full --data FOLDER --limit-seconds 560 --shard 0/4

FOLDER (or $CIFAR_DATA, or ``data``) holds a ``load.py`` with ``cifar10(split)`` and ``cifar_resnet_state(56)``. Nothing
is downloaded. The small form takes two cores, one process each (--workers). The full form is for one GPU: four
processes, --shard 0/4 to 3/4, share it, as small layers leave it idle. What is done is kept in --work (a pruned model
after every phase and epoch, a result after every run), so a call that is stopped, or that stops itself after
--limit-seconds, is gone on with by the same command; --work may be carried between machines. The table is written after
every run, from all results that --work holds. The medium form, ResNet-20 in 10 epochs of all images, has its rows,
options and result in ``cifar_medium.py``; every other option goes there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar_medium
import torch
from cifar_training import BUDGETS, Budget, Data, OutOfTime, Phase, evaluate, train
from cifar_ways import WAYS, Way
from common import RESULTS, markdown, save
from one_shot_cifar import load_module
from torch import nn

from pruningawaretraining import Distiller, count_macs
from pruningawaretraining.checkpoint.state_dict import load_state_dict_pruned
from pruningawaretraining.experiment.models import CifarResNet

TITLE = "ResNet-56 on CIFAR-10: before and after fine-tuning"
FORMS = {
    "small": "**The small form: {sparse} + {tune} epochs of {images:,} images ({steps} steps in all).** It shows which "
    "channels go and what a few steps make of it, not what training ends at; regularisers hardly act in so few steps. "
    "Rows of 3.0x: the same command with `--only rec_first l2_first tp_l1 --targets 3.0`.",
    "full": "The full form: {sparse} + {tune} epochs of {images:,} images.",
}
CHOSEN = (
    "Settings were chosen on test images 0 to 2,000, none of which are reported; an earlier form of this table on the "
    "reported ones had been seen before."
)
ALIKE = (
    "One-shot ways prune first and fine-tune in both parts; the others prune in the first. 'Before' is measured right "
    "after the removal. 'Least squares' adjusts the layers that read what is gone and measures norms anew, on 1,024 "
    "augmented training images (iteratively, at each of three events); the other rows have neither. MACs are those of "
    "`count_macs` for all. Option-A shortcuts fix the widths of the stages, so for all only channels inside the blocks "
    "go: Torch-Pruning is told to leave the others alone, and takes its own steps of 1/400 until the target is met. "
    "One row has a higher rate, which suited Torch-Pruning's L1 better in the trials."
)


def dense_model(loader: Any, device: torch.device) -> nn.Module:
    """The pretrained network."""
    model = CifarResNet(56)
    model.load_state_dict(loader.cifar_resnet_state(56))
    return model.to(device, memory_format=torch.channels_last)


class Run:
    """One way, target and seed: its files, and going on where it stopped.

    Args:
        work: folder of results and checkpoints.
        way, target, seed: what to run; ``target`` is how many times fewer MACs.
        budget: epochs, images, rates.
    """

    def __init__(self, work: Path, way: Way, target: float, seed: int, budget: Budget) -> None:
        self.way, self.target, self.seed = way, target, seed
        self.budget = budget if way.lr is None else replace(budget, lr=way.lr)
        self.file = work / f"{way.key}-{target}-{seed}.json"
        self.checkpoint = self.file.with_suffix(".pt")

    @property
    def done(self) -> bool:
        return self.file.is_file()

    def run(self, loader: Any, data: Data, dense: float, deadline: float) -> dict[str, Any]:
        """Prune and train, or the rest of it.

        Args:
            loader, data: weights and images.
            dense: accuracy of the pretrained network.
            deadline: of ``time.perf_counter``.

        Raises:
            OutOfTime: the deadline has passed; what is done is in the checkpoint.
        """
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        if start > deadline:
            raise OutOfTime
        teacher = dense_model(loader, data.device).eval()
        model = dense_model(loader, data.device)
        state = self._saved()
        if state is None:
            model, state = self._pruned(model, teacher, data, deadline)
        else:
            load_state_dict_pruned(model, state["model"])
            model.to(data.device, memory_format=torch.channels_last)
        state["seconds"] += time.perf_counter() - start
        self._tune(model, teacher, data, deadline, state)
        found = {
            "way": self.way.key,
            "target": self.target,
            "seed": self.seed,
            "dense": dense,
            "before": state["before"],
            "after": evaluate(model, data),
            "reduction": count_macs(teacher, data.example) / count_macs(model, data.example),
            "seconds": state["seconds"],
        }
        self.file.write_text(json.dumps(found) + "\n")
        self.checkpoint.unlink(missing_ok=True)
        return found

    def _saved(self) -> dict[str, Any] | None:
        if not self.checkpoint.is_file():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        return state

    def _save(self, model: nn.Module, state: dict[str, Any]) -> None:
        part = self.checkpoint.with_suffix(".part")
        torch.save({**state, "model": model.state_dict()}, part)
        part.replace(self.checkpoint)

    def _distiller(self, model: nn.Module, teacher: nn.Module) -> Distiller | None:
        return Distiller(model, teacher, weight=2.0, temperature=2.0) if self.way.distill else None

    def _pruned(
        self, model: nn.Module, teacher: nn.Module, data: Data, deadline: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The first phase, in which channels go: at its start, on its way or at its end."""
        phase = Phase(self.budget, self.seed, 0, self.budget.sparse_epochs, deadline, tuning=False)
        before: list[float] = []
        model = self.way.prune(
            model,
            self.target,
            data,
            phase,
            self._distiller(model, teacher),
            lambda one: before.append(evaluate(one, data)),
        )
        state = {"epoch": 0, "before": before[0], "seconds": 0.0, "optimizer": None}
        self._save(model, state)
        return model, state

    def _tune(self, model: nn.Module, teacher: nn.Module, data: Data, deadline: float, state: dict[str, Any]) -> None:
        """The second phase, the same for all: fine-tuning, a checkpoint after every epoch."""
        budget = self.budget
        optimizer = budget.optimizer(model.parameters())
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        distiller = self._distiller(model, teacher)
        for epoch in range(state["epoch"], budget.tune_epochs):
            start = time.perf_counter()
            phase = Phase(budget, self.seed, epoch, epoch + 1, deadline, tuning=True)
            train(model, optimizer, data, phase, distiller)
            state |= {"epoch": epoch + 1, "optimizer": optimizer.state_dict()}
            state["seconds"] += time.perf_counter() - start
            self._save(model, state)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of means over seeds, the order of the ways within each target."""
    rows = []
    for target in sorted({one["target"] for one in found}):
        for way in WAYS:
            runs = [one for one in found if one["way"] == way.key and one["target"] == target]
            if not runs:
                continue
            rows.append(
                {
                    "target": f"{target}x",
                    "who": way.who,
                    "way": way.label,
                    "MACs, times fewer": f"{statistics.mean(one['reduction'] for one in runs):.3f}",
                    "before fine-tuning": spread([one["before"] for one in runs]),
                    "after": spread([one["after"] for one in runs]),
                    "drop from dense": spread([one["dense"] - one["after"] for one in runs]),
                    "seeds": len(runs),
                    "s a run": round(statistics.mean(one["seconds"] for one in runs)),
                }
            )
    return rows


def write(work: Path, name: str, budget: Budget, command: str) -> list[dict[str, Any]]:
    """The table of all results in the folder, and its file."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*-*-*.json"))]
    rows = table(found)
    if not rows:
        return []
    form = FORMS[budget.name].format(
        sparse=budget.sparse_epochs, tune=budget.tune_epochs, images=budget.images, steps=budget.steps
    )
    note = (
        f"{form} Dense: {found[0]['dense']:.2f}. Top-1 in percent on test images {budget.test[0]:,} to "
        f"{budget.test[1]:,}; mean and standard deviation over seeds. {CHOSEN} The same for every row: pretrained "
        f"weights, {budget.sparse_epochs + budget.tune_epochs} epochs, SGD (momentum 0.9, lr {budget.lr}, constant in "
        f"the first part, then falling to 0 by a cosine; weight decay {budget.decay:g}, none beside a growing penalty, "
        f"as in Torch-Pruning's recipe), batches of {budget.batch}, crops and flips drawn from the seed. {ALIKE}"
    )
    save(name, rows, TITLE + f" ({budget.name} form)", note, command)
    return rows


def plan(work: Path, budget: Budget, only: list[str] | None) -> list[Run]:
    """Every run, all ways of one seed before the next."""
    return [
        Run(work, way, target, seed, budget)
        for target in budget.targets
        for seed in range(budget.seeds)
        for way in WAYS
        if not only or way.key in only
    ]


def _share_out(workers: int) -> None:
    """Run this command in several processes, and wait for them; what they leave undone is left to the caller."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shards = [
        subprocess.Popen([sys.executable, *sys.argv, "--shard", f"{number}/{workers}"], env=environment)
        for number in range(workers)
    ]
    for one in shards:
        one.wait()


def main() -> None:
    if sys.argv[1:3] == ["--budget", "medium"]:
        del sys.argv[1:3]
        cifar_medium.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CIFAR_DATA", "data")))
    parser.add_argument("--budget", choices=list(BUDGETS), default="small")
    parser.add_argument("--targets", nargs="+", type=float, help="times fewer MACs, in place of the form's own")
    parser.add_argument("--only", nargs="+", choices=[way.key for way in WAYS])
    parser.add_argument("--work", type=Path, help="folder of results and checkpoints")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="stop by then, to be gone on with")
    parser.add_argument("--workers", type=int, default=2, help="processes of the small form; 1 thread each")
    parser.add_argument("--shard", default="0/1", help="I/N: only every N-th run, from the I-th")
    parser.add_argument("--name", default="cifar_resnet56", help="of the result")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.limit_seconds
    if not (args.data / "load.py").is_file():
        print("skipped: this benchmark needs --data FOLDER", file=sys.stderr)
        return
    logging.basicConfig(level=logging.WARNING)
    budget = BUDGETS[args.budget]
    budget = replace(budget, targets=tuple(args.targets)) if args.targets else budget
    work = args.work or RESULTS.parents[1] / "runs" / "cifar_resnet56" / budget.name
    work.mkdir(parents=True, exist_ok=True)
    loader = load_module(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = f"python benchmarks/cifar_resnet56.py --budget {budget.name} --data FOLDER"
    if budget.name == "small" and args.workers > 1 and args.shard == "0/1":
        _share_out(args.workers)
    part, parts = (int(one) for one in args.shard.split("/"))
    left = [one for one in plan(work, budget, args.only)[part::parts] if not one.done]
    if left:
        data = Data.load(loader, budget, device)
        dense = evaluate(dense_model(loader, device), data)
    for number, one in enumerate(left):
        try:
            print(one.run(loader, data, dense, deadline), file=sys.stderr, flush=True)
        except OutOfTime:
            print(f"out of time: {len(left) - number} runs are left; give the same command again", file=sys.stderr)
            break
        write(work, args.name, budget, command)
    print(markdown(write(work, args.name, budget, command) or [{"runs": 0}]))


if __name__ == "__main__":
    main()
