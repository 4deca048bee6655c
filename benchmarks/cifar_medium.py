"""ResNet-20 on CIFAR-10, 10 epochs of all images for every row: the medium form of the CIFAR table, for CPU cores.

    OMP_NUM_THREADS=1 python benchmarks/cifar_medium.py --data FOLDER [--only KEY ...] [--work FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/cifar_medium.py --data FOLDER --choose KEY --rates 0.01 0.02 --epochs 4

FOLDER is that of ``cifar_resnet56.py``, whose ``--budget medium`` this is. A run is one process with one thread; start
one process for each core: they share what is left by lock files. A run keeps its state in --work after every epoch, so
a call that was stopped is gone on with by the same command. Its result is added to the table when it is done, and
results of earlier calls stay: they are in the table's file.

--choose trains one row without the last 2,000 training images, at each of --rates, and tests on these: settings are
chosen so, and never on test images. (The pretrained weights have seen these images, as all others.) The rows train on
all 50,000 images, and report the 10,000 test images after the last epoch. Rows of torchao need it installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar_medium_training import Form, Images, Run
from cifar_medium_ways import QUEUE, WAYS
from common import RESULTS, markdown, save
from one_shot_cifar import load_module

NAME = "cifar_medium"
HELD_OUT = 2_000
TITLE = "ResNet-20 on CIFAR-10: 10 epochs for every row (medium form)"
NOTE = (
    "Top-1 in percent on the 10,000 test images after the last epoch; with several seeds mean and standard deviation. "
    "The same for every row: pretrained weights ({dense:.2f}), 50,000 training images, 10 epochs, batches of 128, SGD "
    "(Nesterov momentum 0.9, rate {rate:g} after a warm-up of {warm:g} epochs, then a cosine to 0; weight decay 5e-4, "
    "none beside a growing penalty, as in Torch-Pruning's recipe), crops and flips drawn from the seed, bfloat16 "
    "autocast in the training and float32 in the test. Distillation: 0.3 of the loss is the task's and 0.7 the dense "
    "pretrained network's, at temperature 4, from the first step on. 'Averaged' is the same run with a moving average "
    "of the weights of its last {averaged} epochs (decay {decay:g}) and norms measured anew on 50 augmented batches. "
    "Channels go inside blocks only: option-A shortcuts fix the others. Masks leave the first convolution dense. CPU s "
    "are those of the training, on a busy machine. {chosen}"
)
NOT_CHOSEN = "No setting was tried before: the rate lies between Torch-Pruning's 0.01 and the 0.05 of an earlier table."


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of means over seeds, in the order of the ways."""
    rows = []
    for way in WAYS:
        for target in way.targets:
            same = [one for one in runs if (one["way"], one["target"]) == (way.key, target)]
            if same:
                macs = statistics.mean(one["reduction"] for one in same)
                rows.append(
                    {
                        "pruned": way.what if target == 1.0 else f"{way.what}, {target}x",
                        "who": way.who,
                        "way": way.label,
                        "MACs, times fewer": f"{macs:.3f}",
                        "weights that are 0": f"{statistics.mean(one['zeros'] for one in same):.1%}",
                        "accuracy": spread([one["after"] for one in same]),
                        "averaged": spread([one["averaged"] for one in same]),
                        "seeds": len(same),
                        "CPU s": round(statistics.mean(one["seconds"] for one in same)),
                    }
                )
    return rows


def collected(work: Path, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All runs and all trials: those that the result holds already, and those of the folder, which go before."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    found = [json.loads(one.read_text()) for one in sorted(work.glob("*-seed*.json"))]
    runs = {(one["key"], one["seed"]): one for one in known.get("runs", [])}
    runs |= {(one["key"], one["seed"]): one for one in found if "accuracies" not in one}
    trials = {(one["key"], one["epochs"], one["rate"]): one for one in known.get("trials", [])}
    trials |= {(one["key"], one["epochs"], one["rate"]): one for one in found if "accuracies" in one}
    return list(runs.values()), list(trials.values())


def write(work: Path, form: Form, name: str) -> list[dict[str, Any]]:
    """The table of all runs, and its page."""
    runs, trials = collected(work, name)
    rows = table(runs)
    if not rows:
        return []
    chosen = f"The rate was chosen on {HELD_OUT:,} training images that the trials did not train on: " + "; ".join(
        f"{one['key']}, {one['epochs']} epochs, {one['rate']:g}: {one['after']:.2f}" for one in trials
    )
    note = NOTE.format(
        dense=runs[0]["dense"],
        rate=form.rate,
        warm=form.warm,
        averaged=form.averaged,
        decay=form.momentum,
        chosen=f"{chosen}." if trials else NOT_CHOSEN,
    )
    command = "OMP_NUM_THREADS=1 python benchmarks/cifar_medium.py --data FOLDER"
    save(name, rows, TITLE, note, command, {"runs": runs, "trials": trials})
    return rows


def taken(one: Run) -> bool:
    """Whether another process has this run, which a lock with the number of a process that lives says."""
    try:
        os.kill(int(one.lock.read_text()), 0)
    except (OSError, ValueError):
        one.lock.write_text(str(os.getpid()))
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CIFAR_DATA", "data")))
    parser.add_argument("--only", nargs="+", default=list(QUEUE), help="rows, in this order: KEY or KEY-TARGET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=RESULTS.parents[1] / "runs" / NAME)
    parser.add_argument("--choose", metavar="KEY", help="a row to try --rates with, on held-out training images")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.02, 0.05])
    parser.add_argument("--epochs", type=int, default=Form.epochs, help="of --choose")
    parser.add_argument("--name", default=NAME, help="of the result")
    args = parser.parse_args()
    if not (args.data / "load.py").is_file():
        print("skipped: this benchmark needs --data FOLDER", file=sys.stderr)
        return
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    form, loader = Form(), load_module(args.data)
    trial = replace(form, epochs=args.epochs, held_out=HELD_OUT, averaged=1)
    forms = [replace(trial, rate=rate) for rate in args.rates] if args.choose else [form]
    wanted = [args.choose] if args.choose else args.only
    known = {Run(args.work, way, target, 0, form).key: (way, target) for way in WAYS for target in way.targets}
    for key in wanted:
        if key not in known:
            parser.error(f"--only: {key!r} is no row. Allowed: {', '.join(known)}")
    done = {(one["key"], one["seed"]) for one in collected(args.work, args.name)[0]}
    images = Images(loader, forms[0])
    for seed in args.seeds:
        for key in wanted:
            for each in forms:
                one = Run(args.work, *known[key], seed, each)
                if one.file.is_file() or (not args.choose and (key, seed) in done) or taken(one):
                    continue
                print(one.run(loader, images), file=sys.stderr, flush=True)
                one.lock.unlink(missing_ok=True)
                write(args.work, form, args.name)
    print(markdown(write(args.work, form, args.name) or [{"runs": 0}]))


if __name__ == "__main__":
    main()
