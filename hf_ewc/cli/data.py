"""The examples that a command is given: files, folders and data sets of the Hub."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import transformers

from hf_ewc.cli.lengths import fitting_length
from hf_ewc.cli.models import pretrained
from hf_ewc.cli.sources import READERS, from_file
from hf_ewc.tasks.token_scores import is_causal

_NUMERAL = re.compile(r"(^|: )-?\d+$")  # the name of a class, also behind that of its task


def examples(model: Any, given: argparse.Namespace) -> tuple[Any, Any]:
    """The examples of `given.data` as the model takes them, and the collator for their batches.

    Raises:
        ValueError: no such data, split or column, no examples, or labels that the model has not.
    """
    data = load(given.data, given.split)
    if not len(data):
        raise ValueError(f"{given.data} has no examples.")
    if {"input_ids", "pixel_values"} & {*data.column_names}:
        return data, None
    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if images:
        return _of_images(data, images[0], model, given)
    return _of_texts(data, model, given)


def load(source: str, split: str) -> Any:
    """The data set behind a path or a Hub id, one split of it."""
    datasets.disable_progress_bars()
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or path.suffix.lower() in READERS
    if path.is_file() or (looks_local and not path.exists()):
        return from_file(source)
    try:
        found = _of_folder(path) if path.exists() else datasets.load_dataset(*source.split(":", 1))
    except Exception as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ValueError(f"{source} has the splits {[*found]}; choose one by --split.")
    return found[split]


def _of_folder(path: Path) -> Any:
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path))


def _of_texts(data: Any, model: Any, given: argparse.Namespace) -> tuple[Any, Any]:
    """Tokens, and as labels the label's number or, for language models, the tokens themselves."""
    tokenizer = pretrained(transformers.AutoTokenizer, given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    label = None if is_causal(model) else _label_column(data, given.label)
    texts = given.text or _text_columns(data, label)
    _check_columns(data, texts)
    _check_texts(data, texts[:2], given.data)
    number_of = None if label is None else _numbering(data, label, model)
    longest = fitting_length(
        "--max_length", given.max_length, tokenizer, model.config, texts=len(texts[:2])
    )

    def prepared(rows: dict[str, list[Any]]) -> dict[str, Any]:
        columns = (rows[name] for name in texts[:2])
        found = dict(tokenizer(*columns, truncation=True, max_length=longest))
        if label is not None and number_of is not None:
            found["labels"] = [number_of(value) for value in rows[label]]
        else:
            found["labels"] = [list(ids) for ids in found["input_ids"]]
        return found

    ready = data.map(prepared, batched=True, remove_columns=data.column_names)
    if label is None:
        # One that pads labels by −100: the end of a text may be the token that pads.
        return ready, transformers.DataCollatorForSeq2Seq(tokenizer)
    return ready, transformers.DataCollatorWithPadding(tokenizer)


def _of_images(data: Any, image: str, model: Any, given: argparse.Namespace) -> tuple[Any, Any]:
    """Pixels and the label's number, prepared as they are asked for."""
    processor = pretrained(transformers.AutoImageProcessor, given.model)
    label = _label_column(data, given.label)
    number_of = _numbering(data, label, model)
    mode = {1: "L", 3: "RGB"}.get(getattr(model.config, "num_channels", 3), "RGB")

    def prepared(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert(mode) for picture in rows[image]], return_tensors="pt")
        return {**pixels, "labels": [number_of(value) for value in rows[label]]}

    return data.with_transform(prepared), None


def _label_column(data: Any, wanted: str | None) -> str:
    found = [wanted] if wanted else [c for c in ("label", "labels") if c in data.column_names]
    if not found:
        raise ValueError(f"the data has the columns {data.column_names}; choose one by --label.")
    _check_columns(data, found[:1])
    return found[0]


def _text_columns(data: Any, label: str | None) -> list[str]:
    """The columns of text, at most two."""
    kinds = {"string", "large_string"}
    found = [n for n, f in data.features.items() if getattr(f, "dtype", "") in kinds and n != label]
    if not 1 <= len(found) <= 2:
        raise ValueError(f"the data has the columns {data.column_names}; choose one by --text.")
    return found


def _check_columns(data: Any, names: list[str]) -> None:
    missing = [name for name in names if name not in data.column_names]
    if missing:
        raise ValueError(f"the data has no column {missing[0]!r}; it has {data.column_names}.")


def _check_texts(data: Any, columns: list[str], where: str) -> None:
    """Refuse what a tokenizer cannot read, with its column and row."""
    for column in columns:
        for row, value in enumerate(data[column]):
            if not isinstance(value, str):
                seen = "nothing" if value is None else repr(value)
                raise ValueError(
                    f"{where} has {seen} in column {column!r} of example {row + 1}; needed is text."
                )


def _numbering(data: Any, label: str, model: Any) -> Callable[[Any], int | float]:
    """What makes the label's number in the model's head of a value in the column.

    A column of classes has their numbers in its own order, and they are taken by name where the
    model knows one of them. A number that is written there is a name where all the model's names
    are numbers: "1" to "5" may be the rows 0 to 4.
    """
    known = _known(model)
    classes: list[str] = getattr(data.features[label], "names", None) or []
    is_named = any(_row(name, known) is not None for name in classes)
    several = model.config.num_labels > 1
    in_numerals = not classes and several and all(map(_NUMERAL.search, known))

    def number_of(value: Any) -> int | float:
        is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if is_named and isinstance(value, int) and 0 <= value < len(classes):
            value = classes[value]
        elif in_numerals and is_whole:
            value = str(int(value))
        return _label(value, model)

    return number_of


def _known(model: Any) -> dict[str, int]:
    """The rows of the head by their names; a configuration may have them one way round alone."""
    config = model.config
    return config.label2id or {name: int(row) for row, name in (config.id2label or {}).items()}


def _row(name: str, known: Mapping[str, int]) -> int | None:
    """The row of the head of that name, or of "task: name", which the recipes give to each task's.

    None where there is no such row, or several.
    """
    rows = [known[name]] if name in known else []
    rows = rows or [row for full, row in known.items() if full.endswith(f": {name}")]
    return int(rows[0]) if len(rows) == 1 else None


def _label(value: Any, model: Any) -> int | float:
    """The label's number in the model's head, from its name or its number."""
    if not isinstance(value, (str, bool, int, float)):
        raise ValueError(
            f"a label is {value!r:.60}; needed is one name or number for each example. For labels "
            "of tokens, or several of an example, use hf_ewc.estimate_fisher on tokenized data."
        )
    known = _known(model)
    if isinstance(value, str):
        value = value.strip()
        if (row := _row(value, known)) is not None:
            return row
        raise ValueError(f"a label is {value!r}; the model has {[*known]}.")
    if model.config.num_labels == 1:
        return float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as a table has them where some are missing
    if isinstance(value, float):
        return value
    if not 0 <= value < model.config.num_labels:
        raise ValueError(f"a label is {value}; the model has 0 to {model.config.num_labels - 1}.")
    return int(value)
