"""Anchors that a model's checkpoint holds already: found when a state is saved, read from there.

An anchor θ* is often what the model's own files hold, since the model is saved when a task is
consolidated. Then the state names file and tensor in place of a second copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_ewc.files import sha256
from hf_ewc.state.document import STATE_FILE, TENSOR_FILE, AnchorFile

_SAMPLE = 256
"""Values that are compared before all are."""
Place = tuple[Path, str]


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files with a model's weights: `checkpoint` itself, or those in this folder.

    Raises:
        ValueError: there are none, or their index is damaged.
    """
    if checkpoint.is_file() and checkpoint.suffix == ".safetensors":
        return [checkpoint]
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [checkpoint / name for name in _shards(index)]
    found = sorted(checkpoint.glob("*.safetensors"))
    files = [path for path in found if not TENSOR_FILE.fullmatch(path.name)]
    if not files:
        raise ValueError(
            f"{checkpoint} holds no weights in safetensors, to which a state could refer for its "
            "anchor; save the model there first, or save the state without checkpoint=."
        )
    return files


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of a model's weights: {error!r:.120}.") from None


def found_in(anchors: Mapping[str, Tensor], checkpoint: Path) -> dict[str, Place]:
    """File and name of the tensor that each of these anchors is, bit for bit, where there is one.

    By content, since a model's files may name tensors otherwise than the model does (tied ones,
    adapters, architectures that are converted as they are read).

    Raises:
        ValueError: there are no weights, or a file is damaged.
    """
    stored: dict[tuple[torch.Size, torch.dtype], dict[Place, Tensor]] = {}
    for path in weight_files(checkpoint):
        for key, tensor in _mapped(path).items():
            stored.setdefault((tensor.shape, tensor.dtype), {})[path, key] = tensor
    places = {
        name: _place_of(name, anchor, stored.get((anchor.shape, anchor.dtype), {}))
        for name, anchor in anchors.items()
    }
    return {name: place for name, place in places.items() if place is not None}


def _place_of(name: str, anchor: Tensor, alike: Mapping[Place, Tensor]) -> Place | None:
    by_likeness = sorted(alike, key=lambda place: place[1] != name)
    return next((place for place in by_likeness if _identical(anchor, alike[place])), None)


def _identical(one: Tensor, other: Tensor) -> bool:
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one[:_SAMPLE], other[:_SAMPLE]) and torch.equal(one, other)


def described(places: Mapping[str, Place], folder: Path) -> dict[str, AnchorFile]:
    """What `ewc_state.json` in `folder` says of these, by the path of each file from there."""
    by_file: dict[Path, dict[str, str]] = {}
    for name, (path, key) in places.items():
        by_file.setdefault(path, {})[name] = key
    return {
        _path_from(folder, path): AnchorFile(sha256(path), path.stat().st_size, keys)
        for path, keys in by_file.items()
    }


def _path_from(folder: Path, path: Path) -> str:
    """Folders that are links are followed, files are not: those of the Hub's cache are links."""
    there = Path(os.path.realpath(path.parent), path.name)
    return Path(os.path.relpath(there, os.path.realpath(folder))).as_posix()


def read(files: Mapping[str, AnchorFile], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The anchors by name, mapped from files that are as they were when the state was saved.

    Each is looked for from `folder`, then from the folder above, as a state's own file is.

    Raises:
        ValueError: one is not there, or is another now.
    """
    for name, file in files.items():
        path = _unchanged(name, file, folder)
        tensors = _mapped(path)
        for parameter, key in file.tensors.items():
            if key not in tensors:
                raise ValueError(f"{folder / STATE_FILE} is damaged: {path} has no {key!r:.120}.")
            yield parameter, tensors[key]


def _unchanged(name: str, file: AnchorFile, folder: Path) -> Path:
    candidates = [folder / name, folder.resolve().parent / name]
    there = [path for path in candidates if path.is_file()]
    for path in there:
        if path.stat().st_size == file.nbytes and sha256(path) == file.sha256:
            return path
    seen = f"{there[0]} has other content now" if there else f"{candidates[0]} is not there"
    raise ValueError(
        f"The state in {folder} has its anchor in the weights that were saved beside it, {name}, "
        f"and {seen}. Put back that file as it was; a state that is saved without a checkpoint to "
        "refer to holds its own copy."
    )


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
