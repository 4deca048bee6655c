"""Rules of the code that a machine can check; docs/design.md has the list of rooms in import order."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pruningawaretraining.config.yaml_form import loader_for

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pruningawaretraining"
NAME = PACKAGE.name
ENTRANCES = ("__init__.py", "__main__.py")
FLAT, FILE, CLASS, FUNCTION = 6, 300, 250, 45
"""Most modules beside the packages, and most lines of a file, a class and a function."""
LONG_FILES: set[str] = set()
LONG_CLASSES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""What is longer, still: these lists only get shorter."""
CONFIG_MAY_IMPORT = ("config", "errors", "files", "registry", "schedules")


def layout() -> list[str]:
    """The entries of the list in docs/design.md: modules as "errors.py", packages as "costs/"."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = text.partition("<!-- layout -->\n```text\n")[2].partition("```")[0]
    return re.findall(r"^(\w+\.py|\w+/) ", block, flags=re.MULTILINE)


def modules() -> dict[str, Path]:
    """Dotted name (within the package) -> file, of every module of the library."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
EVERY = [pytest.param(name, id=name or NAME) for name in MODULES]


def own_imports(name: str) -> set[str]:
    """The modules of the library that a module imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {one.removeprefix(NAME).removeprefix(".") for one in found if one.split(".")[0] == NAME}
    return {_module(one) for one in own} - {name}


def _module(dotted: str) -> str:
    """The module that an imported name is, or is in."""
    while dotted and dotted not in MODULES:
        dotted = dotted.rpartition(".")[0]
    return dotted


def entry_of(name: str) -> str:
    """The entry of the layout list that a module belongs to."""
    head = name.split(".")[0]
    return f"{head}/" if (PACKAGE / head).is_dir() else f"{head}.py"


def test_the_list_has_every_module_once() -> None:
    listed = layout()
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()}
    there = {one for one in there if one.endswith(".py") or (PACKAGE / one / "__init__.py").is_file()}
    assert len(listed) == len(set(listed))
    assert sorted(set(listed) - there) == [], "listed in docs/design.md, but not there"
    assert sorted(there - set(listed) - set(ENTRANCES)) == [], "add a line to the list in docs/design.md"


@pytest.mark.parametrize("name", [param for param in EVERY if param.values[0] not in ("", "__main__")])
def test_imports_only_go_down_the_list(name: str) -> None:
    order = {entry: number for number, entry in enumerate(layout())}
    here = entry_of(name)
    for other in own_imports(name):
        assert other, f"{name} imports the package itself"
        there = entry_of(other)
        if here != there and {here, there} <= order.keys():  # what is not listed fails once, above
            assert order[there] < order[here], f"{name} imports {other}, which is further down the list"


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name: {one for one in own_imports(name) if one} for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_configs_know_names_and_not_models() -> None:
    for name in MODULES:
        if name.split(".")[0] == "config":
            assert {one.split(".")[0] for one in own_imports(name)} <= set(CONFIG_MAY_IMPORT), name


def test_torch_pruning_is_imported_in_one_module() -> None:
    importing = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(one.split(".")[0] == "torch_pruning" for one in imported):
                importing.add(name)
    assert importing == {"patterns.dependency"}


def test_few_modules_lie_flat_at_the_top() -> None:
    flat = [path.name for path in PACKAGE.glob("*.py") if path.name not in ENTRANCES]
    assert len(flat) <= FLAT, flat


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined, no-any-return]


def test_files_classes_and_functions_are_short() -> None:
    files = {name for name, path in MODULES.items() if len(path.read_text(encoding="utf-8").splitlines()) > FILE}
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    classes = {node.name for _, node in nodes if isinstance(node, ast.ClassDef) and lines_of(node) > CLASS}
    functions = {
        f"{name}.{node.name}"
        for name, node in nodes
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and lines_of(node) > FUNCTION
    }
    assert files == LONG_FILES, "a list above names what is longer still"
    assert classes == LONG_CLASSES
    assert functions == LONG_FUNCTIONS


HEAVY = ("torchvision", "torch._dynamo", "matplotlib")
COST = """
import sys, time, torch
start = time.process_time()
{code}
print(time.process_time() - start, *(name for name in {heavy} if name in sys.modules ))
"""


def cost_of(code: str) -> tuple[float, list[str]]:
    """CPU seconds of some code beyond ``import torch``, and the heavy packages that it loads."""
    script = COST.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *loaded = done.stdout.splitlines()[-1].split()
    return float(seconds), loaded


def test_importing_the_package_is_cheap() -> None:
    seconds, loaded = cost_of("import pruningawaretraining")
    assert loaded == []
    assert seconds <= 1.0


def test_help_of_the_command_line_is_cheap() -> None:
    code = "from typer.testing import CliRunner\nfrom pruningawaretraining.cli.main import app\n"
    code += "assert 'sensitivity' in CliRunner().invoke(app, ['--help']).output"
    seconds, loaded = cost_of(code)
    assert loaded == []
    assert seconds <= 1.5


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a module by the dotted text of what is called."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("name", EVERY)
def test_nothing_prints_or_unpickles(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("pickle", "cloudpickle", "dill", "joblib"):
            assert node.attr == "UnpicklingError", f"{name}:{node.lineno}"  # what torch.load raises
    for called, call in calls(name):
        assert called not in ("print", "eval", "exec"), f"{name}:{call.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"{name}:{call.lineno}"
        if called in ("numpy.load", "np.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"{name}:{call.lineno}"
        if called in ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"):
            assert (name, called) == ("config.load", "yaml.load"), f"{name}:{call.lineno}"
            assert keywords["Loader"].startswith("loader_for(")


def test_the_yaml_loader_is_a_safe_one() -> None:
    assert issubclass(loader_for({"!tag"}), (yaml.SafeLoader, yaml.CSafeLoader))


@pytest.mark.parametrize("name", EVERY)
def test_no_failure_is_hidden(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = node.type is None or re.search(r"\b(Base)?Exception\b", caught)
            raises = isinstance(node.body[-1], ast.Raise)
            assert not broad or raises, f"{name}:{node.lineno}: except {caught}"


@pytest.mark.parametrize("name", EVERY)
def test_no_parameter_changes_behind_autograd(name: str) -> None:
    for node in ast.walk(TREES[name]):
        targets = list(node.targets) if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr == "data":
                assert ast.unparse(target.value) == "self", f"{name}:{target.lineno}: {ast.unparse(target)} ="


def test_the_citation_has_the_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'"{found["version"]}"' in (PACKAGE / "version.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_ask_for_something(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["name"] and found["description"]
    assert any(one.get("validations", {}).get("required") for one in found["body"])
