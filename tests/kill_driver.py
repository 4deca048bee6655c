"""Runs ``pat run --resume`` in processes that are killed with SIGKILL, again and again, until the run is finished.

Usage: kill_driver.py CONFIG FOLDER KILLS SEED. Everything is imported once, each run is a fork. Runs are killed until
there have been so many kills, and some in every phase of pruning. Prints JSON: how long the uninterrupted run took and
every kill, with what the run was doing.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pruningawaretraining import files
from pruningawaretraining.cli import main as cli
from pruningawaretraining.engine import removal as transaction
from pruningawaretraining.experiment import data, datasets, finish, run, runner  # noqa: F401  (imported once, here)
from pruningawaretraining.masks import removal
from pruningawaretraining.models import surgery

Sabotage = Callable[[], None]
MOST_CHAINS = 30


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, last_words: Callable[..., None] | None = None) -> Sabotage:
    """Die at the so-many-th call of a function, after some last words."""

    def arm() -> None:
        whole, left = getattr(owner, name), [number]

        def sabotaged(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if last_words is not None:
                    last_words(*args, **kwargs)
                die()
            return whole(*args, **kwargs)

        setattr(owner, name, sabotaged)

    return arm


def in_the_removal(sabotage: Sabotage) -> Sabotage:
    """Arm it when the removal begins: the one that is rehearsed before calls the same functions."""

    def arm() -> None:
        whole = transaction.remove

        def removing(*args: Any, **kwargs: Any) -> Any:
            sabotage()
            return whole(*args, **kwargs)

        transaction.remove = removing

    return arm


def half_a_file(value: Any, path: str) -> None:
    whole_save(value, path)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


whole_save = torch.save
PRECISE: dict[str, Sabotage] = {
    "removal begins": in_the_removal(at_call(removal, "_slice_module", 1)),
    "removal, tensors half in place": in_the_removal(at_call(surgery.Surgery, "set_attribute", 9)),
    "removal, optimizer half followed": in_the_removal(at_call(surgery.Surgery, "rename_key", 3)),
    "removed, not saved": at_call(runner, "difference", 1),
    "checkpoint half written": at_call(torch, "save", 4, half_a_file),
    "checkpoint written, not synced": at_call(files.os, "fsync", 10),
    "checkpoint synced, not renamed": at_call(files.os, "replace", 12),
    "last checkpoint half written": at_call(torch, "save", 12, half_a_file),
}


def start(config: str, out: Path, sabotage: Sabotage | None = None) -> int:
    """Fork a run; returns the process's number."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(log, 2)
    sys.argv = ["pat", "run", config, "--out", str(out), "--resume"]
    if sabotage is not None:
        sabotage()
    code = 1
    try:
        cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def spent(child: int, begun: float) -> float:
    """Processor seconds of a process: those of the clock would kill each at its start once the machine is busy."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no such file system here
        return time.monotonic() - begun
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(child: int, seconds: float) -> int | None:
    """The exit status (negative: killed by that signal), or None if the process still runs after so many seconds."""
    begun = time.monotonic()
    while spent(child, begun) < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def doing(out: Path) -> str:
    """What the run was doing since its last checkpoint."""
    if not (out / "checkpoint.pt").is_file():
        return "starting"
    state = torch.load(out / "checkpoint.pt", weights_only=True)  # at any moment it is whole
    pruner = state["training"].get("pruner")
    if state["stage"] == "dense" or not state["training"]:
        return "dense"
    return str(pruner["channels"]["rules"][0]["phase"])


def chain(config: str, out: Path, seconds: float, rng: random.Random) -> list[str]:
    """Kill a run at random moments until it is finished."""
    kills = []
    while True:
        child = start(config, out)
        status = wait(child, rng.uniform(0.05, 0.6) * seconds)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills.append(doing(out))
        elif status == 0:
            return kills
        else:
            raise RuntimeError(f"the run failed with {status}: {out.with_suffix('.log').read_text()[-2000:]}")


def enough(chains: list[list[str]], kills: int) -> bool:
    """Whether there have been so many kills, and some in every phase: how many a chain has depends on the machine."""
    moments = [moment for chain in chains for moment in chain]
    return len(moments) >= kills and {"dense", "regularize", "prune", "finetune"} <= set(moments)


def main(config: str, folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    rng, base = random.Random(int(seed)), Path(folder)
    assert wait(start(config, base / "whole"), 600) == 0, (base / "whole.log").read_text()[-2000:]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = usage.ru_utime + usage.ru_stime
    precise = {}
    for number, (name, sabotage) in enumerate(PRECISE.items()):
        out = base / f"precise{number}"
        status = wait(start(config, out, sabotage), 600)
        precise[name] = [status, doing(out)]
        assert wait(start(config, out), 600) == 0, out.with_suffix(".log").read_text()[-2000:]
    random_kills: list[list[str]] = []
    while not enough(random_kills, int(kills)) and len(random_kills) < MOST_CHAINS:
        random_kills.append(chain(config, base / f"chain{len(random_kills):02}", seconds, rng))
    print(json.dumps({"seconds": seconds, "precise": precise, "random": random_kills}))


if __name__ == "__main__":
    main(*sys.argv[1:])
