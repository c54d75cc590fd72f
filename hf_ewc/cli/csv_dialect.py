"""How a table in a text file is written: its encoding and what stands between its columns."""

from __future__ import annotations

import codecs
import csv
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("hf_ewc")

_SEPARATORS = (",", ";", "\t", "|")
_START = 1024  # bytes that are looked at for how a file begins
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def encoding_of(path: str | Path) -> str:
    """What a text file is encoded in: what its mark says, UTF-8, UTF-16, or else Windows-1252.

    UTF-16 without a mark shows by zeros, every second byte of what the Latin script has. Of the
    last, which any bytes may be, a warning says so.
    """
    with open(path, "rb") as file:
        start = file.read(_START)
        for mark, name in _MARKS.items():
            if start.startswith(mark):
                return name
        for place, name in ((0, "utf-16-be"), (1, "utf-16-le")):
            if start[place::2].count(0) > len(start) / 4 > start[1 - place :: 2].count(0):
                return name
        decoder = codecs.getincrementaldecoder("utf-8")()
        chunk = start
        try:
            while chunk:
                decoder.decode(chunk)
                chunk = file.read(1 << 20)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            logger.warning("%s is no UTF-8; it is read as Windows-1252 (cp1252).", path)
            return "cp1252"
    return "utf-8"


def written(path: str | Path) -> dict[str, Any]:
    """Options of a csv reader: encoding, separator, and a first line that names the separator.

    The separator is that of comma, semicolon, tab and bar which makes most columns of the line that
    names them; files that end in .tsv have tabs. Only an empty cell is missing: "NA" is a word.
    """
    encoding = encoding_of(path)
    with open(path, encoding=encoding, errors="replace", newline="") as file:
        first = file.readline()
    options: dict[str, Any] = {
        "encoding": encoding,
        "encoding_errors": "replace" if encoding == "cp1252" else "strict",
        "skipinitialspace": True,
        "keep_default_na": False,
        "na_values": [""],
        "index_col": False,  # a row longer than the first line makes no index of its first field
    }
    said = first.strip().lower()
    if said.startswith("sep=") and len(said) == 5:  # as Excel writes it
        return {**options, "delimiter": said[-1], "skiprows": 1}
    if Path(path).suffix.lower() == ".tsv":
        return {**options, "delimiter": "\t", "skipinitialspace": False}
    separator = max(
        _SEPARATORS, key=lambda each: len(next(csv.reader([first], delimiter=each), []))
    )
    return {**options, "delimiter": separator, "skipinitialspace": separator != "\t"}


def what_helps(error: BaseException) -> str:
    """What to do about a reader's complaint of a csv file; nothing where it is not known."""
    said = str(error)
    if "EOF inside string" in said:
        return " A quotation mark that is opened there is not closed."
    if "Error tokenizing data" in said or "Length of header" in said:
        return " What has the separator in it has to stand in quotation marks."
    return ""
