"""Files that are damaged or of another kind: one line that names the file, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pruningawaretraining import export_onnx, files, save_pruned
from pruningawaretraining.analysis.checkpoints import read_weights
from pruningawaretraining.checkpoint.files import read_file
from pruningawaretraining.cli.main import app
from pruningawaretraining.config.caps import read_caps
from pruningawaretraining.config.load import read_mapping
from pruningawaretraining.errors import LONGEST, PruningError
from pruningawaretraining.experiment.build import load_weights
from pruningawaretraining.experiment.record import Recorder
from pruningawaretraining.experiment.state import load_state
from pruningawaretraining.export.program import export_program
from pruningawaretraining.integrations.common import read_state
from pruningawaretraining.report.run import load_run
from pruningawaretraining.session.sharded_checkpoint import read_pruner_state

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x80",
    "random bytes": random.Random(0).randbytes(500),
    "another encoding": "größer".encode("latin-1"),
    "UTF-16": "{}".encode("utf-16"),
    "NUL": b"\0" * 100,
    "half of JSON": b'{"a": [1, 2',
    "deep JSON": b"[" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list": b"[1]",
    "a text": b'"text"',
    "a pickle": b"\x80\x02cos\nsystem\n(S'true'\ntR.",
    "a zip without anything": b"PK\x05\x06" + b"\0" * 18,
    "a header of 2**60 bytes": (2**60).to_bytes(8, "little") + b"{}",
}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config in JSON": ("c.json", read_mapping),
    "config in YAML": ("c.yaml", read_mapping),
    "caps": ("caps.json", lambda path: read_caps(str(path))),
    "pruned model": ("m.safetensors", read_file),
    "weights, safetensors": ("w.safetensors", read_weights),
    "weights, torch": ("w.pt", read_weights),
    "dense weights, safetensors": ("d.safetensors", lambda path: load_weights(torch.nn.Linear(1, 1), str(path))),
    "dense weights, torch": ("d.pt", lambda path: load_weights(torch.nn.Linear(1, 1), str(path))),
    "checkpoint of a run": ("checkpoint.pt", lambda path: load_state(path.parent, {})),
    "state of a trainer": ("pruner.pt", lambda path: read_state(path.parent)["a"]),
    "state beside shards": ("pruner.pt", lambda path: read_pruner_state(path.parent)["a"]),
    "summary": ("summary.json", lambda path: load_run(path.parent)),
    "metrics": ("metrics.jsonl", lambda path: Recorder(path.parent, rows=1)),
    "norms": ("norms.json", lambda path: Recorder(path.parent, norms=1)),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(reader: str, content: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    with pytest.raises(PruningError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= LONGEST
    assert name in message or (reader, content) == ("metrics", "nothing")
    assert path.read_bytes() == CONTENTS[content]


@pytest.mark.parametrize("part", [0, 1, 30, 200, -1])
def test_torch_files_that_end_early(part: int, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a.weight": torch.ones(100, 100)}, path)
    whole = path.read_bytes()
    assert files.read_torch(path)["a.weight"].shape == (100, 100)
    path.write_bytes(whole[:part])
    with pytest.raises(PruningError, match="w.pt' cannot be read: "):
        files.read_torch(path)


def test_nothing_in_a_torch_file_is_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(PruningError, match="evil.pt' cannot be read") as caught:
        files.read_torch(tmp_path / "evil.pt")
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_what_can_be_read_is(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors", {"who": "me"})
    tensors, metadata = files.read_safetensors(tmp_path / "a.safetensors")
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"who": "me"}
    files.write_text(tmp_path / "b.json", json.dumps({"ü": [1]}))
    assert files.read_object(tmp_path / "b.json") == {"ü": [1]}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(PruningError, match="c.json' cannot be read: Permission denied"):
        files.read_text(path)


@pytest.mark.parametrize("reader", ["state of a trainer", "state beside shards", "checkpoint of a run"])
def test_a_torch_file_of_something_else_is_no_state(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    torch.save([torch.ones(2)], tmp_path / name)
    with pytest.raises(
        PruningError, match=f"{name}' (cannot be read: it holds a list, not a state|is not a checkpoint)"
    ):
        read(tmp_path / name)


# --- where files are written ----------------------------------------------------------------------------------------


def saved(path: Path) -> object:
    return save_pruned(torch.nn.Linear(2, 2), path)


def exported(path: Path) -> object:
    return export_onnx(torch.nn.Linear(2, 2), torch.zeros(1, 2), path)


def exported_program(path: Path) -> object:
    return export_program(torch.nn.Linear(2, 2), torch.zeros(1, 2), path)


def converted(path: Path) -> object:
    config = path.parent / "pruning.yaml"
    config.write_text("rules: [{target: {sparsity: 0.5}}]")
    done = CliRunner().invoke(app, ["convert", str(config), "--out", str(path)])
    if done.exit_code:
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        raise PruningError(done.stderr.removeprefix("error: "))
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "write_text": ("a.txt", lambda path: files.write_text(path, "text")),
    "save_pruned": ("m.safetensors", saved),
    "export_onnx": ("m.onnx", exported),
    "export_program": ("m.pt2", exported_program),
    "pat convert": ("c.yaml", converted),
}


def to_a_device(path: Path) -> None:
    path.symlink_to("/dev/full")


def in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo, "device": to_a_device, "circle of links": in_a_circle, "folder": Path.mkdir
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_not_replaced(
    writer: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write = WRITERS[writer]
    NO_FILES[kind](tmp_path / name)
    before = os.lstat(tmp_path / name)
    for work in ("pruningawaretraining.export.onnx.build_graph", "pruningawaretraining.checkpoint.pruned.summary_of"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("the long work has begun"))
    with pytest.raises(PruningError) as caught:
        write(tmp_path / name)
    assert f"is a {kind}. Allowed: " in str(caught.value) and str(tmp_path / name) in str(caught.value)
    after = os.lstat(tmp_path / name)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [one.name for one in tmp_path.iterdir() if one.name not in ("pruning.yaml", name)] == []


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_symbolic_link_stays_and_its_file_is_written(writer: str, there: bool, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    (tmp_path / "other").mkdir()
    place = tmp_path / "other" / f"real-{name}"
    if there:
        place.write_text("old")
    (tmp_path / name).symlink_to(Path("other") / f"real-{name}")
    write(tmp_path / name)
    assert (tmp_path / name).is_symlink() and not place.is_symlink()
    assert place.stat().st_size > 3 and place.read_bytes() == (tmp_path / name).read_bytes()
    assert [one.name for one in place.parent.iterdir()] == [place.name]
