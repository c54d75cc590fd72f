"""The data of the tables: the Hub's, or local files in a folder.

FOLDER/mnist/data.npz            x_train, y_train, x_test, y_test (n, 28, 28)
FOLDER/cifar100/data*.npz        the same (n, 32, 32, 3)
FOLDER/NAME/{train,test}.parquet columns text, label; FOLDER/NAME/labels.json: label_names
FOLDER/lm/tinyshakespeare/{train,validation,test}.txt
"""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

ON_THE_HUB = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}
TEXTS_ON_THE_HUB = {
    "clinc150": ("clinc/clinc_oos", "plus", ["text"], "intent"),
    "ag_news": ("fancyzhx/ag_news", None, ["text"], "label"),
    "yelp5": ("Yelp/yelp_review_full", None, ["text"], "label"),
    "amazon5": ("fancyzhx/amazon_polarity", None, ["title", "content"], "label"),  # 2 classes
    "dbpedia14": ("fancyzhx/dbpedia_14", None, ["title", "content"], "label"),
}
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


@dataclass(frozen=True)
class Images(Dataset):  # type: ignore[type-arg]
    """Images in memory, (n, ...) in [0, 1], and their labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}

    def __getitems__(self, indices: list[int]) -> list[dict[str, object]]:
        rows = torch.as_tensor(indices)
        pairs = zip(self.pixels[rows].unbind(), self.labels[rows].tolist(), strict=True)
        return [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]

    def of(self, classes: tuple[int, ...]) -> "Images":
        """Only the images of these classes."""
        kept = torch.isin(self.labels, torch.tensor(classes))
        return Images(self.pixels[kept], self.labels[kept])


def images(name: str, folder: Path | None) -> tuple[Images, Images]:
    """Training and test images; channels come first where there are any."""
    if folder is None:
        hub, column, label = ON_THE_HUB[name]
        found = [datasets.load_dataset(hub, split=split) for split in ("train", "test")]
        arrays = [(np.stack([np.asarray(i) for i in d[column]]), d[label]) for d in found]
    else:
        file = next(iter(sorted((folder / name).glob("data*.npz"), reverse=True)), None)
        if file is None:
            raise ValueError(f"{folder / name} has no data.npz; see sources.py for what it holds.")
        held = np.load(file)
        arrays = [(held[f"x_{split}"], held[f"y_{split}"]) for split in ("train", "test")]
    train, test = (Images(_pixels(x), torch.as_tensor(np.asarray(y))) for x, y in arrays)
    return train, test


def _pixels(array: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(array).to(torch.float32) / 255
    return pixels.permute(0, 3, 1, 2).contiguous() if pixels.ndim == 4 else pixels.flatten(1)


def texts(name: str, folder: Path | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test texts with the names of their labels: columns text, label."""
    if folder is not None:
        names = json.loads((folder / name / "labels.json").read_text())["label_names"]
        frames = [pd.read_parquet(folder / name / f"{s}.parquet") for s in ("train", "test")]
        train, test = (f.assign(label=[names[int(i)] for i in f.label]) for f in frames)
        return train, test
    hub, config, columns, label = TEXTS_ON_THE_HUB[name]
    found = datasets.load_dataset(hub, config)
    train, test = (_of_hub(found[split], columns, label) for split in ("train", "test"))
    return train, test


def _of_hub(data: datasets.Dataset, columns: list[str], label: str) -> pd.DataFrame:
    feature = data.features[label]
    name = feature.int2str if hasattr(feature, "int2str") else str
    joined = [" ".join(row) for row in zip(*(data[c] for c in columns), strict=True)]
    return pd.DataFrame({"text": joined, "label": [name(i) for i in data[label]]})


def shakespeare(folder: Path | None) -> str:
    if folder is not None:
        return (folder / "lm" / "tinyshakespeare" / "train.txt").read_text(encoding="utf-8")
    lines = datasets.load_dataset("text", data_files=SHAKESPEARE, split="train")["text"]
    return "\n".join(lines)


def shakespeare_parts(folder: Path | None) -> dict[str, str]:
    """Text to train on, to choose by and to test on: the first 90 %, then 5 % each."""
    names = ("train", "validation", "test")
    if folder is not None:
        return {
            name: (folder / "lm" / "tinyshakespeare" / f"{name}.txt").read_text(encoding="utf-8")
            for name in names
        }
    whole = shakespeare(None)
    ends = (0, int(0.9 * len(whole)), int(0.95 * len(whole)), len(whole))
    return {name: whole[a:b] for name, a, b in zip(names, ends, ends[1:], strict=False)}
