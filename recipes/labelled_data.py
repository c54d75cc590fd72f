"""What tasks of texts and of images share: examples with labels, and one head for all labels."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from data_sources import Source, SourceArguments
from datasets import ClassLabel, Dataset, Value

from hf_ewc.cli.sources import check_columns, from_file, from_hub

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass
class DataArguments(SourceArguments):
    """How labels are counted, too."""

    label: str = field(default="label", metadata={"help": "Column of the labels."})
    classes_per_task: int | None = field(
        default=None,
        metadata={"help": "Make tasks of one data set: the first so many classes, the next, …"},
    )
    shared_labels: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether a label's name means the same class in every task, and the model chooses "
                "among all. By default each task has classes of its own."
            )
        },
    )


@dataclass
class LabelledTask(Source):
    """One entry of the `tasks` of a YAML file."""

    label: str = "label"  # the column
    labels: list[str] | None = None  # take only examples with these; by default all

    @classmethod
    def from_entry(cls, entry: Any, number: int, given: DataArguments | None = None) -> Any:
        """The task of an entry, with what is `given` for all in place of what it leaves out."""
        task = cls.of_entry(entry, f"task {number}", given)
        task.check()
        return task

    def check(self) -> None:
        """Refuse what cannot be meant: a `ValueError` with what is needed."""
        of_hub, of_files = bool(self.dataset_name), bool(self.train_file and self.eval_file)
        if of_hub == of_files or (of_hub and (self.train_file or self.eval_file)):
            raise ValueError(
                f"task {self.name!r} needs either train_file and eval_file, or dataset_name."
            )
        if not all(type(label) in (str, int) for label in self.labels or []):
            raise ValueError(
                f"task {self.name!r} has labels that are no names; put them in quotes."
            )
        self.labels = None if self.labels is None else [str(label) for label in self.labels]

    @property
    def columns(self) -> list[str]:
        """The columns of an example, but for its label."""
        raise NotImplementedError

    def read(self, part: str) -> tuple[str, Dataset]:
        """The name and the examples of the part "train" or "eval"."""
        file, split = self.of_part(part)
        if self.dataset_name:
            where = f"{self.dataset_name} ({split})"
            return where, from_hub(self.dataset_name, self.dataset_config_name, split)
        return str(file), from_file(str(file), TABLES)


@dataclass
class Part:
    """Examples of a task to train on, or to evaluate on."""

    where: str
    data: Dataset  # all that is there
    rows: list[int]  # those of it that are the task's
    labels: list[str]  # the names of their labels

    def column(self, name: str) -> Iterable[Any]:
        """What the task's examples have in a column, one after another."""
        return self.data.select_columns([name]).select(self.rows)[name]

    def with_labels(self, columns: dict[str, str], rows: dict[str, int]) -> Dataset:
        """The task's examples with these columns, and as `labels` rows of the head.

        Args:
            columns: for each its name in what is returned, which may not be "labels".
            rows: of the head, by the labels' names.
        """
        labels = np.full(len(self.data), -100)
        labels[self.rows] = [rows[label] for label in self.labels]
        # Before they are chosen from: afterwards the library would copy all columns.
        data = self.data.select_columns([*columns])
        data = data.rename_columns({old: new for old, new in columns.items() if old != new})
        return data.add_column("labels", labels).select(self.rows)


@dataclass
class Examples:
    """What a task learns from and is scored on, and the names of its labels in their order."""

    task: Any
    train: Part
    eval: Part
    labels: list[str]


def tasks_of(given: DataArguments, kind: type[LabelledTask]) -> list[Any]:
    """The tasks that were asked for; with `classes_per_task` one that is to be split up.

    Raises:
        ValueError: with the task, and what is wrong with it.
    """
    if given.classes_per_task is not None:
        if given.tasks is not None or given.classes_per_task < 1:
            raise ValueError(
                f"classes_per_task is {given.classes_per_task}; it makes tasks of one data set, in "
                "place of a list `tasks:`, of at least one class each."
            )
        return [kind.from_entry({"name": "all"}, 1, given)]
    if not isinstance(given.tasks, list) or not given.tasks:
        raise ValueError("tasks are missing; give a YAML file with a list `tasks:`.")
    return [kind.from_entry(entry, k + 1, given) for k, entry in enumerate(given.tasks)]


def load_all(tasks: list[Any], given: DataArguments) -> list[Examples]:
    """The examples of all tasks."""
    if given.classes_per_task is not None:
        tasks = split_up(tasks[0], given.classes_per_task)
    found = [load(task, given.max_train_samples, given.max_eval_samples) for task in tasks]
    for each in found:
        if len(each.labels) == 1 and not (given.shared_labels and len(found) > 1):
            raise ValueError(
                f"task {each.task.name!r} has the class {each.labels[0]!r} alone, so that there is "
                "nothing to tell apart: every score would be 1. Give it more classes, or several "
                "tasks shared_labels: true, with which the model chooses among those of all."
            )
    return found


def split_up(task: Any, size: int) -> list[Any]:
    """A task of all classes as tasks of so many each, in the classes' order."""
    where, data = task.read("train")
    check_columns(data, [task.label], where)
    names = _in_order(set(_label_names(data, task, where)) - {None}, data.features[task.label])
    if len(names) % size:
        raise ValueError(
            f"classes_per_task is {size}, which does not divide the {len(names)} classes of "
            f"{where}."
        )
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    return [
        replace(task, name=group[0] if size == 1 else f"{group[0]}-{group[-1]}", labels=group)
        for group in groups
    ]


def load(task: Any, max_train: int | None, max_eval: int | None) -> Examples:
    """The task's examples; where there are more than wanted, some of each label.

    Raises:
        ValueError: with the file, and what it lacks.
    """
    train_name, train = task.read("train")
    eval_name, evaluation = task.read("eval")
    for where, data in ((train_name, train), (eval_name, evaluation)):
        check_columns(data, [*task.columns, task.label], where)
    names = _label_names(train, task, train_name)
    eval_names = _label_names(evaluation, task, eval_name)
    labels = _in_order(set(names) - {None}, train.features[task.label])
    if missing := set(task.labels or []) - set(labels):
        raise ValueError(f"{train_name} has no example with the label {min(missing)!r}.")
    if unknown := set(eval_names) - {None} - set(labels):
        raise ValueError(f"{eval_name} has the label {min(unknown)!r}, which {train_name} has not.")
    return Examples(
        task,
        _drawn(train_name, train, names, max_train),
        _drawn(eval_name, evaluation, eval_names, max_eval),
        labels,
    )


def _label_names(data: Dataset, task: Any, where: str) -> list[str | None]:
    """The name of each example's label; None for examples that the task leaves out."""
    kind, values = data.features[task.label], data[task.label]
    if without := [i + 1 for i, value in enumerate(values) if _is_missing(value)]:
        raise ValueError(
            f"{where} has {len(without)} examples without a label, the first is number "
            f"{without[0]}; fill them in or take them out."
        )
    names = [_name(value, kind, where) for value in values]
    found = [name if task.labels is None or name in task.labels else None for name in names]
    if not any(name is not None for name in found):
        with_labels = "" if task.labels is None else f" with the labels of task {task.name!r}"
        raise ValueError(f"{where} has no examples{with_labels}.")
    return found


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _name(value: Any, kind: Any, where: str) -> str:
    """A label's name: a class's, a word, or a whole number as it is written."""
    if isinstance(kind, ClassLabel) and isinstance(value, int) and 0 <= value < kind.num_classes:
        return str(kind.int2str(value))
    if isinstance(kind, Value) and isinstance(value, (str, bool, int)):
        # "a " is "a", and "1.0" is 1 beside words as it is in a column of numbers
        return re.sub(r"^(-?(0|[1-9]\d*))\.0*$", r"\1", str(value).strip())
    if isinstance(kind, Value) and isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers that a table has as floats
    if not isinstance(kind, (ClassLabel, Value)) and isinstance(value, (str, bool, int)):
        raise ValueError(
            f"{where} has labels of several types, {value!r} among them; needed are words alone "
            "or whole numbers alone."
        )
    raise ValueError(f"{where} has the label {value!r}; needed are words or whole numbers.")


def _in_order(names: Iterable[str], kind: Any) -> list[str]:
    """In the order of the classes' numbers where they have one, else of the alphabet."""
    if isinstance(kind, ClassLabel):
        return [name for name in kind.names if name in names]
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))


def _drawn(where: str, data: Dataset, names: list[str | None], most: int | None) -> Part:
    """The examples with a name, at most so many: drawn at random, of each label one before any two.

    So a class is left out only where fewer examples are wanted than there are classes.
    """
    kept = [i for i, name in enumerate(names) if name is not None]
    if most is not None and most < len(kept):
        order = random.Random(0).sample(kept, len(kept))
        first = {names[i]: i for i in reversed(order)}
        one_each = set(first.values())
        order = [i for i in order if i in one_each] + [i for i in order if i not in one_each]
        kept = sorted(order[:most])
    return Part(where, data, kept, [str(names[i]) for i in kept])


def rows_of_head(tasks: list[Examples], shared: bool) -> tuple[list[str], list[dict[str, int]]]:
    """The names of the head's rows, and for each task the row of each of its labels.

    With `shared`, a name means the same class in every task; else each task has rows of its own.
    """
    names: list[str] = []
    rows = []
    for examples in tasks:
        known = list(names) if shared else []
        new = [label for label in examples.labels if label not in known]
        own = {label: len(names) + k for k, label in enumerate(new)}
        old = {label: known.index(label) for label in examples.labels if label in known}
        rows.append({**old, **own})
        names += new if shared else [f"{examples.task.name}: {label}" for label in new]
    return names, rows


def names_of_head(names: list[str], rows: list[dict[str, int]], grows: bool) -> list[str]:
    """The names of the rows that a head begins with: all, or where it grows the first task's."""
    return names[: 1 + max(rows[0].values())] if grows else names


def check_growth(given: Any, sequence: Any) -> None:
    """Refuse a head that grows where it could not: a `ValueError`."""
    if sequence.grow_head and not given.shared_labels:
        raise ValueError(
            "grow_head is for one head over all classes; set shared_labels: true, too."
        )
    for name, settings in (given.methods or {}).items():
        if settings.get("grow_head", sequence.grow_head) != sequence.grow_head:
            raise ValueError(
                f"method {name!r} sets grow_head, which makes another model; set it outside of "
                "`methods:`, for all."
            )
