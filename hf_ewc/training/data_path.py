"""The examples of a trainer as its own training would hand them to the model."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_ewc.fisher.labels import LABEL_NAMES
from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.training.packed_rows import taken_apart, warn_of_wrapped

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
    dataset = _prepared(trainer, dataset)
    if _loads_itself(trainer) and hasattr(dataset, "__len__"):
        return _as_loaded(trainer, dataset)
    if isinstance(dataset, datasets.Dataset):
        used = trainer._remove_unused_columns(dataset, "Fisher")
        return taken_apart(used), trainer.data_collator
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, "Fisher")
    return taken_apart(dataset), collator


def _prepared(trainer: Any, dataset: Any) -> Any:
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
    data = getattr(loader, "dataset", None)
    if data is not None and hasattr(data, "__len__") and len(data) == len(dataset):
        return data, getattr(loader, "collate_fn", None) or trainer.data_collator
    return dataset, trainer.data_collator


def as_handed_over(
    trainer: Trainer, model: nn.Module, data: Any, collator: Collator, own_loss: bool
) -> Collator:
    """`collator` with what reaches the model's forward, by the names that it has there.

    A `compute_loss` of the user's own may take columns out, such as weights of the examples, or
    hand them on by other names: so it is run once, on the first two examples, and what it hands to
    the forward is looked at. Elsewhere what the forward does not take is left out.
    """
    names = _seen_in_forward(trainer, model, data, collator) if own_loss else None
    taken = _arguments(model)

    def collate(examples: list[Any]) -> Any:
        batch = collator(examples)
        if not isinstance(batch, Mapping):
            return batch
        labels = {name: value for name, value in batch.items() if "label" in name}
        labels |= {name: batch[name] for name in LABEL_NAMES if name in batch}
        if names is not None:
            return {**labels, **{there: batch[here] for there, here in names.items()}}
        return {name: v for name, v in batch.items() if taken is None or name in taken | {*labels}}

    return collate


def _arguments(model: nn.Module) -> set[str] | None:
    """The names of what the forward takes; None for anything."""
    get_base: Any = getattr(model, "get_base_model", None)  # of a PEFT model
    parameters = inspect.signature((get_base() if callable(get_base) else model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def _seen_in_forward(
    trainer: Trainer, model: nn.Module, data: Any, collator: Collator
) -> dict[str, str] | None:
    """The batch's name of each tensor that reaches the forward, by its name there.

    None where that cannot be seen: the loss hands on other tensors than the batch's, or fails.
    """
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return None
    calls: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positional = zip(inspect.signature(module.forward).parameters, args, strict=False)
        calls.append({**dict(positional), **kwargs})

    try:
        with _looking_at(model, look), preserved_random_states(), torch.no_grad():
            batch = trainer._prepare_inputs(collator([data[i] for i in range(min(2, len(data)))]))
            trainer.compute_loss(model, copy.copy(batch))
    except Exception:
        return None  # the estimate itself says what is wrong
    here = {id(value): name for name, value in batch.items() if isinstance(value, Tensor)}
    tensors = {n: v for n, v in (calls[0] if calls else {}).items() if isinstance(v, Tensor)}
    if not tensors or any(id(value) not in here for value in tensors.values()):
        return None
    return {name: here[id(value)] for name, value in tensors.items()}


@contextlib.contextmanager
def _looking_at(model: nn.Module, look: Callable[..., None]) -> Iterator[None]:
    """In evaluation mode, with `look` called at each forward."""
    modes = [(module, module.training) for module in model.modules()]
    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    model.eval()
    try:
        yield
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
