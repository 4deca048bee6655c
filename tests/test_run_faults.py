"""What may happen to a run from outside: signals, a second run, a full disk, a folder that goes away, damaged files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from experiment_fixture import tiny
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from pruningawaretraining import files
from pruningawaretraining.cli.main import app
from pruningawaretraining.errors import LONGEST, ConfigError, PruningError
from pruningawaretraining.experiment import record
from pruningawaretraining.experiment.lock import LOCK, Owner, locked
from pruningawaretraining.experiment.run import run_experiment
from pruningawaretraining.experiment.schema import ExperimentConfig
from pruningawaretraining.experiment.train import train_step

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"latency": None, "onnx": None, "data": {"train_fraction": 0.25, "crop": 1, "flip": True}}
STEPS = 5  # of an epoch: 1,297 images, a quarter of them, in batches of 64
EPOCHS = 4


def run(folder: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return run_experiment(ExperimentConfig.model_validate(tiny(out=str(folder), **QUICK, **changes)), resume=resume)


def pat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": 0} for line in (folder / record.METRICS).read_text().splitlines()]


def assert_same(folder: Path, whole: Path) -> None:
    for name in (record.PRUNED, record.DENSE):
        expected, found = load_file(whole / name), load_file(folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert rows_of(folder) == rows_of(whole)
    assert (folder / record.NORMS).read_text() == (whole / record.NORMS).read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def at_step(number: int, then: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something within the so-many-th step of a run, both models counted."""
    taken = [0]

    def step(*arguments: Any) -> Any:
        taken[0] += 1
        if taken[0] == number:
            then()
        return train_step(*arguments)

    monkeypatch.setattr("pruningawaretraining.experiment.train.train_step", step)


# --- signals ---------------------------------------------------------------------------------------------------

FIRST_PRUNED = EPOCHS * STEPS


@pytest.mark.parametrize(
    ("step", "goes_on"),
    [
        (1, "epoch 0, step 1"),
        (STEPS + 3, "epoch 1, step 3"),
        (FIRST_PRUNED + 2, "epoch 0, step 2"),
        (FIRST_PRUNED + 2 * STEPS + 1, "epoch 2, step 1"),  # channels are masked
        (FIRST_PRUNED + 3 * STEPS + 4, "epoch 3, step 4"),  # channels have been removed
        (FIRST_PRUNED + 2 * STEPS, "after epoch 1"),  # the last step of an epoch
    ],
)
def test_a_run_that_is_told_to_end_goes_on_in_the_middle_of_an_epoch(
    step: int, goes_on: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=goes_on):
        run(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / LOCK).exists()
    monkeypatch.undo()
    torch.manual_seed(99)
    run(tmp_path, resume=True)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("prune_at", ["begin", "end"])
def test_being_told_at_every_other_step_changes_nothing(
    prune_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [
        {"start": 0, "end": 2, "target": {"macs": 0.6}, "final_sparsity": 0.3, "criterion": "taylor"},
        {"pattern": "2:4", "layers": ["re:.*conv2"], "start": 6, "end": 14, "every": 4, "unit": "step",
         "target": {"sparsity": 0.5}},
    ]  # fmt: skip
    changes: dict[str, Any] = {"epochs": 3, "dense_baseline": False, "pruning": {"rules": rules}, "prune_at": prune_at}
    run(tmp_path / "whole", **changes)
    for _ in range(8):
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
        try:
            run(tmp_path / "parts", resume=True, **changes)
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
    monkeypatch.undo()
    assert (tmp_path / "parts" / record.SUMMARY).is_file()
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)], ids=str
)
def test_the_exit_code_and_the_line_of_a_run_that_is_told_to_end(number: int, code: int, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny(**{**QUICK, "epochs": 200})))
    command = [sys.executable, "-m", "pruningawaretraining", "run", str(config), "--out", str(tmp_path / "out")]
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    heard = {one: signal.signal(one, handler) for one, handler in usual.items()}  # in the background they are ignored
    try:
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT, start_new_session=True
        )
    finally:
        for one, handler in heard.items():
            signal.signal(one, handler)
    until = time.monotonic() + 120
    while not (tmp_path / "out" / record.CHECKPOINT).is_file() and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert errors.startswith("interrupted; --resume goes on ") and errors.count("\n") == 1
    assert (tmp_path / "out" / record.CHECKPOINT).is_file() and not (tmp_path / "out" / LOCK).exists()


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the step went on")

    at_step(2, twice, monkeypatch)
    said = "no checkpoint has been written yet and nothing can be resumed: start again"
    with pytest.raises(KeyboardInterrupt, match=said):
        run(tmp_path)
    assert not (tmp_path / record.CHECKPOINT).exists()


def test_a_handler_of_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
        run(tmp_path, epochs=1, dense_baseline=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and (tmp_path / record.SUMMARY).is_file()


# --- two runs --------------------------------------------------------------------------------------------------


def lock(folder: Path, **owner: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(owner))


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    lock(tmp_path, pid=os.getppid(), host=socket.gethostname(), began="")
    with pytest.raises(ConfigError, match=f"out: .* is being written by process {os.getppid()} on .* --out, or wait"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_on_another_machine_counts_as_running(tmp_path: Path) -> None:
    lock(tmp_path, pid=1, host="elsewhere", began="")
    with pytest.raises(ConfigError, match="by process 1 on elsewhere.*if that process is gone, delete"):
        run(tmp_path)


def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("kind", ["dead", "another with its number", "empty", "random", "this process"])
def test_what_a_killed_run_has_locked_is_taken_over(kind: str, tmp_path: Path) -> None:
    host = socket.gethostname()
    if kind == "dead":
        lock(tmp_path, pid=dead(), host=host, began="")
    elif kind == "another with its number":
        if not Owner.this().began:
            pytest.skip("the start of a process is not known here")
        lock(tmp_path, pid=os.getppid(), host=host, began="1")
    elif kind == "this process":
        lock(tmp_path, pid=os.getpid(), host=host, began="")
    else:
        (tmp_path / LOCK).write_bytes({"empty": b"", "random": b"\x80\xff{"}[kind])
    with locked(tmp_path):
        assert Owner.of(tmp_path) == Owner.this()
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom pruningawaretraining.experiment.lock import locked\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "try:\n    with locked(Path(sys.argv[1])):\n        print('mine', flush=True)\n        time.sleep(1.5)\n"
        "except ValueError as error:\n    print('refused', flush=True)\n"
    )
    lock(tmp_path, pid=dead(), host=socket.gethostname(), began="")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for _ in range(3)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    said = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    assert said == ["mine", "refused", "refused"]
    assert list(tmp_path.iterdir()) == []


# --- disks and folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "code"),
    [(1, errno.ENOSPC), (4, errno.ENOSPC), (10, errno.EROFS), (10, errno.EDQUOT), (21, errno.EIO), (27, errno.ENOSPC)],
)
def test_a_disk_that_fails_is_one_line_and_the_run_goes_on_later(
    write: int, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = [0]
    sync = os.fsync

    def fsync(handle: int) -> None:
        writes[0] += 1
        if writes[0] == write:
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(PruningError) as caught:
        run(tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("--out: ") and os.strerror(code) in message and str(tmp_path / "run") in message
    assert "\n" not in message and len(message) <= LONGEST
    assert not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_torch_and_safetensors_that_cannot_write_are_one_line_too(tmp_path: Path) -> None:
    """Both say a full disk in errors of their own."""
    script = (
        "import resource, sys, torch\nfrom pruningawaretraining import files, save_pruned\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nbig = torch.nn.Linear(200, 200)\n"
        "for write in (lambda path: torch.save(big.state_dict(), path), None):\n    try:\n"
        "        save_pruned(big, sys.argv[1]) if write is None else files.write_atomically(sys.argv[1], write)\n"
        "    except files.UnwritableError as error:\n        print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("file' cannot be written: ") == 2 == done.stdout.count("\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_deleted_meanwhile_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(tiny(**QUICK)))
    at_step(STEPS + 2, lambda: shutil.rmtree(out), monkeypatch)
    done = pat("run", config, "--out", out)
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: --out: '{out}' has been deleted; its folder is not there and nothing can be resumed: start again. "
        "Allowed: a folder with room\n"
    )
    assert not out.exists()


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is heard, also in a process in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("left", ["the folder", "nothing", "the checkpoint"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_said_of_resuming_is_true(
    left: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second signal ends the run at once, without another checkpoint."""
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(tiny(**QUICK)))

    def end() -> None:
        if left != "the checkpoint":
            shutil.rmtree(out)
        if left == "the folder":
            out.mkdir()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    at_step(STEPS + 2, end, monkeypatch)
    done = pat("run", config, "--out", out)
    assert done.exit_code == 128 + number
    assert ("--resume" in done.stderr) == (left == "the checkpoint"), done.stderr
    assert ("start again" in done.stderr) == (left != "the checkpoint")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny(**QUICK)))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/1/out")):
        done = pat("run", config, "--out", out)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: --out: ") and str(out)[:40] in done.stderr


def test_what_a_kill_leaves_behind_is_cleared_at_the_next_start(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / record.SUMMARY).unlink()
    lock(folder, pid=dead(), host=socket.gethostname(), began="")
    for name in (".checkpoint.pt.abc.tmp", ".model.onnx.a.tmp", ".report.html.x.tmp", f".{LOCK}.x.tmp"):
        (folder / name).write_text("half")
    (folder / ".onnx-abc").mkdir()
    (folder / ".onnx-abc" / "exported.onnx").write_text("half")
    (folder / ".mine.tmp").write_text("the user's")
    run(folder, resume=True)
    assert [path.name for path in folder.glob(".*")] == [".mine.tmp"]


# --- damaged folders -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told to end while channels were masked."""
    folder = tmp_path_factory.mktemp("interrupted")
    patch = pytest.MonkeyPatch()
    at_step(FIRST_PRUNED + 2 * STEPS + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    patch.undo()
    return folder


def with_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = torch.load(folder / record.CHECKPOINT, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, folder / record.CHECKPOINT)

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "an empty checkpoint": written(record.CHECKPOINT, b""),
    "half a checkpoint": lambda folder: (folder / record.CHECKPOINT).write_bytes(
        (folder / record.CHECKPOINT).read_bytes()[:3000]
    ) and None,
    "random bytes": written(record.CHECKPOINT, bytes(range(256))),
    "a list": with_state(lambda state: [1]),
    "no format": with_state(lambda state: state.pop("format") and None),
    "an unknown field": with_state(lambda state: state.update(more=1)),
    "a stage of another kind": with_state(lambda state: state.update(stage="other")),
    "an epoch below 0": with_state(lambda state: state.update(epoch=-3)),
    "an epoch that is text": with_state(lambda state: state.update(epoch="3")),
    "more rows than there are": with_state(lambda state: state.update(rows=50)),
    "no model": with_state(lambda state: state["training"].pop("model") and None),
    "another model": with_state(lambda state: state["training"].update(model={"a": torch.ones(2)})),
    "an optimizer that is none": with_state(lambda state: state["training"].update(optimizer={})),
    "a pruner that is none": with_state(lambda state: state["training"].update(pruner=None)),
    "no random numbers": with_state(lambda state: state.update(rng={})),
    "short random numbers": with_state(lambda state: state["rng"].update(cpu=torch.ones(3, dtype=torch.uint8))),
    "sums that are none": with_state(lambda state: state["within"].update(loss="x")),
    "no metrics": lambda folder: (folder / record.METRICS).unlink(),
    "metrics in another encoding": written(record.METRICS, "größer".encode("utf-16")),
    "metrics that are numbers": written(record.METRICS, b"1\n2\n3\n4\n5\n6\n"),
    "metrics without their keys": written(record.METRICS, b"{}\n" * 6),
    "norms that are a list": written(record.NORMS, b"[]"),
    "norms without epochs": written(record.NORMS, b'{"epochs": 3}'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_not_gone_on_with(damage: str, interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    DAMAGES[damage](folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PruningError) as caught:
        run(folder, resume=True)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= LONGEST
    assert str(folder) in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"dense": 3}'])
@pytest.mark.parametrize("command", ["report", "latency", "resume"])
def test_a_damaged_summary_is_one_line(content: bytes, command: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / record.REPORT).unlink()
    (folder / record.SUMMARY).write_bytes(content)
    with pytest.raises(PruningError, match=r"summary.json'? ?(cannot be read|:)") as caught:
        if command == "latency":
            from pruningawaretraining.experiment.timing import candidates

            candidates([str(folder)])
            raise ConfigError("summary.json: nothing of it is used")
        if command == "resume":
            run(folder, resume=True)
        else:
            from pruningawaretraining.report.html import write_report

            write_report(folder)
    assert len(str(caught.value)) <= LONGEST and "\n" not in str(caught.value)
