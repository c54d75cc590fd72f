"""The examples of a trainer as its own training would hand them to the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.training.packed_rows import taken_apart, warn_of_wrapped

logger = logging.getLogger("hf_ewc")

Collator = Callable[[list[Any]], Any]


def examples_of(trainer: Trainer, dataset: Any) -> tuple[Any, Collator]:
    """`dataset` and the collator for it, without the columns that the trainer leaves out.

    Raises:
        ValueError: there is no data set.
        TypeError: it is none.
    """
    if dataset is None:
        raise ValueError(
            "consolidate() has no data: the trainer has no train_dataset. Pass a data set."
        )
    if isinstance(dataset, str) or not (
        hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"consolidate() got {dataset!r:.60} as data; needed is a data set of examples. The "
            "task's name goes by keyword: consolidate(name=...)."
        )
    warn_of_wrapped(trainer, dataset)
    dataset = prepared(trainer, dataset)
    if _loads_itself(trainer) and hasattr(dataset, "__len__"):
        return _as_loaded(trainer, dataset)
    if isinstance(dataset, datasets.Dataset):
        used = trainer._remove_unused_columns(dataset, "Fisher")
        return taken_apart(used, trainer.model), trainer.data_collator
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, "Fisher")
    return taken_apart(dataset, trainer.model), collator


def prepared(trainer: Any, dataset: Any) -> Any:
    """`dataset` as the trainer prepares its own: TRL's tokenize texts, pairs and chats.

    Texts are not packed: each is an example. What is prepared already is left as it is.
    """
    prepare: Any = getattr(trainer, "_prepare_dataset", None)
    if not callable(prepare) or getattr(trainer, "_skip_prepare_dataset", False):
        return dataset
    dataset = _as_table(trainer, dataset)
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    known = {
        "dataset": dataset,
        "processing_class": getattr(trainer, "processing_class", None),
        "args": trainer.args,
        "packing": False,
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "Fisher",
    }
    names = inspect.signature(prepare).parameters
    if dataset is trainer.train_dataset or not names.keys() <= known.keys():
        return dataset
    try:
        return prepare(**{name: known[name] for name in names})
    except (KeyError, TypeError) as error:
        field = getattr(trainer.args, "dataset_text_field", None)
        texts = f" such as {field!r} (dataset_text_field)" if field else ""
        raise ValueError(
            f"{type(trainer).__name__} cannot prepare the data of consolidate(), with the columns "
            f"{dataset.column_names}: {type(error).__name__}: {error!s:.200} Needed are the "
            f"columns of its raw training data{texts}, or data that are tokenized already."
        ) from error


def _as_table(trainer: Any, dataset: Any) -> Any:
    """Raw texts, or raw examples, that come as a list, as a data set; else what was given."""
    if not isinstance(dataset, (list, tuple)) or not dataset:
        return dataset
    if all(isinstance(one, str) for one in dataset):
        field = getattr(trainer.args, "dataset_text_field", "text")
        return datasets.Dataset.from_dict({field: list(dataset)})
    first = dataset[0]
    if not isinstance(first, Mapping) or "input_ids" in first:
        return dataset
    if any(isinstance(value, Tensor) for value in first.values()):
        return dataset
    return datasets.Dataset.from_list(list(dataset))


def _loads_itself(trainer: Trainer) -> bool:
    """Whether the trainer's class has a data loader of its own, as of sentence-transformers."""
    own: Any = type(trainer).get_train_dataloader
    return own is not Trainer.get_train_dataloader


def _as_loaded(trainer: Trainer, dataset: Any) -> tuple[Any, Collator]:
    """What the trainer's own loader for training holds; `dataset` where that is of other data."""
    given, prepared = trainer.train_dataset, list(trainer.accelerator._dataloaders)
    try:
        trainer.train_dataset = dataset
        with preserved_random_states():
            loader = trainer.get_train_dataloader()
    finally:
        trainer.train_dataset = given
        trainer.accelerator._dataloaders[:] = prepared
    data = loader.dataset if isinstance(loader, DataLoader) else None
    if data is not None and hasattr(data, "__len__") and len(data) == len(dataset):
        return data, getattr(loader, "collate_fn", None) or trainer.data_collator
    if trainer.is_world_process_zero():
        logger.warning(
            "The training loader of %s is its own, and none over %d examples as the data set has: "
            "the Fisher is of the data set as it is, batched by the data_collator. If the loader "
            "changes the examples, pass a data set of changed ones to consolidate().",
            type(trainer).__name__,
            len(dataset),
        )
    return dataset, trainer.data_collator


def as_prepared(trainer: Any, collator: Collator) -> Collator:
    """With what a trainer's own `_prepare_inputs` makes of a batch, as in training."""
    prepare: Any = type(trainer)._prepare_inputs
    if prepare.__module__.partition(".")[0] in ("transformers", "trl", "hf_ewc"):
        return collator
    return lambda examples: trainer._prepare_inputs(collator(examples))
