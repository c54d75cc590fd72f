"""λ for a trainer's task, found by short trainings on its data."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback, set_seed
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from hf_ewc.config.checked import number
from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.metrics.direction import less_is_better
from hf_ewc.parameters.names import unwrap
from hf_ewc.training.evaluating import all_of_its_own_data
from hf_ewc.training.final_weights import WeightsInUse
from hf_ewc.training.held_out import (
    has_rows,
    held_out_rows,
    number_of_labels,
    other_rows,
    rows_of,
)
from hf_ewc.training.lambda_curve import GIVE_UP, LOWEST, LambdaCurve, Trial, following
from hf_ewc.training.prepared import let_it_be_wrapped
from hf_ewc.training.repeatable import as_before, same_random_numbers
from hf_ewc.training.short_training import for_a_share
from hf_ewc.training.trainer import EWCMixin

logger = logging.getLogger("hf_ewc")


@dataclass(frozen=True)
class FoundLambda:
    """What `find_lambda` returns.

    Attributes:
        ewc_lambda: the λ that was chosen.
        curve: every trial with its score, plain training (λ = 0) first.
        old_losses: for each λ the mean loss on the validation sets of old tasks, where these were
            given.
    """

    ewc_lambda: float
    curve: LambdaCurve
    old_losses: dict[float, float]


def find_lambda(
    trainer: Any,
    *,
    metric: str = "loss",
    greater_is_better: bool | None = None,
    give_up: float = GIVE_UP,
    first: float | None = None,
    lowest: float = LOWEST,
    old_validation: Sequence[Any] = (),
    alpha: float = 1.0,
) -> FoundLambda:
    """λ for the task that an `EWCTrainer` is about to learn, with the state that protects old ones.

    A fifth of the training data is held out; trainings for 40 % of the steps on the rest, plain and
    with λ = first, first/10 …, are scored on it. The first λ that keeps 1 − give_up of what plain
    training reaches is chosen: see `LambdaCurve`. With validation sets of old tasks all λ down to
    `lowest` are tried, and the one with the least L_new + alpha · L_old is chosen, L_old the mean
    of the losses on these sets.

    Model, trainer and random numbers are left as they were; `trainer.ewc_config.ewc_lambda` is
    for the caller to set. The trainer's own callbacks do not see the trials.

    Args:
        trainer: as it will be trained: with `ewc_state=`, and data that can be counted.
        metric: what `trainer.evaluate` returns as `eval_<metric>`.
        greater_is_better: whether more of it is better; by default that is so, but for losses and
            errors by their names ("loss", "mse", "wer", …).
        give_up: at most this share of what plain training would reach on the new task.
        first: the largest λ that is tried; by default what the state tells (`told_lambda`).
        lowest: the smallest.
        old_validation: data sets of old tasks, for the trainer's collator and head.
        alpha: how much the old tasks' loss counts beside the new one's.

    Raises:
        TypeError: the trainer has no EWC.
        ValueError: it has no state, its data is a stream, its model in shards, its optimizer was
            given, evaluation returns no such metric, or no λ has a finite loss.
    """
    _check(trainer)
    told = trainer.ewc_state.told_lambda() if first is None else None
    first = told if first is None else first
    first = number("first", first, low=0.0, open_low=True)
    lowest = number("lowest", lowest, low=0.0, open_low=True)
    give_up, alpha = number("give_up", give_up, low=0.0, high=1.0), number("alpha", alpha, low=0.0)
    _check_sets(old_validation)
    lower = less_is_better(metric, greater_is_better)
    with _as_it_was(trainer, lower) as trial:
        curve = LambdaCurve(
            "the trainer's",
            first,
            give_up,
            trial.score(metric),
            by_improvement=lower,
            lowest=lowest,
            labels=trial.labels if metric == "accuracy" else 0,
            told=told,
        )
        old: dict[float, float] = {}
        strength: float | None = 0.0
        while strength is not None:
            curve = curve.with_trial(trial.made(strength, metric))
            if old_validation:
                old[strength] = trial.loss_on(old_validation)
                is_last = 0 < strength <= lowest
                strength = None if is_last else following(strength, first, lowest)
            else:
                strength = curve.upcoming()
    if said := curve.warning(trainer.args.learning_rate):
        logger.warning("%s", said)
    if not old_validation:
        return FoundLambda(curve.chosen or lowest, curve, {})
    totals = {
        t.ewc_lambda: total
        for t in curve.trials[1:]
        if math.isfinite(total := trial.losses[t.ewc_lambda] + alpha * old[t.ewc_lambda])
    }
    if not totals:
        raise ValueError(
            f"the losses are finite with none of {len(curve.trials) - 1} λ that were tried; "
            f"lower the learning rate ({trainer.args.learning_rate:g})."
        )
    return FoundLambda(min(totals, key=lambda strength: totals[strength]), curve, old)


class _Trials:
    """Short trainings of one trainer, each from the weights that it has now.

    Args:
        trainer: whose they are.
        lower: whether less of what scores them is better.
    """

    def __init__(self, trainer: Any, lower: bool) -> None:
        self._trainer, self._lower = trainer, lower
        data = trainer.train_dataset
        rows = held_out_rows(len(data), trainer.args.seed)
        self._held_out = rows_of(data, rows)
        self._data = rows_of(data, other_rows(len(data), rows))
        self._state, self._config = trainer.ewc_state, trainer.ewc_config
        self._weights = _copied(trainer.model)
        self.args = for_a_share(trainer.args, len(data), len(self._data))
        self.labels = number_of_labels(self._held_out)
        self.losses: dict[float, float] = {}

    def made(self, strength: float, metric: str) -> Trial:
        trainer, began = self._trainer, time.perf_counter()
        self.put_back()
        trainer.args, trainer.train_dataset = self.args, self._data
        trainer.ewc_config = replace(self._config, ewc_lambda=strength, fisher_data="train")
        trainer.ewc_state = self._state if strength else None
        set_seed(trainer.args.seed)
        trainer.train()
        score = self.score(metric)
        self.losses[strength] = self._figure("loss", self._held_out)
        return Trial(
            strength,
            score,
            steps=trainer.state.global_step,
            seconds=time.perf_counter() - began,
        )

    def score(self, metric: str) -> float | None:
        figure = self._figure(metric, self._held_out)
        if not math.isfinite(figure):
            return None
        return -figure if self._lower else figure

    def loss_on(self, sets: Sequence[Any]) -> float:
        return sum(self._figure("loss", data) for data in sets) / len(sets)

    def _figure(self, metric: str, data: Any) -> float:
        with preserved_random_states(), all_of_its_own_data(self._trainer):
            found = self._trainer.evaluate(data)
        if f"eval_{metric}" not in found:
            raise ValueError(
                f"metric is {metric!r}; evaluation returned {sorted(found)}. Name one of these "
                "without its eval_, or give the trainer compute_metrics."
            )
        return float(found[f"eval_{metric}"])

    def put_back(self) -> None:
        """Weights as they were, and no optimizer of an earlier trial."""
        trainer = self._trainer
        unwrap(trainer.model).load_state_dict(self._weights)
        trainer.model.zero_grad(set_to_none=True)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
        let_it_be_wrapped(trainer)


@contextmanager
def _as_it_was(trainer: Any, lower: bool) -> Iterator[_Trials]:
    """Trials with the trainer, which is as before at the end, whatever ends them."""
    state, training = trainer.ewc_state, trainer.model.training
    trials = _Trials(trainer, lower)
    generators = same_random_numbers([trainer.train_dataset])
    with generators, as_before(trainer, trainer.data_collator, but_for=trainer.model):
        trainer.state, trainer.control = TrainerState(), TrainerControl()
        trainer.callback_handler = _without_the_users(trainer)
        trainer._ewc_weights_in_use = WeightsInUse()
        try:
            yield trials
        finally:
            trials.put_back()
            trainer.ewc_state = state
            trainer.model.train(training)


def _without_the_users(trainer: Any) -> CallbackHandler:
    """The callbacks without which a trainer does not train, and this package's."""
    handler = trainer.callback_handler
    own: list[TrainerCallback] = [
        callback
        for callback in handler.callbacks
        if isinstance(callback, DefaultFlowCallback)
        or type(callback).__module__.startswith("hf_ewc.")
    ]
    found: CallbackHandler = copy.copy(handler)
    found.callbacks = own
    return found


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    state = unwrap(model).state_dict()
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _check_sets(sets: Any) -> None:
    """Refuse one data set, or an empty one, where a list of them is to be."""
    if not isinstance(sets, (list, tuple)) or any(isinstance(each, str) for each in sets):
        raise TypeError(
            f"old_validation is a {type(sets).__name__}; needed is a list of data sets, such as "
            "[validation_of_the_first_task]."
        )
    if any(hasattr(each, "__len__") and len(each) == 0 for each in sets):
        raise ValueError("a data set of old_validation is empty; give each at least one example.")


def _check(trainer: Any) -> None:
    if not isinstance(trainer, EWCMixin):
        raise TypeError(
            f"find_lambda got a {type(trainer).__name__}; needed is an EWCTrainer, or a trainer "
            "of a class that begins with EWCMixin."
        )
    if not trainer.ewc_state:
        raise ValueError(
            "the trainer has no EWC state yet, so every λ is the same; give it the one of the "
            "tasks before (ewc_state=)."
        )
    if isinstance(trainer.ewc_config.ewc_layer_lambdas, str):
        raise ValueError(
            "ewc_layer_lambdas is 'state', which tells a λ for each layer; find_lambda looks for "
            "one of all, ewc_lambda. Set ewc_layer_lambdas to None to find it."
        )
    if not has_rows(trainer.train_dataset):
        raise ValueError(
            "find_lambda holds a part of the training data out, for which it must have a length "
            "and examples by number."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "find_lambda does not go with models in shards (FSDP, DeepSpeed): the weights could "
            "not be put back after a trial. Look for λ with DDP or in one process."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "the trainer has an optimizer already, whose state would go from one trial to the "
            "next; call find_lambda before train(), and let the trainer make its own."
        )
