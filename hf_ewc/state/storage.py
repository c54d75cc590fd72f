"""A state in files: one JSON file and one safetensors file that is named by its content.

    ewc_state.json                        format, tasks, offsets, metadata, name and hash of the
                                          tensor file, checksum of the JSON itself
    ewc_state-<16 hex digits>.safetensors importances, anchors and positions by parameter name

The tensor file comes first, in a temporary folder and then moved into place, and the JSON file,
moved into place likewise, makes the new state the current one. Tensor files that nothing refers to
any more go last. So a process can be killed at any moment and the folder holds the whole former
state or the whole new one. A checkpoint refers to the tensor file in the folder above it; a state
may refer to a model's weights for its anchors (`anchor_reference`).
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ewc.files import (
    alone_in,
    folder_to_write,
    move_into_place,
    remove_leftovers,
    replace_content,
    sha256,
    workplace,
)
from hf_ewc.parameters.sharding import whole
from hf_ewc.state import anchor_reference
from hf_ewc.state.document import (
    STATE_FILE,
    TENSOR_FILE,
    AnchorFile,
    Document,
    Entry,
    parsed,
    read_bytes,
)
from hf_ewc.state.packed import PackedTensor, TensorMap
from hf_ewc.state.records import TaskRecord

logger = logging.getLogger("hf_ewc")

_FURTHER_ATTEMPTS = 20


@dataclass(frozen=True)
class Content:
    """What the files hold; the fields are those of `EWCState`."""

    importance: TensorMap
    anchor: TensorMap
    offsets: Mapping[str, float]
    tasks: tuple[TaskRecord, ...]
    metadata: Mapping[str, Any]

    def packed(self) -> Iterator[tuple[str, PackedTensor]]:
        """Every tensor by a name that tells what it is."""
        for name in self.importance:
            yield f"importance/{name}", self.importance.packed(name)
            yield f"anchor/{name}", self.anchor.packed(name)


Members = dict[str, tuple["weakref.ref[PackedTensor]", int]]


@dataclass(frozen=True)
class Written:
    """A tensor file as it was written, and the tensors that it was written from.

    Saving the same tensors again to the same folder, as at each checkpoint of a run, only has to
    look whether the file is there still.
    """

    digest: str
    size: int
    changed: int
    members: Members

    @classmethod
    def of(cls, path: Path, content: Content) -> Written:
        return cls(sha256(path), *_size_and_time(path), _members(content))

    @property
    def name(self) -> str:
        return f"ewc_state-{self.digest[:16]}.safetensors"

    def is_in(self, folder: Path, content: Content) -> bool:
        """Whether the file is there as it was written, and `content` as it was then."""
        path = folder / self.name
        return (
            path.is_file()
            and _size_and_time(path) == (self.size, self.changed)
            and self.members == _members(content)
        )


_WRITTEN: weakref.WeakKeyDictionary[PackedTensor, Written] = weakref.WeakKeyDictionary()
"""By the first tensor of a state, as long as that lives."""


def _members(content: Content) -> Members:
    """The tensors by name, and how often each was changed in place."""
    return {name: (weakref.ref(packed), _changes(packed)) for name, packed in content.packed()}


def _changes(packed: PackedTensor) -> int:
    return sum(tensor._version for tensor in packed.tensors.values())


def save(
    content: Content,
    folder: str | os.PathLike[str],
    write: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    """Write `content` to `folder`, in place of the state that is there.

    Args:
        content: tensors on any device; for DTensors every process has to call this.
        folder: made if it is not there.
        write: False for the processes that only take part in gathering.
        checkpoint: weights to refer to for the anchors that are there bit for bit.

    Raises:
        ValueError: there are no weights in `checkpoint`, or `folder` is empty or a file.
        TypeError: `folder` is no path.
    """
    folder = folder_to_write(folder)
    in_shards = content.importance.is_sharded
    if not write:
        if in_shards:
            _tensors(content)
        return
    if checkpoint is not None:
        _save_referring(content, folder, Path(checkpoint))
        return
    first = next((packed for _, packed in content.packed()), None)
    written = None if in_shards or first is None else _WRITTEN.get(first)
    if written is not None and written.is_in(folder, content):
        with alone_in(folder) as alone:
            _conclude(content, folder, written, alone)
        return
    written = _written(content, _tensors(content), folder, {})
    if first is not None and not in_shards:
        _WRITTEN[first] = written


def _save_referring(content: Content, folder: Path, checkpoint: Path) -> None:
    """As `save`, without the anchors that are in `checkpoint` already."""
    tensors = _tensors(content)
    anchors = {
        name: tensors[f"anchor/{name}"]
        for name in content.anchor
        if content.anchor.packed(name).indices is None
    }
    places = anchor_reference.found_in(anchors, checkpoint)
    if anchors.keys() - places.keys() or len(anchors) < len(content.anchor):
        logger.warning(
            "Of %d anchors %d are in %s bit for bit; the state has its own copy of the others.",
            len(content.anchor),
            len(places),
            checkpoint,
        )
    for name in places:
        del tensors[f"anchor/{name}"]
    folder.mkdir(parents=True, exist_ok=True)  # for a link to it to be followed
    _written(content, tensors, folder, anchor_reference.described(places, folder))


def _written(
    content: Content,
    tensors: dict[str, Tensor],
    folder: Path,
    anchors: Mapping[str, AnchorFile],
) -> Written:
    """The files of `content`, of which `tensors` are written and `anchors` lie elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) as alone:
        with workplace(folder) as place:
            save_file(tensors, place / "tensors", metadata={"format": "pt"})
            # safetensors makes it for the owner alone; here it is for whom the umask says.
            (place / "tensors").chmod(place.stat().st_mode & 0o666)
            written = Written.of(place / "tensors", content)
            move_into_place(place / "tensors", folder / written.name)
        _conclude(content, folder, written, alone, anchors)
    return written


def _conclude(
    content: Content,
    folder: Path,
    written: Written,
    alone: bool,
    anchors: Mapping[str, AnchorFile] = MappingProxyType({}),
) -> None:
    replace_content(folder / STATE_FILE, _document(content, written, anchors).encoded())
    _remove_stale(folder)
    if alone:
        remove_leftovers(folder)


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def save_reference(folder: Path | str, checkpoint: Path | str) -> None:
    """Give `checkpoint`, a folder directly inside `folder`, the state that `folder` holds now.

    Only the JSON file is written; the tensor file stays in `folder`, which keeps it as long as a
    folder inside it refers to it.

    Raises:
        ValueError: `folder` holds no state, or `checkpoint` is not directly inside it.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    if checkpoint.resolve().parent != folder.resolve():
        raise ValueError(f"{checkpoint} is not directly inside {folder}; save the state itself.")
    content = read_bytes(folder)
    parsed(content, folder / STATE_FILE)
    checkpoint.mkdir(exist_ok=True)
    with alone_in(checkpoint) as alone:
        replace_content(checkpoint / STATE_FILE, content)
        if alone:
            remove_leftovers(checkpoint)


def load(folder: Path | str) -> Content:
    """Read and verify the state in `folder`; the tensors are mapped from the file, on the CPU.

    The tensor file is looked for in `folder`, then in the folder above it.

    Raises:
        ValueError: there is no state, a file is missing, truncated or altered, or its format is
            newer than this version knows.
    """
    folder = Path(folder)
    content = read_bytes(folder)
    while True:
        document = parsed(content, folder / STATE_FILE)
        try:
            return _content(document, folder)
        except FileNotFoundError:
            # Another process may have put a new state in place since; then that one is read.
            content, former = read_bytes(folder), content
            if content == former:
                return _undisturbed(folder)


def _undisturbed(folder: Path) -> Content:
    """What the folder holds while no other process writes to it, which may have put a file back."""
    with alone_in(folder):
        try:
            return _content(parsed(read_bytes(folder), folder / STATE_FILE), folder)
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder / STATE_FILE} refers to {error.filename}, which is neither in "
                f"{folder} nor in the folder above; copy it from where the state was saved."
            ) from None


def tensor_file(folder: Path | str) -> str:
    """Name of the tensor file that `ewc_state.json` in `folder` refers to.

    Raises:
        ValueError: as `load`.
    """
    return parsed(read_bytes(Path(folder)), Path(folder) / STATE_FILE).file


def referred(folder: Path | str) -> list[str]:
    """The files beside the tensor file that the state in `folder` refers to, by their paths there.

    Raises:
        ValueError: as `load`.
    """
    return list(parsed(read_bytes(Path(folder)), Path(folder) / STATE_FILE).anchors)


def _tensors(content: Content) -> dict[str, Tensor]:
    tensors = {}
    for key, packed in content.packed():
        kind, name = key.split("/", 1)
        for part, tensor in packed.tensors.items():
            if part == "values":
                tensors[key] = _portable(tensor)
            elif kind == "importance":  # an anchor is at the positions of its importance
                tensors[f"{part}/{name}"] = _portable(tensor)
    return tensors


def _portable(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _document(content: Content, written: Written, anchors: Mapping[str, AnchorFile]) -> Document:
    entries = {}
    for name in content.importance:
        packed = content.importance.packed(name)
        entries[name] = Entry(tuple(packed.shape), packed.scale, content.offsets[name])
    found = written.name, written.digest, written.size
    return Document(*found, entries, content.tasks, content.metadata, anchors)


def _content(document: Document, folder: Path) -> Content:
    path = _tensor_path(folder, document.file)
    if path.stat().st_size != document.nbytes or sha256(path) != document.sha256:
        raise ValueError(
            f"{path} is damaged: its size or its SHA-256 is not that in {STATE_FILE}. "
            "It was truncated or altered; use another copy."
        )
    try:
        tensors = _mapped(path)
    except SafetensorError as error:
        raise ValueError(f"The state in {folder} is damaged: {error!r}.") from None
    for name, tensor in anchor_reference.read(document.anchors, folder):
        if f"anchor/{name}" in tensors:
            raise ValueError(f"{path} is damaged: it has the anchor of {name!r:.80} once more.")
        tensors[f"anchor/{name}"] = tensor
    importance, anchor = {}, {}
    try:
        for name, entry in document.parameters.items():
            shape, indices = torch.Size(entry.shape), tensors.pop(f"indices/{name}", None)
            values, exponents = tensors.pop(f"importance/{name}"), f"exponents/{name}"
            importance[name] = PackedTensor(
                values, shape, entry.scale, indices, tensors.pop(exponents, None)
            )
            anchor[name] = PackedTensor(tensors.pop(f"anchor/{name}"), shape, 1.0, indices)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error.args[0]!r:.120}.") from None
    if tensors:
        raise ValueError(f"{path} is damaged: {next(iter(tensors))!r:.120} is no part of a state.")
    offsets = {name: entry.offset for name, entry in document.parameters.items()}
    return Content(
        TensorMap(importance), TensorMap(anchor), offsets, document.tasks, document.metadata
    )


def _mapped(path: Path) -> dict[str, Tensor]:
    for _ in range(_FURTHER_ATTEMPTS):
        try:
            return load_file(path)
        except RuntimeError:  # what mapping a file says that another process has just removed
            if not path.is_file():  # else a writer has put the same content back since
                raise FileNotFoundError(2, "No such file", path.name) from None
    return load_file(path)


def _tensor_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder.resolve().parent / name):
        if path.is_file():
            return path
    raise FileNotFoundError(2, "No such file", name)


def _remove_stale(folder: Path) -> None:
    """Remove tensor files that no state here refers to."""
    needed: set[str] = set()
    for inside in (folder, *(path.parent for path in folder.glob(f"*/{STATE_FILE}"))):
        try:
            content = read_bytes(inside)
        except ValueError:  # too large for a state, or no file
            continue
        # By text, not by structure: a reference in a file of a newer format counts as well.
        needed.update(TENSOR_FILE.findall(content.decode(errors="replace")))
    for path in folder.glob("ewc_state-*"):
        if TENSOR_FILE.fullmatch(path.name) and path.name not in needed:
            path.unlink(missing_ok=True)
