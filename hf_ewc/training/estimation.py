"""The Fisher of a trainer's model on a data set, as the trainer's configuration asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_ewc.config import EWCConfig
from hf_ewc.fisher import estimate_fisher
from hf_ewc.fisher.likelihood.own_loss import StatedLoss
from hf_ewc.importance import Fisher
from hf_ewc.parameters.adapters import fresh_adapters, has_adapters, weights_by_name
from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.selection import select_parameters
from hf_ewc.parameters.weight_gradients import gradients_of_weights
from hf_ewc.training.data_path import as_prepared, examples_of
from hf_ewc.training.handed_over import handed_over, stated_losses
from hf_ewc.training.loss_scaling import has_users_loss
from hf_ewc.training.packed_rows import joins_examples
from hf_ewc.training.preferences import Likelihood, preferences_of

logger = logging.getLogger("hf_ewc")


def fisher_of(
    trainer: Trainer,
    model: nn.Module,
    dataset: Any,
    config: EWCConfig,
    log_likelihood: Likelihood | None = None,
    own_loss: bool = False,
) -> Fisher:
    """The Fisher of `model`, with the trainer's collator and accelerator.

    Args:
        dataset: examples as for training; an iterable data set is read in order.
        log_likelihood: of (model, batch), log p(y|x) of each example; None: the model's own, or
            that of preferences where the trainer learns these.
        own_loss: whether the trainer computes its loss in a way of its own.

    Raises:
        ValueError: there is no data, or none with labels, or a pattern selects nothing.
    """
    data, collator = examples_of(trainer, dataset)
    preferences = preferences_of(trainer) if log_likelihood is None else None
    if preferences is not None:
        log_likelihood, in_pairs = preferences
        collator = in_pairs(collator)
    stated: list[StatedLoss] = []
    if log_likelihood is None:
        reaches = handed_over(trainer, model, data, collator, own_loss)
        if (own_loss and has_users_loss(trainer)) or reaches.labels is not None:
            stated = stated_losses(trainer, model, data, collator, reaches)
        collator = reaches.of(as_prepared(trainer, collator))
    batch_size = config.fisher_batch_size or trainer.args.per_device_train_batch_size
    if isinstance(data, (IterableDataset, datasets.IterableDataset)):
        if joins_examples(trainer):  # a joined batch does not say where an example ends
            batch_size = 1
        data = DataLoader(data, batch_size=batch_size, collate_fn=collator)
    patterns = config.ewc_target_modules, config.ewc_exclude_modules
    names = select_parameters(model, *patterns, space=config.ewc_space)
    estimate = partial(
        estimate_fisher,
        model,
        data,
        data_collator=None if isinstance(data, DataLoader) else collator,
        fisher_type=config.fisher_type,
        num_samples=_at_most(config.fisher_samples, data),
        num_draws=config.fisher_draws,
        batch_size=batch_size,
        stratified=config.fisher_stratified,
        seed=config.fisher_seed,
        accelerator=trainer.accelerator,
        log_likelihood=log_likelihood,
        stated=stated,
    )
    if not has_adapters(model):
        return estimate(parameters=names)
    if config.ewc_space == "weight":
        return _of_weights(model, names, estimate)
    _warn_if_fresh(trainer, model)
    return estimate(parameters=names)


def _of_weights(model: nn.Module, names: list[str], estimate: Callable[..., Fisher]) -> Fisher:
    """The Fisher of W = W₀ + s B A, by the names of the model without adapters."""
    weights = weights_by_name(model)
    with gradients_of_weights({name: weights[name] for name in names}) as own:
        plain = {id(parameter): name for name, parameter in own.items()}
        found = {n: plain[id(p)] for n, p in parameters_by_name(model).items() if id(p) in plain}
        fisher = estimate(parameters=list(found))
    return replace(fisher, diagonal={found[n]: value for n, value in fisher.diagonal.items()})


def _warn_if_fresh(trainer: Trainer, model: nn.Module) -> None:
    fresh = fresh_adapters(model)
    if fresh and trainer.is_world_process_zero():
        logger.warning(
            "The adapters of %d layers (%s) are fresh: where B = 0 the Fisher of A is 0, so "
            "that only B is held, for as long as A stays what it is now. Set "
            "ewc_space='weight', which holds the weights W0 + s B A themselves, or consolidate "
            "after the adapter has been trained.",
            len(fresh),
            ", ".join(fresh[:2]) + (", …" if len(fresh) > 2 else ""),
        )


def _at_most(num_samples: int | None, data: Any) -> int | None:
    """All of a data set that has fewer examples than the configuration's number."""
    examples = data.dataset if isinstance(data, DataLoader) else data
    if num_samples is None or not hasattr(examples, "__len__"):
        return num_samples
    return min(num_samples, max(len(examples), 1))
