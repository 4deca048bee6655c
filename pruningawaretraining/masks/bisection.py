"""Find the parts that do not work together, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Problem = Callable[[Sequence[int]], str]
"""Why these parts do not work together; "" if they do."""


def working(numbers: Sequence[int], problem: Problem) -> tuple[list[int], dict[int, str]]:
    """The parts that work together, and the others with their problems.

    Args:
        numbers: the parts.
        problem: tries some of them.
    """
    reasons: dict[int, str] = {}
    return _working(numbers, problem, reasons), reasons


def _working(numbers: Sequence[int], problem: Problem, reasons: dict[int, str]) -> list[int]:
    found = problem(numbers)
    if not found:
        return list(numbers)
    if len(numbers) == 1:
        reasons[numbers[0]] = found
        return []
    middle = len(numbers) // 2
    left, right = _working(numbers[:middle], problem, reasons), _working(numbers[middle:], problem, reasons)
    if len(left) + len(right) < len(numbers) and not problem([*left, *right]):
        return [*left, *right]
    for number in right:
        found = problem([*left, number])
        if found:
            reasons[number] = found
        else:
            left.append(number)
    return left
