"""A state in files: one JSON file and one safetensors file that is named by its content.

    ewc_state.json                        format, tasks, offsets, metadata, name and hash of the
                                          tensor file, checksum of the JSON itself
    ewc_state-<16 hex digits>.safetensors importances, anchors and positions by parameter name

The tensor file comes first, in a temporary folder and then moved into place, and the JSON file,
moved into place likewise, makes the new state the current one. Tensor files that nothing refers to
any more go last. So a process can be killed at any moment and the folder holds the whole former
state or the whole new one. A checkpoint refers to the tensor file in the folder above it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ewc.files import alone_in, move_into_place, sha256, workplace
from hf_ewc.parameters.sharding import whole
from hf_ewc.state.packing import PackedTensor, TensorMap

FORMAT_VERSION = 1
STATE_FILE = "ewc_state.json"
_TENSOR_FILE = re.compile(r"ewc_state-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.ewc_state-[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class Content:
    """What the files hold; the fields are those of `EWCState`."""

    importance: TensorMap
    anchor: TensorMap
    offsets: Mapping[str, float]
    tasks: list[dict[str, Any]]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """The tensor file that was written for a state: its SHA-256, and what tells if it changed."""

    digest: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Written:
        return cls(sha256(path), *_size_and_time(path))

    @property
    def name(self) -> str:
        return f"ewc_state-{self.digest[:16]}.safetensors"

    def is_in(self, folder: Path) -> bool:
        """Whether the file is there as it was written."""
        path = folder / self.name
        return path.is_file() and _size_and_time(path) == (self.size, self.changed)


def save(
    content: Content, folder: Path, write: bool = True, written: Written | None = None
) -> Written | None:
    """Write `content` to `folder`, in place of the state that is there.

    Args:
        content: tensors on any device; for DTensors every process has to call this.
        folder: made if it is not there.
        write: False for the processes that only take part in gathering.
        written: what an earlier call returned for the same content; if that file is in `folder`
            still, it is not written again.

    Returns:
        The tensor file, None where it was not for this process to write.
    """
    if write and written is not None and written.is_in(folder):
        with alone_in(folder):
            _conclude(content, folder, written)
        return written
    # Reached by all processes or none where there are DTensors: `written` is None for them.
    tensors = _tensors(content)
    if not write:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        with workplace(folder) as place:
            save_file(tensors, place / "tensors", metadata={"format": "pt"})
            # safetensors makes it for the owner alone; here it is for whom the umask says.
            (place / "tensors").chmod(place.stat().st_mode & 0o666)
            written = Written.of(place / "tensors")
            move_into_place(place / "tensors", folder / written.name)
        _conclude(content, folder, written)
    return None if content.importance.is_sharded else written


def _conclude(content: Content, folder: Path, written: Written) -> None:
    _write_bytes(folder / STATE_FILE, _encoded(_document(content, written)))
    _remove_stale(folder)


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def has_state(folder: Path | str) -> bool:
    """Whether `folder` holds a state, whole or damaged."""
    return (Path(folder) / STATE_FILE).is_file()


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
    content = _read_json(folder)
    _parsed(content, folder / STATE_FILE)
    checkpoint.mkdir(exist_ok=True)
    with alone_in(checkpoint):
        _write_bytes(checkpoint / STATE_FILE, content)
        _remove_temporary(checkpoint)


def load(folder: Path | str) -> Content:
    """Read and verify the state in `folder`; the tensors are mapped from the file, on the CPU.

    The tensor file is looked for in `folder`, then in the folder above it.

    Raises:
        ValueError: there is no state, a file is missing, truncated or altered, or its format is
            newer than this version knows.
    """
    folder = Path(folder)
    content = _read_json(folder)
    while True:
        document = _parsed(content, folder / STATE_FILE)
        try:
            return _content(document, folder)
        except FileNotFoundError as error:
            # Another process may have put a new state in place since; then that one is read.
            content, former = _read_json(folder), content
            if content == former:
                raise ValueError(
                    f"{folder / STATE_FILE} refers to {error.filename}, which is neither in "
                    f"{folder} nor in the folder above; copy it from where the state was saved."
                ) from None


def tensor_file(folder: Path | str) -> str:
    """Name of the tensor file that `ewc_state.json` in `folder` refers to.

    Raises:
        ValueError: as `load`.
    """
    path = Path(folder) / STATE_FILE
    return _file_name(_parsed(_read_json(Path(folder)), path), path)


def _tensors(content: Content) -> dict[str, Tensor]:
    tensors = {}
    for name in content.importance:
        importance, anchor = content.importance.packed(name), content.anchor.packed(name)
        tensors[f"importance/{name}"] = _portable(importance.values)
        tensors[f"anchor/{name}"] = _portable(anchor.values)
        if importance.indices is not None:
            tensors[f"indices/{name}"] = _portable(importance.indices)
    return tensors


def _portable(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _document(content: Content, written: Written) -> dict[str, Any]:
    parameters = {}
    for key in content.importance:
        packed = content.importance.packed(key)
        parameters[key] = {
            "shape": list(packed.shape),
            "scale": packed.scale,
            "offset": content.offsets[key],
        }
    return {
        "format_version": FORMAT_VERSION,
        "tensors": {"file": written.name, "sha256": written.digest},
        "parameters": parameters,
        "tasks": content.tasks,
        "metadata": dict(content.metadata),
    }


def _encoded(document: Mapping[str, Any]) -> bytes:
    """`document` with its checksum, as the one sequence of bytes that stands for it."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    plain = json.dumps(body, allow_nan=False).encode()
    body["checksum"] = hashlib.sha256(plain).hexdigest()
    return json.dumps(body, indent=1, allow_nan=False).encode() + b"\n"


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no JSON ({error}).") from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}; this version of hf-ewc reads up to {FORMAT_VERSION}. "
            "Install a newer one: pip install -U hf-ewc."
        )
    if version != FORMAT_VERSION or not _is_as_written(document, content):
        raise ValueError(f"{path} is damaged: it is not as it was written. Use another copy.")
    parsed: dict[str, Any] = document
    return parsed


def _is_as_written(document: dict[str, Any], content: bytes) -> bool:
    try:
        return _encoded(document) == content
    except ValueError:
        return False


def _file_name(document: Mapping[str, Any], path: Path) -> str:
    tensors = document.get("tensors")
    name = tensors.get("file") if isinstance(tensors, dict) else None
    if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):
        raise ValueError(f"{path} is damaged: it names the tensor file {name!r}.")
    return name


def _content(document: Mapping[str, Any], folder: Path) -> Content:
    path = _tensor_path(folder, _file_name(document, folder / STATE_FILE))
    digest = sha256(path)
    if digest != document["tensors"].get("sha256"):
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {digest[:16]}…, not that in {STATE_FILE}. "
            "It was truncated or altered; use another copy."
        )
    try:
        tensors = _mapped(path)
        importance, anchor, offsets = {}, {}, {}
        for name, entry in document["parameters"].items():
            shape, indices = torch.Size(entry["shape"]), tensors.get(f"indices/{name}")
            values = tensors[f"importance/{name}"]
            importance[name] = PackedTensor(values, shape, float(entry["scale"]), indices)
            anchor[name] = PackedTensor(tensors[f"anchor/{name}"], shape, 1.0, indices)
            offsets[name] = float(entry["offset"])
        tasks, metadata = list(document["tasks"]), dict(document["metadata"])
    except (SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The state in {folder} is damaged: {error!r}.") from None
    return Content(TensorMap(importance), TensorMap(anchor), offsets, tasks, metadata)


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except RuntimeError:  # what mapping a file says that another process has just removed
        if path.is_file():
            raise
        raise FileNotFoundError(2, "No such file", path.name) from None


def _tensor_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder.resolve().parent / name):
        if path.is_file():
            return path
    raise FileNotFoundError(2, "No such file", name)


def _read_json(folder: Path) -> bytes:
    try:
        return (folder / STATE_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} holds no EWC state: there is no {STATE_FILE}. Give a folder that "
            "save_pretrained wrote, or a checkpoint of an EWCTrainer."
        ) from None


def _write_bytes(path: Path, content: bytes) -> None:
    with workplace(path.parent) as place:
        (place / "content").write_bytes(content)
        move_into_place(place / "content", path)


def _remove_stale(folder: Path) -> None:
    """Remove tensor files that no state here refers to, and temporary folders."""
    needed: set[str] = set()
    for path in (folder / STATE_FILE, *folder.glob(f"*/{STATE_FILE}")):
        # By text, not by structure: a reference in a file of a newer format counts as well.
        needed.update(_TENSOR_FILE.findall(path.read_text(encoding="utf-8", errors="replace")))
    for path in folder.glob("ewc_state-*"):
        if _TENSOR_FILE.fullmatch(path.name) and path.name not in needed:
            path.unlink(missing_ok=True)
    _remove_temporary(folder)


def _remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left behind."""
    for path in folder.glob(".ewc_state-*"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
