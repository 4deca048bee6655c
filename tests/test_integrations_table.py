"""Every cell of the table in docs/integrations.md is checked by a test: which one is said here."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrations.md"
COLUMNS = ("lines", "averages", "best checkpoint", "resume, before and after a removal", "DDP", "export")
EXAMPLE = "test_integrations.py::test_an_example_is_interrupted_and_goes_on_twice[{}_digits]"
TRAINERS = "test_trainers.py::test_{}[{}]"
LOOPS = "test_reference_loops.py::test_{}[{}]"
PROCESSES = "test_trainers.py::test_two_processes_have_the_wrapper_made_anew"


def of_trainers(name: str, best: str, resume: str, export: str | None = None) -> tuple[str, ...]:
    """The tests of a trainer with a callback."""
    pruned = TRAINERS.format("it_prunes_and_the_average_follows", name)
    exported = export or TRAINERS.format("the_pruned_model_is_saved_and_exported", name)
    return (
        pruned,
        pruned,
        best,
        TRAINERS.format("resumed_equals_uninterrupted", name) + f" {resume}",
        PROCESSES,
        exported,
    )


def of_loops(name: str, best: str) -> tuple[str, ...]:
    """The tests of a training script with a few lines."""
    pruned = LOOPS.format("the_lines_prune_and_checkpoints_and_average_follow", name)
    return (
        pruned,
        f"{pruned} {LOOPS.format('the_average_goes_on_after_the_removal', name)}",
        best,
        LOOPS.format("resumed_equals_uninterrupted", name),
        LOOPS.format("two_processes_stay_the_same_after_the_wrapper_was_made_anew", name),
        f"{LOOPS.format('the_pruned_model_is_saved', name)} {LOOPS.format('what_was_saved_is_exported', name)}",
    )


TESTS: dict[str, tuple[str, ...]] = {
    "Lightning": of_trainers(
        "lightning",
        "test_best_and_batches.py::test_lightnings_best_checkpoint_and_patience_begin_anew",
        "test_callback_mistakes.py::test_lightning_resumes_with_the_checkpoint_alone",
    ),
    "transformers": of_trainers(
        "transformers",
        "test_best_and_batches.py::test_transformers_best_metric_begins_anew",
        "test_callback_mistakes.py::test_transformers_resumes_with_the_checkpoint_alone",
        "test_hugging_face.py::test_from_pretrained_loads_the_pruned_model",
    ),
    "Accelerate": of_trainers(
        "accelerate", "test_callback_mistakes.py::test_accelerate_mistakes", EXAMPLE.format("accelerate")
    ),
    "ultralytics": (
        "test_ultralytics.py::test_the_trainer_prunes_and_what_it_keeps_follows",
        "test_ultralytics.py::test_the_trainer_prunes_and_what_it_keeps_follows",
        "test_ultralytics.py::test_the_fall_of_the_best_fitness_is_said",
        "test_ultralytics.py::test_a_training_goes_on_from_before_and_after_the_removal",
        "test_ultralytics.py::test_the_callback_travels_to_the_processes_that_the_trainer_starts",
        "test_ultralytics.py::test_the_pruned_model_is_exported "
        "test_ultralytics.py::test_the_real_trainer_prunes_resumes_and_exports",
    ),
    "timm's train.py": of_loops("timm", "test_reference_loops.py::test_timms_best_checkpoint_is_pruned"),
    "torchvision's references": of_loops(
        "torchvision", LOOPS.format("the_lines_prune_and_checkpoints_and_average_follow", "torchvision")
    ),
    "a loop of yours": (
        "test_docs.py::test_python_runs",
        "test_averages.py::test_an_object_is_looked_through_and_its_known_list_is_made_anew "
        "test_averages.py::test_an_average_that_is_made_later_is_attached",
        "test_best_and_batches.py::test_a_loop_is_told_once_that_its_best_is_of_another_model",
        "test_state_in.py::test_resumed_equals_uninterrupted",
        "test_processes.py::test_a_wrapper_made_anew_keeps_its_options_and_serves_whoever_holds_it "
        "test_ranks.py::test_processes_end_as_one",
        "test_export.py::test_precisions_after_pruning",
    ),
}
CELLS = [(row, column, test) for row, tests in TESTS.items() for column, one in zip(COLUMNS, tests, strict=True)
         for test in one.split(" ")]  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """The table of the page: trainer -> column -> what it says, without links and code marks."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(number for number, line in enumerate(lines) if line.startswith("| trainer |"))
    rows = [[cell.strip() for cell in re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", line).strip("|").split("|")]
            for line in lines[start:]]  # fmt: skip
    head, body = rows[0], rows[2 : 2 + len(TESTS)]
    return {row[0].replace("`", ""): dict(zip(head[1:], row[1:], strict=True)) for row in body}


@functools.cache
def source(name: str) -> str:
    return (ROOT / "tests" / name).read_text(encoding="utf-8")


def test_the_table_is_the_one_that_is_tested() -> None:
    found = table()
    assert list(found) == list(TESTS)
    assert all(tuple(row) == COLUMNS and all(row.values()) for row in found.values())


@pytest.mark.parametrize(("row", "column", "test"), CELLS)
def test_a_cell_has_its_test(row: str, column: str, test: str) -> None:
    name, _, function = test.partition("::")
    function, _, case = function.partition("[")
    defined = [node.name for node in ast.parse(source(name)).body if isinstance(node, ast.FunctionDef)]
    assert function in defined, f"{row}, {column}"
    helper = {"test_trainers.py": "trainers.py", "test_reference_loops.py": "reference_loops.py"}.get(name, name)
    assert f'"{case.rstrip("]")}"' in source(helper) or not case, f"{row}, {column}: {case}"


def test_the_page_names_tests_that_are_there() -> None:
    names = re.findall(r"`tests/(\w+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert names and all((ROOT / "tests" / name).is_file() for name in names)
