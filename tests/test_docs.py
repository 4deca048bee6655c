"""The documentation runs: its Python, its configs, its commands, its links, and what it says about the code."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from click.exceptions import Exit
from torch import nn

import pruningawaretraining
from pruningawaretraining import Pruning, load_config, registry
from pruningawaretraining.cli.main import app
from pruningawaretraining.config.dialects.flat import FlatConfig
from pruningawaretraining.config.dialects.intel_keys import PrunerKeys
from pruningawaretraining.config.dialects.sirc_keys import ChannelArgs, MacParams, Regularize, SliceArgs
from pruningawaretraining.config.load import read_mapping
from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.experiment.schema import load_experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```\n(?:<!-- setup\n(?P<setup>.*?)^-->\n)?',
    re.DOTALL | re.MULTILINE,
)
OPTIONAL = ("torchao", "executorch")
"""Packages that a page may use and that need not be there."""
LANGUAGES = {"python", "bash", "json", "yaml", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, what it holds, and the hidden setup of a Python block."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    setup: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], match["title"], match["text"], match["setup"] or "")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


@functools.cache
def tool(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_fence_is_read() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks_of(page))), page.name
    assert len(of("python")) >= 6


@pytest.fixture
def own_registry() -> Iterator[None]:
    """What a page's code registers is forgotten after it; what it imports stays known."""
    before = {kind: set(entries) for kind, entries in registry._ENTRIES.items()}
    yield
    for kind, entries in registry._ENTRIES.items():
        for name in set(entries) - before.get(kind, set()):
            if entries[name].__module__ == "__main__":
                del entries[name]


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in OPTIONAL:
        if f"from {package}" in block.setup + block.text:
            pytest.importorskip(package)
    for other in blocks_of(block.page):
        if other.title is not None:
            Path(other.title).write_text(other.text, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block.setup, f"setup of {block}", "exec"), namespace)
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), namespace)
    pruner = namespace.get("pruner")
    if pruner is not None:
        assert pruner.phase in ("finetune", "done"), "the loop that is shown reaches its target"


@pytest.mark.parametrize("block", of("json", "yaml"))
def test_configs_load(block: Block, tmp_path: Path) -> None:
    path = tmp_path / f"config.{block.language}"
    path.write_text(block.text, encoding="utf-8")
    values = read_mapping(path)
    if "model" in values:
        assert load_experiment(path).pruning.rules
    else:
        assert load_config(path).rules


def commands() -> list[Any]:
    found = []
    for block in BLOCKS:
        if block.language == "bash":
            lines = [line.strip() for line in block.text.splitlines()]
            found += [pytest.param(line, id=f"{block}-{line}") for line in lines if line.startswith("pat ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    program, name, *arguments = shlex.split(line, comments=True)
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    try:
        command.make_context(f"{program} {name}", arguments)  # parses and checks, and runs nothing
    except Exit as exit_:
        assert exit_.exit_code == 0


@pytest.mark.parametrize("page", sorted({*PAGES, *ROOT.glob("*.md")}), ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            assert heading in headings(file), target
    size = sum(picture.stat().st_size for picture in (ROOT / "docs" / "images").iterdir())
    assert size < 500_000


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", text, flags=re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}
    assert pages <= named, "add the page to nav in mkdocs.yml"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    # --quiet would count no warning
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "pruningawaretraining.Pruning" in api
    loop = (tmp_path / "site" / "tutorials" / "loop.html").read_text(encoding="utf-8")
    assert "regularisation.html" in loop and "<!-- setup" not in loop
    assert (tmp_path / "site" / "examples" / "qat.py").is_file()
    changes = (tmp_path / "site" / "CHANGELOG.html").read_text(encoding="utf-8")
    assert 'href="migration/torch_pruning.html"' in changes


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.md", "reference.md"])
def test_tables_are_what_the_code_says(name: str) -> None:
    make_tables = tool("docs/make_tables.py")
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert make_tables.updated(text) == text, "run: python docs/make_tables.py"
    assert set(re.findall(r"begin: (\w+)", text)) <= make_tables.TABLES.keys()


def test_every_table_has_its_place() -> None:
    pages = [page for page in PAGES if page.name != "reliability.md"]  # whose counts are measured
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert set(re.findall(r"<!-- begin: (\w+) -->", text)) == tool("docs/make_tables.py").TABLES.keys()


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("### The flat form", FlatConfig),
        ("#### channel_sparsity_args", ChannelArgs),
        ("#### regularize", Regularize),
        ("#### MAC_params", MacParams),
        ("#### slice_sparsity_args", SliceArgs),
        ("#### Keys of a pruner", PrunerKeys),
    ],
)
def test_every_key_of_other_forms_is_translated_in_the_docs(heading: str, model: Any) -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    section = re.split(r"^#", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    section = section[section.index("\n|") :].partition("\n\n")[0]  # its first table
    rows = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    others = re.findall(r"`(\w+)`", " ".join(re.findall(r"\bAlso (.*?) \|$", section, flags=re.MULTILINE)))
    assert set(model.model_fields) == {*rows, *others}
    assert len(rows) == len(set(rows))


def test_exported_functions_are_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    public = [name for name in pruningawaretraining.__all__ if not name.startswith("__")]
    assert [name for name in public if name not in text] == []


def test_tests_that_the_design_names_are_there() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = re.findall(r"(tests/\w+\.py)::(\w+)", text)
    assert len(named) >= 8
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


# --- benchmarks -------------------------------------------------------------------------------------------------


def test_benchmarks_page_is_what_the_results_say() -> None:
    make_docs = tool("benchmarks/make_docs.py")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    sections = [make_docs.section(one) for one in make_docs.read_results(ROOT / "benchmarks" / "results")]
    for section in sections:
        assert section in page, "run: python benchmarks/make_docs.py"
    assert page.partition("## Not run yet")[0].count("\n## ") == len(sections)
    pages = make_docs.pages()
    stale = [page.name for page, text in pages.items() if page != make_docs.TARGET and page.read_text() != text]
    assert stale == [], "run: python benchmarks/make_docs.py"


def test_a_benchmark_that_saves_its_result_leaves_the_pages_in_step(tmp_path: Path) -> None:
    for folder in ("benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    speed = tmp_path / "docs" / "speed.md"
    speed.write_text("# Speed\n\n<!-- result: step_overhead -->\n<!-- end result -->\n", encoding="utf-8")
    script = tmp_path / "benchmarks" / "quick.py"
    script.write_text("import common\ncommon.save('step_overhead', [{'model': 'lenet', 'ms': 1234.5}], 'Overhead')\n")
    done = subprocess.run([sys.executable, str(script), "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = "```bash\npython benchmarks/quick.py --fast\n```\n\n| model | ms |\n| --- | --- |\n| lenet | 1,234 |\n"
    assert f"## Overhead\n\n{table}" in page and table in speed.read_text(encoding="utf-8")
    others = [one["title"] for one in tool("benchmarks/make_docs.py").read_results(ROOT / "benchmarks" / "results")]
    assert [title for title in others if f"\n## {title}\n" not in page] == ["Regulariser and masks in a training step"]


def test_a_place_for_a_result_that_is_not_there_says_so() -> None:
    page = "A\n<!-- result: speed -->\nold\n<!-- end result -->\nB\n"
    made = tool("benchmarks/make_docs.py").embedded(page, [])
    assert made == "A\n<!-- result: speed -->\nNot measured yet.\n<!-- end result -->\nB\n"


def test_benchmarks_page_of_some_results(tmp_path: Path) -> None:
    make_docs = tool("benchmarks/make_docs.py")
    assert make_docs.read_results(tmp_path / "absent") == []
    rows = [{"model": "a|b", "ms": 1.23456}, {"model": "c", "ms": 20630.4, "extra": None}]
    result = {"title": "Speed", "note": "quiet", "command": "python mac_target.py --steps 4", "rows": rows}
    (tmp_path / "speed_gpu.json").write_text(json.dumps({**result, "versions": {"torch": "2.6", "timm": "absent"}}))
    page = make_docs.document(make_docs.read_results(tmp_path), {"speed": "Is it fast?", "size": "Is it small?"})
    assert "## Speed\n\n```bash\npython benchmarks/mac_target.py --steps 4\n```" in page
    assert "| model | ms | extra |\n| --- | --- | --- |\n| a\\|b | 1.235 |  |\n| c | 20,630 |  |\n\nquiet" in page
    assert "<sub>torch 2.6</sub>" in page
    assert "## Not run yet\n\n- `python benchmarks/size.py`: Is it small?" in page
    assert "Is it fast?" not in page
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of a benchmark"):
        make_docs.read_results(tmp_path)


# --- what the README says is not supported ----------------------------------------------------------------------


class Shared(nn.Module):
    """The first two layers have one weight, the third is parametrised, and only the fourth can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.fourth, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.third, self.fourth):
            x = torch.relu(layer(x))
        out: torch.Tensor = self.out(x)
        return out


def test_shared_and_parametrised_layers_and_outputs_stay() -> None:
    pruner = Pruning(Shared(), {"rules": [{"target": {"sparsity": 0.5}}]}, example_inputs=torch.randn(2, 8))
    assert [group["source"] for group in pruner.describe_sets()] == ["fourth"]


@pytest.mark.parametrize("pattern", ["slice", "4x1", "2:4", "unstructured"])
def test_patterns_that_the_docs_call_masked_are(pattern: str) -> None:
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    assert "masks slices, blocks, N:M and single weights" in text
    rule = {"pattern": pattern, "layers": ["first"], "target": {"sparsity": 0.5}}
    pruner = Pruning(Shared(), {"rules": [rule]}, example_inputs=torch.randn(2, 8))
    pruner.prune(epoch=0)
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize("criterion", ["snip", "taylor"])
def test_channel_rules_that_have_heard_nothing_say_so_as_the_reference_does(criterion: str) -> None:
    text = " ".join((ROOT / "docs" / "reference.md").read_text(encoding="utf-8").split())
    assert "without a step before it, and without `calibrate_with`, it is an error" in text
    rule = {"criterion": criterion, "target": {"sparsity": 0.5}}
    pruner = Pruning(Shared(), {"rules": [rule]}, example_inputs=torch.randn(2, 8))
    with pytest.raises(ModelError, match="listens to training, and no step has been taken yet"):
        pruner.prune(epoch=0)


@pytest.mark.parametrize("option", [{"mode": "unprune"}, {"keep_zeros": True}, {"progressive": 4}])
def test_keys_that_the_docs_say_channels_refuse_are(option: dict[str, Any]) -> None:
    assert "they are refused" in (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="is not supported by the pattern"):
        Pruning(Shared(), {"rules": [{"target": {"sparsity": 0.5}, **option}]}, example_inputs=torch.randn(2, 8))


def test_two_rules_for_one_set_are_refused() -> None:
    rule = {"layers": ["fourth"], "target": {"sparsity": 0.5}}
    with pytest.raises(ConfigError, match="pruned by"):
        Pruning(Shared(), {"rules": [rule, rule]}, example_inputs=torch.randn(2, 8))
