"""Runs every benchmark that fits a CPU; each writes its part of docs/benchmarks.md.

    OMP_NUM_THREADS=1 python benchmarks/run_all.py [--data FOLDER] [--only NAME ...] [--list]

FOLDER is what the benchmarks with pretrained CIFAR-10 networks take as --data; without it they are skipped. A benchmark
that fails is named at the end, and the others run all the same.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from make_docs import HERE, scripts

VARIANTS: dict[str, tuple[str, ...]] = {
    "cifar_resnet56": ("--budget small",),
    "proximal": ("", "--removable-only"),
}
"""Options of benchmarks that need some; one run for each. The others run as they are."""


NEED_A_GPU = ("gpu",)
"""Benchmarks that a CPU cannot run; `--only` runs them all the same."""

TAKE_HOURS = ("cifar_medium", "family", "structures")
"""Benchmarks of many trainings, to be run beside other work by the commands that their files name."""


def commands(names: list[str], data: Path | None) -> list[list[str]]:
    """What is run: a script and its options."""
    found = []
    for name in names:
        takes_data = "--data FOLDER" in (HERE / f"{name}.py").read_text(encoding="utf-8")
        given = ["--data", str(data)] if data is not None and takes_data else []
        found += [[f"{name}.py", *shlex.split(options), *given] for options in VARIANTS.get(name, ("",))]
    return found


def main() -> None:
    known = list(scripts(HERE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    usual = [name for name in known if name not in (*NEED_A_GPU, *TAKE_HOURS)]
    parser.add_argument("--only", nargs="+", choices=known, default=usual)
    parser.add_argument("--list", action="store_true", help="say what would be run")
    args = parser.parse_args()
    failed = []
    for command in commands(args.only, args.data):
        line = shlex.join(["python", f"benchmarks/{command[0]}", *command[1:]])
        print(line, flush=True)
        if (
            not args.list
            and subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False).returncode
        ):
            failed.append(line)
    if failed:
        raise SystemExit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
