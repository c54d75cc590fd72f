"""`ewc_state.json`: its text with a checksum, and the strict schema of what it may say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_ewc.state.records import TaskRecord, is_number

FORMAT_VERSION = 1
STATE_FILE = "ewc_state.json"
TENSOR_FILE = re.compile(r"ewc_state-[0-9a-f]{16}\.safetensors")
LARGEST_DOCUMENT = 1 << 28
"""Bytes; a state of a million parameter tensors takes about half of them."""
_TRAILER = ',\n "checksum": "%s"\n}\n'
_TRAILER_SIZE = len(_TRAILER) - 2 + 64


@dataclass(frozen=True)
class Entry:
    """How one parameter is held: its whole shape, the factor of its importance, its offset."""

    shape: tuple[int, ...]
    scale: float
    offset: float


@dataclass(frozen=True)
class AnchorFile:
    """A file of a model's weights that holds anchors.

    Args:
        sha256: of the file.
        nbytes: its size.
        tensors: what each parameter's anchor is called in it.
    """

    sha256: str
    nbytes: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Document:
    """What `ewc_state.json` says.

    Args:
        file: name of the tensor file.
        sha256: of the tensor file.
        nbytes: its size.
        parameters: by name.
        tasks: what was consolidated, in order.
        metadata: further facts.
        anchors: files of weights that hold anchors, by their paths from the folder of the state.
    """

    file: str
    sha256: str
    nbytes: int
    parameters: dict[str, Entry]
    tasks: tuple[TaskRecord, ...]
    metadata: Mapping[str, Any]
    anchors: Mapping[str, AnchorFile] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The text of the file.

        Raises:
            ValueError: it would be larger than what is read.
        """
        content = encoded(
            {
                "format_version": FORMAT_VERSION,
                "tensors": {"file": self.file, "sha256": self.sha256, "bytes": self.nbytes},
                "parameters": {name: asdict(entry) for name, entry in self.parameters.items()},
                "tasks": [asdict(task) for task in self.tasks],
                "metadata": dict(self.metadata),
                **self._anchors(),
            }
        )
        if len(content) > LARGEST_DOCUMENT:
            raise ValueError(
                f"{STATE_FILE} would have {len(content):,} bytes, of which {LARGEST_DOCUMENT:,} "
                "are allowed; keep what is large out of the metadata."
            )
        return content

    def _anchors(self) -> dict[str, Any]:
        """Nothing for a state that holds its own."""
        entries = {
            path: {"sha256": file.sha256, "bytes": file.nbytes, "tensors": dict(file.tensors)}
            for path, file in self.anchors.items()
        }
        return {"anchors": entries} if entries else {}


def encoded(document: Mapping[str, Any]) -> bytes:
    """`document` as JSON, with the checksum of all bytes before it as its last entry."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    head = json.dumps(body, indent=1, allow_nan=False).removesuffix("\n}").encode()
    return head + _trailer(head)


def _trailer(head: bytes) -> bytes:
    return (_TRAILER % hashlib.sha256(head).hexdigest()).encode()


def read_bytes(folder: Path) -> bytes:
    """The content of `ewc_state.json` in `folder`, after a look at what kind of file it is.

    Raises:
        ValueError: there is none, or it is no regular file, or larger than a state's can be.
    """
    path = folder / STATE_FILE
    try:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} holds no EWC state: there is no {STATE_FILE}. Give a folder that "
            "save_pretrained wrote, or a checkpoint of an EWCTrainer."
        ) from None
    except OSError as error:  # a socket, a circle of links, no permission
        raise ValueError(f"{path} is damaged, or not for this user: {error}.") from None
    try:
        status, content = os.fstat(descriptor), b""
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is damaged: it is no regular file.")
        if status.st_size <= LARGEST_DOCUMENT:
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(LARGEST_DOCUMENT + 1)
    finally:
        os.close(descriptor)
    if status.st_size > LARGEST_DOCUMENT or len(content) > LARGEST_DOCUMENT:
        raise ValueError(
            f"{path} is damaged: it has more than the {LARGEST_DOCUMENT:,} bytes of a state's."
        )
    return content


def parsed(content: bytes, path: Path) -> Document:
    """What `content`, read from `path`, says, if all of it is as it was written.

    Raises:
        ValueError: it is damaged, or its format is newer than this version knows.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: no JSON ({error}).") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}; this version of hf-ewc reads up to {FORMAT_VERSION}. "
            "Install a newer one: pip install -U hf-ewc."
        )
    head, trailer = content[:-_TRAILER_SIZE], content[-_TRAILER_SIZE:]
    if type(version) is not int or version != FORMAT_VERSION or trailer != _trailer(head):
        raise ValueError(f"{path} is damaged: it is not as it was written. Use another copy.")
    try:
        return _document(document)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _document(found: dict[str, Any]) -> Document:
    optional = ("anchors",) if isinstance(found, dict) and "anchors" in found else ()
    wanted = ("format_version", "tensors", "parameters", "tasks", "metadata", *optional)
    _keys("the state", found, *wanted)
    tensors, parameters, tasks = found["tensors"], found["parameters"], found["tasks"]
    _keys("tensors", tensors, "file", "sha256", "bytes", checksum=False)
    if not (isinstance(tensors["file"], str) and TENSOR_FILE.fullmatch(tensors["file"])):
        raise ValueError(f"it names the tensor file {tensors['file']!r:.80}.")
    _check_hash_and_size("the tensor file", tensors)
    if not isinstance(parameters, dict) or not isinstance(found["metadata"], dict):
        raise ValueError("parameters or metadata are no object.")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError("tasks are no list of objects.")
    return Document(
        tensors["file"],
        tensors["sha256"],
        tensors["bytes"],
        {name: _entry(name, entry) for name, entry in parameters.items()},
        tuple(TaskRecord(**task) for task in tasks),
        found["metadata"],
        _anchor_files(found.get("anchors", {}), parameters),
    )


def _anchor_files(found: Any, parameters: Mapping[str, Any]) -> dict[str, AnchorFile]:
    if not isinstance(found, dict):
        raise ValueError("anchors are no object.")
    files: dict[str, AnchorFile] = {}
    seen: set[str] = set()
    for path, entry in found.items():
        _keys(f"the entry of {path!r:.80}", entry, "sha256", "bytes", "tensors", checksum=False)
        if not path.endswith(".safetensors") or PurePosixPath(path).is_absolute() or "\\" in path:
            raise ValueError(f"it names {path!r:.80} as a file of weights.")
        _check_hash_and_size(path, entry)
        keys = entry["tensors"]
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
            raise ValueError(f"the anchors in {path!r:.80} are no names.")
        if not keys.keys() <= parameters.keys() or seen & keys.keys():
            raise ValueError(f"the anchors in {path!r:.80} are not one of each parameter.")
        seen |= keys.keys()
        files[path] = AnchorFile(entry["sha256"], entry["bytes"], keys)
    return files


def _check_hash_and_size(what: str, found: Mapping[str, Any]) -> None:
    if not re.fullmatch("[0-9a-f]{64}", str(found["sha256"])) or not _is_count(found["bytes"]):
        raise ValueError(f"the hash or the size of {what:.80} is none.")


def _entry(name: str, found: Any) -> Entry:
    _keys(f"the entry of {name!r:.80}", found, "shape", "scale", "offset", checksum=False)
    shape = found["shape"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"the shape of {name!r:.80} is {shape!r:.80}.")
    for key, above in (("scale", 0.0), ("offset", -1.0)):
        if not is_number(found[key], above):
            raise ValueError(f"the {key} of {name!r:.80} is {found[key]!r:.80}.")
    return Entry(tuple(shape), float(found["scale"]), float(found["offset"]))


def _keys(what: str, found: Any, *keys: str, checksum: bool = True) -> None:
    wanted = {*keys, "checksum"} if checksum else {*keys}
    if not isinstance(found, dict) or found.keys() != wanted:
        seen = sorted(found) if isinstance(found, dict) else found
        raise ValueError(f"{what} has {seen!r:.200} where {sorted(wanted)} were expected.")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
