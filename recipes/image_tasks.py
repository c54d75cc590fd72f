"""Tasks of images with labels: from folders, files, arrays or the Hub, as pixels for a model."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from labelled_data import TABLES, DataArguments, LabelledTask, Part
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig

from hf_ewc.cli.models import pretrained
from hf_ewc.cli.sources import check_file

logger = logging.getLogger("hf_ewc")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
_SIXTEEN_BITS, _TOO_DARK = 0xFFFF, 0x1000  # 12 bits
Pixels = Callable[[Sequence[Image.Image]], Tensor]  # images to [N, channels, height, width]


@dataclass
class ImageArguments(DataArguments):
    train_folder: str | None = field(
        default=None, metadata={"help": "Folder of the training images, with one folder a class."}
    )
    eval_folder: str | None = field(
        default=None, metadata={"help": "Folder of the evaluation images, likewise."}
    )
    image: str = field(default="image", metadata={"help": "Column of the images."})
    permute_pixels: bool = field(
        default=False, metadata={"help": "Shuffle the pixels, in each task by an order of its own."}
    )
    permutation_seed: int = field(
        default=0, metadata={"help": "Seed of the first task's order; the next has the next."}
    )
    num_tasks: int | None = field(
        default=None, metadata={"help": "With permute_pixels: so many tasks of one data set."}
    )


@dataclass
class ImageTask(LabelledTask):
    image: str = "image"  # the column
    train_folder: str | None = None
    eval_folder: str | None = None

    @property
    def columns(self) -> list[str]:
        return [self.image]

    def check(self) -> None:
        if not (self.train_folder or self.eval_folder):
            super().check()
        elif self.dataset_name or self.train_file or not (self.train_folder and self.eval_folder):
            raise ValueError(
                f"task {self.name!r} needs train_folder and eval_folder, or train_file and "
                "eval_file, or dataset_name."
            )
        else:
            self.image, self.label = "image", "label"

    def read(self, part: str) -> tuple[str, Dataset]:
        """The name and the examples of the part "train" or "eval", the images not decoded."""
        folder, file = getattr(self, f"{part}_folder"), getattr(self, f"{part}_file")
        if folder:
            return folder, _of_folder(folder)
        if file and Path(file).suffix.lower() == ".npz":
            return file, _of_arrays(file, self.image, self.label, getattr(self, f"{part}_split"))
        if file:
            check_file(file, (*TABLES, ".npz"))
        where, data = super().read(part)
        if self.image in data.column_names:
            data = _as_images(data, self.image, Path(file).parent if file else Path(), where)
        return where, data


def _of_folder(folder: str) -> Dataset:
    """The images in a folder that has one folder for each class.

    Not by `imagefolder`, which takes a class named "train" or "test" for a split.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder (seen from {Path.cwd()}).")
    classes = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not _is_hidden(p))
    found = [(str(path), k) for k, each in enumerate(classes) for path in _images_below(each)]
    beside = [p for p in sorted(Path(folder).iterdir()) if p.is_file() and not _is_hidden(p)]
    left_out = [path for each in classes for path in _left_out(each)]
    _tell_left_out(left_out, folder, "that are no images by their endings")
    _tell_left_out([path for path in beside if _may_be_image(path)], folder, "in no class's folder")
    if not found:
        raise ValueError(
            f"{folder} has no images in folders; needed is one folder for each class, named after "
            "it, with its images."
        )
    if empty := [each for k, each in enumerate(classes) if k not in {k for _, k in found}]:
        raise ValueError(
            f"{empty[0]} has no images; each folder of {folder} is a class. Put some in, or take "
            "it out."
        )
    columns = {"image": [path for path, _ in found], "label": [k for _, k in found]}
    label = ClassLabel(names=[each.name for each in classes])
    return Dataset.from_dict(columns, Features(image=datasets.Image(decode=False), label=label))


def _files_below(folder: Path) -> list[Path]:
    """By their names; without the hidden files that systems and editors leave behind."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(map(_is_hidden, (path, *path.relative_to(folder).parents)))
    ]


def _images_below(folder: Path) -> list[Path]:
    return [path for path in _files_below(folder) if _may_be_image(path)]


def _left_out(folder: Path) -> list[Path]:
    return [path for path in _files_below(folder) if not _may_be_image(path)]


def _may_be_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions()


def _tell_left_out(paths: list[Path], folder: str, why: str) -> None:
    """Such as a phone's .heic, which Pillow does not know, or images beside the folders."""
    if paths:
        kinds = ", ".join(sorted({path.suffix.lower() or path.name for path in paths})[:5])
        logger.warning(
            "Left out %d files of %s %s (%s), such as %s.", len(paths), folder, why, kinds, paths[0]
        )


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


@lru_cache
def _of_arrays(file: str, image: str, label: str, split: str) -> Dataset:
    """The images in an .npz file: uint8, [N, height, width] or [N, height, width, 3].

    The arrays are named as the columns or, where one file holds several splits, `x_train`, ….
    """
    check_file(file, (".npz",))
    try:
        with np.load(file) as content:
            arrays = dict(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    pictures, labels = (_array(arrays, name, split, file) for name in (image, label))
    is_colour = pictures.ndim == 4 and pictures.shape[3] == 3
    if pictures.dtype != np.uint8 or not (is_colour or pictures.ndim == 3):
        raise ValueError(
            f"{file} has images of {pictures.dtype} in the shape {pictures.shape}; needed is uint8 "
            "(0 to 255) in (number, height, width) or (number, height, width, 3)."
        )
    if labels.shape != pictures.shape[:1] or labels.dtype.kind not in "iuU" or not len(labels):
        raise ValueError(
            f"{file} has labels of {labels.dtype} in the shape {labels.shape} for "
            f"{len(pictures)} images; needed is one whole number or word for each."
        )
    kind = Value("string" if labels.dtype.kind == "U" else "int64")
    columns = {image: [{"bytes": _png(each), "path": None} for each in pictures], label: labels}
    return Dataset.from_dict(columns, Features({image: datasets.Image(decode=False), label: kind}))


def _array(arrays: dict[str, Any], name: str, split: str, file: str) -> Any:
    for found in (name, f"{name}_{split}"):
        if found in arrays:
            return arrays[found]
    raise ValueError(f"{file} has no array {name!r}; it has {', '.join(arrays)}.")


def _png(picture: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _as_images(data: Dataset, column: str, folder: Path, where: str) -> Dataset:
    """The column as images that are not decoded: theirs, or paths as seen from the file."""
    kind = data.features[column]
    if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
        paths = [value and str(folder / value) for value in data[column]]
        data = data.remove_columns(column).add_column(column, paths)
    try:
        return data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # whatever pyarrow raises
        raise ValueError(f"{where} has no images in column {column!r}, but {kind}.") from error


def pixels_for(config: PretrainedConfig, model_name: str | None) -> Pixels:
    """What makes images the pixels of a model: its own processor, or plain scaling to 0 … 1."""
    channels = getattr(config, "num_channels", 3)
    if channels not in _MODES:
        raise ValueError(
            f"num_channels of the model is {channels}; images have 1 (grey), 3 (colours) or 4 "
            "(colours and transparency)."
        )
    mode = _MODES[channels]
    if model_name is not None:
        processor: Any = pretrained(AutoImageProcessor, model_name)
        return lambda images: processor(
            [image.convert(mode) for image in images], return_tensors="pt"
        )["pixel_values"]
    size = getattr(config, "image_size", None)
    wanted = (size, size) if isinstance(size, int) else tuple(reversed(size or ()))

    def scaled(images: Sequence[Image.Image]) -> Tensor:
        arrays = []
        for image in (image.convert(mode) for image in images):
            fitting = image if not wanted or image.size == wanted else image.resize(wanted)
            arrays.append(np.atleast_3d(np.asarray(fitting, dtype=np.float32) / 255))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    return scaled


def permuted(pixels: Pixels, seed: int) -> Pixels:
    """The pixels in another order, drawn from the seed: the same for all images and channels."""

    def shuffled(images: Sequence[Image.Image]) -> Tensor:
        found = pixels(images)
        flat = found.flatten(2)
        order = torch.randperm(flat.shape[2], generator=torch.Generator().manual_seed(seed))
        return flat[:, :, order].view_as(found)

    return shuffled


def with_pixels(part: Part, task: ImageTask, rows: dict[str, int], pixels: Pixels) -> Dataset:
    """The part as a model takes it: pixels when they are asked for, and rows of the head.

    Raises:
        ValueError: an image that cannot be read to its end; of the Hub's, when it is used.
    """

    def ready(batch: dict[str, list[Any]]) -> dict[str, Any]:
        if "pixel_values" not in batch:
            return batch
        images = [_loaded(value, part.where) for value in batch["pixel_values"]]
        return {**batch, "pixel_values": pixels(images)}

    brightest = max(
        (_deepest(value, part.where) for value in _local(part, task)), default=_SIXTEEN_BITS
    )
    if brightest < _TOO_DARK:
        raise ValueError(
            f"{part.where} has grey images of 16 bits, and none has a pixel above {brightest}: of "
            f"their {_SIXTEEN_BITS} shades the upper 8 bits are taken, which leaves these nearly "
            "black. Scale them to the whole range, or save them with 8 bits."
        )
    return part.with_labels({task.image: "pixel_values"}, rows).with_transform(ready)


def _local(part: Part, task: ImageTask) -> list[Any]:
    """The images that are at hand and can be looked at before they are used."""
    return [] if task.dataset_name else part.column(task.image)


def _deepest(value: Any, where: str) -> int:
    """The brightest pixel of a grey image of 16 bits; as bright as can be of any other."""
    with _opened(value, where) as image:
        is_deep = image.mode.startswith("I")
    image = _loaded(value, where)
    if not is_deep:
        return _SIXTEEN_BITS
    with _opened(value, where) as deep:
        return int(np.asarray(deep).max())


def _loaded(value: Any, where: str) -> Image.Image:
    with _opened(value, where) as image:
        try:
            image.load()
        except Exception as error:  # whatever the reader of its kind raises
            raise _unreadable(value, where, error) from error
        return _of_eight_bits(_upright(image), value, where)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it lies where that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as many kinds as there are ways to write it wrongly
        return image


def _of_eight_bits(image: Image.Image, value: Any, where: str) -> Image.Image:
    """Grey of 16 bits by its upper 8; Pillow's own conversion would make nearly all of it white."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 0xFFFF:
        error = ValueError(f"its pixels are {grey.dtype}; needed are whole numbers of 8 or 16 bits")
        raise _unreadable(value, where, error)
    return Image.fromarray((grey.astype(np.uint32) >> 8).astype(np.uint8))


def _opened(value: Any, where: str) -> Image.Image:
    found = value or {}
    content, path = found.get("bytes"), found.get("path")
    if content is None and path is None:
        raise ValueError(f"{where} has an example without an image.")
    try:
        return Image.open(io.BytesIO(content) if content is not None else path)
    except Exception as error:  # such as Pillow's own of pictures that are too large for it
        raise _unreadable(value, where, error) from error


def _unreadable(value: Any, where: str, error: Exception) -> ValueError:
    name = value.get("path") or "an image"
    return ValueError(f"{name} of {where} cannot be read as an image: {error}")
