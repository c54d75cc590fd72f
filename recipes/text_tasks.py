"""Tasks of texts with labels, from local files or the Hub, and the labels of one head for all."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from hf_ewc.cli.arguments import check_known

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class TextTask:
    """One entry of the `tasks` of a YAML file: files of its own, or a data set of the Hub."""

    name: str
    train_file: str | None = None
    eval_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    text: str | list[str] = "text"  # one column, or two
    label: str = "label"  # the column
    labels: list[str] | None = None  # take only examples with these; by default all

    @classmethod
    def from_entry(cls, entry: Any, number: int) -> "TextTask":
        if not isinstance(entry, dict):
            raise ValueError(f"task {number} is {entry!r:.60}; needed are lines of `key: value`.")
        check_known(entry, cls.__dataclass_fields__, f"task {number}")
        if not isinstance(entry.get("name"), str):
            raise ValueError(f"task {number} has no name; give each a `name:` of its own.")
        task = cls(**entry)
        if bool(task.dataset_name) == bool(task.train_file and task.eval_file):
            raise ValueError(
                f"task {task.name!r} needs either train_file and eval_file, or dataset_name."
            )
        if not 1 <= len(task.columns) <= 2:
            raise ValueError(f"task {task.name!r} has the texts {task.columns}; give one or two.")
        if not all(type(label) in (str, int) for label in task.labels or []):
            raise ValueError(
                f"task {task.name!r} has labels that are no names; put them in quotes."
            )
        task.labels = None if task.labels is None else [str(label) for label in task.labels]
        return task

    @property
    def columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)


@dataclass
class Examples:
    """What a task learns from and is scored on: texts, and labels by name."""

    task: TextTask
    train: Dataset
    eval: Dataset
    labels: list[str]


def load(task: TextTask, max_train: int | None, max_eval: int | None) -> Examples:
    """The task's examples, drawn at random where there are more than wanted.

    Raises:
        ValueError: with the file, and what it lacks.
    """
    if task.dataset_name:
        splits = (task.train_split, task.eval_split)
        train_name, eval_name = (f"{task.dataset_name} ({split})" for split in splits)
        train, evaluation = (_of_hub(task, split) for split in splits)
    else:
        train_name, eval_name = task.train_file, task.eval_file
        train, evaluation = _of_file(train_name), _of_file(eval_name)
    names, eval_names = (
        _label_names(train, task, train_name),
        _label_names(evaluation, task, eval_name),
    )
    labels = _in_order(set(names) - {None}, train.features[task.label])
    if missing := set(task.labels or []) - set(labels):
        raise ValueError(f"{train_name} has no example with the label {min(missing)!r}.")
    if unknown := set(eval_names) - {None} - set(labels):
        raise ValueError(f"{eval_name} has the label {min(unknown)!r}, which {train_name} has not.")
    return Examples(
        task,
        _drawn(train, names, task, train_name, max_train),
        _drawn(evaluation, eval_names, task, eval_name, max_eval),
        labels,
    )


def _of_file(path: str) -> Dataset:
    kind = Path(path).suffix.lower()
    if kind not in READERS:
        raise ValueError(f"{path} is none of {', '.join(READERS)}.")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there (seen from {Path.cwd()}).")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty.")
    options = {"delimiter": "\t"} if kind == ".tsv" else {}
    try:
        return datasets.load_dataset(READERS[kind], data_files=path, split="train", **options)
    except Exception as error:  # whatever its reader raises
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no examples.") from error
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def _of_hub(task: TextTask, split: str) -> Dataset:
    try:
        return datasets.load_dataset(task.dataset_name, task.dataset_config_name, split=split)
    except Exception as error:  # of the network, the Hub or the reader
        raise ValueError(f"{task.dataset_name} ({split}) cannot be loaded: {error}") from error


def _label_names(data: Dataset, task: TextTask, where: str) -> list[str | None]:
    """The name of each example's label; None for examples that the task leaves out."""
    for column in [*task.columns, task.label]:
        if column not in data.column_names:
            raise ValueError(
                f"{where} has no column {column!r}; it has {', '.join(data.column_names)}."
            )
    kind = data.features[task.label]
    names = [_name(value, kind, where) for value in data[task.label]]
    found = [name if task.labels is None or name in task.labels else None for name in names]
    if not any(name is not None for name in found):
        with_labels = "" if task.labels is None else f" with the labels of task {task.name!r}"
        raise ValueError(f"{where} has no examples{with_labels}.")
    return found


def _drawn(
    data: Dataset, names: list[str | None], task: TextTask, where: str, most: int | None
) -> Dataset:
    """Texts and labels of the task's examples, of at most `most` that are drawn at random."""
    kept = [i for i, name in enumerate(names) if name is not None]
    if most is not None and most < len(kept):
        kept = sorted(random.Random(0).sample(kept, most))
    chosen = data.select(kept)
    texts = {f"text_{k}": list(chosen[column]) for k, column in enumerate(task.columns)}
    for column, values in zip(task.columns, texts.values(), strict=True):
        for row, value in zip(kept, values, strict=True):
            if not isinstance(value, str):
                raise ValueError(
                    f"{where} has {value!r} in column {column!r} of example {row + 1}; needed is "
                    "text."
                )
    return Dataset.from_dict({**texts, "label": [names[i] for i in kept]})


def _name(value: Any, kind: Any, where: str) -> str:
    """A label's name: a class's, a word, or a whole number as it is written."""
    if isinstance(kind, ClassLabel) and isinstance(value, int) and 0 <= value < kind.num_classes:
        return str(kind.int2str(value))
    if isinstance(kind, Value) and isinstance(value, (str, bool, int)):
        return str(value)
    raise ValueError(f"{where} has the label {value!r}; needed are words or whole numbers.")


def _in_order(names: set[str], kind: Any) -> list[str]:
    """In the order of the classes' numbers where they have one, else of the alphabet."""
    if isinstance(kind, ClassLabel):
        return [name for name in kind.names if name in names]
    are_numbers = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int if are_numbers else str)


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
