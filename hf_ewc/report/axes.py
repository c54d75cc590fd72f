"""Tasks along an axis: by name where there is room, else by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_ewc.report.canvas import text_width
from hf_ewc.report.names import numbered, shortened

_SHORT = 8  # characters up to which names stand below columns, too
_MOST_NAMES = 40  # tasks beyond which not each has its name


def are_short(tasks: Sequence[str]) -> bool:
    """Whether names need no numbers to stand for them."""
    return len(tasks) <= 12 and all(len(task) <= _SHORT for task in tasks)


def shown_names(tasks: Sequence[str]) -> list[str]:
    """What stands for the tasks in pictures: the names, with their numbers where these are used."""
    return [shortened(task) for task in tasks] if are_short(tasks) else numbered(tasks)


def name_rows(panel: Any, tasks: Sequence[str]) -> None:
    """The names beside the rows, each k-th where there are very many."""
    rows, names, size = _rows(tasks)
    panel.set_yticks(rows, names, fontsize=size)


def width_of_names(tasks: Sequence[str]) -> float:
    """The inches that `name_rows` takes."""
    _, names, size = _rows(tasks)
    return text_width(names, size)


def number_rows(panel: Any, tasks: Sequence[str]) -> None:
    """What stands below the columns, beside the rows as well: for panels right of named ones."""
    if are_short(tasks):
        panel.set_yticks(range(len(tasks)), shown_names(tasks))
    else:
        numbers = _numbers(tasks)
        panel.set_yticks(numbers, [str(i + 1) for i in numbers], fontsize=8)


def name_columns(panel: Any, tasks: Sequence[str]) -> None:
    """Short names below the columns, or the numbers that stand before longer ones elsewhere."""
    if not are_short(tasks):
        numbers = _numbers(tasks)
        panel.set_xticks(numbers, [str(i + 1) for i in numbers], fontsize=8)
    elif sum(map(len, tasks)) > 12:
        panel.set_xticks(range(len(tasks)), shown_names(tasks), rotation=45, ha="right")
    else:
        panel.set_xticks(range(len(tasks)), shown_names(tasks))


def _rows(tasks: Sequence[str]) -> tuple[range, list[str], float]:
    """Rows that have names, the names, and the size of their letters in points."""
    rows = range(0, len(tasks), -(-len(tasks) // _MOST_NAMES))
    names = shown_names(tasks)
    return rows, [names[i] for i in rows], 9.0 if len(rows) <= 20 else 7.0


def _numbers(tasks: Sequence[str]) -> range:
    return range(0, len(tasks), -(-len(tasks) // 25))
