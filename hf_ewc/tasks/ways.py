"""Which of a sequence's ways to train take part in a task, made from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.tasks.averaging import Average, alpha_of
from hf_ewc.tasks.distillation import Distillation
from hf_ewc.tasks.head import head_names
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.learning_rates import learning_rate_factors, trained_names
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.protection import Protection
from hf_ewc.tasks.replay import labels_by_example
from hf_ewc.tasks.sequence_trainer import Additions
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.training_data import TrainingData
from hf_ewc.tasks.warm_up import HeadWarmUp


def adds_to_steps(plan: Plan, index: int, data: TrainingData) -> bool:
    """Whether the trainer of task `index` has to take `Additions`."""
    sequence = plan.sequence
    later = index > 0 and sequence.distillation_weight
    return bool(
        data.tagged or sequence.head_warmup_share or sequence.learning_rate_factors or later
    )


def additions(
    plan: Plan, index: int, model: nn.Module, space: LabelSpace, views: Sequence[Task]
) -> Additions:
    """What is added to the steps of task `index`; `model` is as it is before it.

    Args:
        views: the tasks as their examples are trained on.
    """
    sequence = plan.sequence
    factors = cast("dict[str, float]", sequence.learning_rate_factors or {})
    found = Additions(
        views,
        space,
        factors=learning_rate_factors(model, factors),
        masked=plan.mask_training,
    )
    if sequence.head_warmup_share:
        found.warm_up = HeadWarmUp(model, head_names(model), sequence.head_warmup_share)
    if index and sequence.distillation_weight:
        found.terms.append(
            Distillation(
                model,
                space,
                plan.tasks[:index],
                known_classes(plan, index),
                sequence.distillation_weight,
                sequence.distillation_temperature,
            )
        )
    return found


def known_classes(plan: Plan, index: int) -> list[int] | None:
    """The classes of the tasks before, where they are outputs of one head beside the new ones'."""
    if plan.scenario != "class":
        return None
    labels = {
        label for task in plan.tasks[:index] for label in labels_by_example(task.train_dataset)
    }
    return sorted(label for label in labels if label is not None)


def average(plan: Plan, index: int, model: nn.Module, protection: Protection) -> Average | None:
    """The average to take after task `index`; `model` is as it is before it."""
    kind = plan.sequence.weight_average
    if kind not in ("mean", "constant") or not index:
        return None
    alpha = alpha_of(kind, plan.sequence.weight_average_alpha, index)
    return Average(model, alpha, protection.new_rows(index, model))


def trained(plan: Plan, model: nn.Module) -> list[str]:
    """The parameters that the plan lets train."""
    sequence = plan.sequence
    if sequence.trained_modules is None and sequence.frozen_modules is None:
        return list(parameters_by_name(model))
    return trained_names(model, sequence)
