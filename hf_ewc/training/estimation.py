"""The Fisher of a trainer's model on a data set, as the trainer's configuration asks for it."""

from __future__ import annotations

from typing import Any

import datasets
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_ewc.config import EWCConfig
from hf_ewc.fisher import estimate_fisher
from hf_ewc.importance import Fisher
from hf_ewc.parameters.selection import select_parameters


def fisher_of(trainer: Trainer, model: nn.Module, dataset: Any, config: EWCConfig) -> Fisher:
    """The Fisher of `model`, with the trainer's collator and accelerator.

    Args:
        dataset: examples as for training; an iterable data set is read in order.

    Raises:
        ValueError: there is no data, or none with labels, or a pattern selects nothing.
    """
    data, collator = _examples(trainer, dataset, config.fisher_batch_size)
    return estimate_fisher(
        model,
        data,
        data_collator=collator,
        fisher_type=config.fisher_type,
        num_samples=_at_most(config.fisher_samples, data),
        num_draws=config.fisher_draws,
        batch_size=config.fisher_batch_size,
        stratified=config.fisher_stratified,
        seed=config.fisher_seed,
        parameters=select_parameters(model, config.ewc_target_modules, config.ewc_exclude_modules),
        accelerator=trainer.accelerator,
    )


def _examples(trainer: Trainer, dataset: Any, batch_size: int) -> tuple[Any, Any]:
    """`dataset` and the collator for it, without the columns that the model does not take."""
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
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, "Fisher"), trainer.data_collator
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, "Fisher")
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        return DataLoader(dataset, batch_size=batch_size, collate_fn=collator), None
    return dataset, collator


def _at_most(num_samples: int | None, data: Any) -> int | None:
    """All of a data set that has fewer examples than the configuration's number."""
    examples = data.dataset if isinstance(data, DataLoader) else data
    if num_samples is None or not hasattr(examples, "__len__"):
        return num_samples
    return min(num_samples, max(len(examples), 1))
