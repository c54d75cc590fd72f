"""Data sets from files and from the Hub, with one sentence on what is wrong with one."""

from __future__ import annotations

import contextlib
import glob
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from hf_ewc.cli.csv_cells import as_words, with_numbers
from hf_ewc.cli.csv_dialect import encoding_of, what_helps, written

_NOT_BLANK = re.compile(r"\S")
READERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip


def check_file(path: str, endings: Iterable[str]) -> None:
    """Refuse what is no file, is empty, or has another ending: a `ValueError`."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist (seen from {Path.cwd()}).")
    if not Path(path).is_file() or Path(path).suffix.lower() not in endings:
        raise ValueError(f"{path} is none of {', '.join(endings)}.")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty.")


def from_file(path: str, endings: Iterable[str] = READERS, **options: Any) -> datasets.Dataset:
    """The examples in a file, by its ending.

    Args:
        path: of the file.
        endings: those that are welcome, of `READERS`.
        options: of the reader.

    Raises:
        ValueError: there is no such file, it has another ending, no examples, or cannot be read.
    """
    check_file(path, endings)
    reader = READERS[Path(path).suffix.lower()]
    if reader == "text":
        options = {"encoding": encoding_of(path), **options}
    try:
        with _unsaid():
            found = _READ.get(reader, _read)(path, reader, options)
    except Exception as error:  # whatever its reader raises
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no examples.") from error
        why = error.__cause__ or error
        said = " ".join(str(why).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read: {said}.{what_helps(why)}") from error
    if not len(found):
        raise ValueError(f"{path} has no examples.")
    return found


def _read(path: str, reader: str, options: Mapping[str, Any]) -> datasets.Dataset:
    # `datasets` takes a name for a pattern: reviews[1].csv for reviews1.csv.
    return datasets.load_dataset(reader, data_files=glob.escape(path), split="train", **options)


def _from_csv(path: str, reader: str, options: Mapping[str, Any]) -> datasets.Dataset:
    """As words, of which whole columns are made numbers."""
    options = {**written(path), **options}
    return with_numbers(_read(path, reader, {**options, "features": as_words(path, options)}))


def _from_json(path: str, reader: str, options: Mapping[str, Any]) -> datasets.Dataset:
    """As it is written: the reader knows UTF-8 alone, and makes times of what looks like dates."""
    encoding = encoding_of(path)
    if encoding == "utf-8":
        data = _read(path, reader, options)
        if not any(map(_is_time, data.features.values())):
            return data
    rows = [*_objects(Path(path).read_text(encoding=encoding))]
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _objects(content: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file: of a list, or one behind the other."""
    decoder, place = json.JSONDecoder(), 0
    while begin := _NOT_BLANK.search(content, place):
        found, place = decoder.raw_decode(content, begin.start())
        yield from found if isinstance(found, list) else [found]


def _is_time(kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(("timestamp", "date", "time"))


_READ = {"csv": _from_csv, "json": _from_json}


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """The library's own lines about an error that is raised as well are left out.

    A table that is read with a loss, as where rows have more fields than the first line, is an
    error.
    """
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header")
            yield
    finally:
        datasets.logging.set_verbosity(before)


def from_hub(name: str, config: str | None, split: str) -> datasets.Dataset:
    """One split of a data set of the Hub, or of a folder that `load_dataset` takes.

    Raises:
        ValueError: the network, the Hub or the reader does not give it.
    """
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise ValueError(f"{name} ({split}) cannot be loaded: {error}") from error


def check_columns(data: datasets.Dataset, names: Iterable[str], where: str) -> None:
    """Refuse a column that is not there: a `ValueError` with those that are."""
    for name in names:
        if name not in data.column_names:
            is_csv = where.lower().endswith((".csv", ".tsv"))
            raise ValueError(
                f"{where} has no column {name!r}; it has {', '.join(data.column_names)}."
                + (" The first line of such a file names its columns." if is_csv else "")
            )
