"""The head of a run as it grows from task to task, and what is done about its new rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_ewc.parameters.names import unwrap
from hf_ewc.tasks.class_mask import classification_heads
from hf_ewc.tasks.growing_head import (
    align_weights,
    classes_so_far,
    correct_bias,
    fitted_bias,
    resize,
)
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.mixture import Mixture
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.training_data import TrainingData


class Growth:
    """Does nothing where the plan has no head that grows.

    Args:
        plan: of the run.
        model: as it is before the first task.
        space: which is told of a new head.
    """

    def __init__(self, plan: Plan, model: nn.Module, space: LabelSpace) -> None:
        self._plan, self._space = plan, space
        self._is_on = plan.sequence.grow_head
        if not self._is_on:
            return
        every = (*plan.tasks, *plan.evaluate_also)
        if space.heads is not None or any(task.classes is not None for task in every):
            raise ValueError(
                "grow_head is for one head over all classes; tasks with classes= or head= do "
                "without."
            )
        self._first = int(classification_heads(model)[0].out_features)
        self._sizes = [max(self._first, size) for size in classes_so_far(plan.tasks)]

    def begin(self, index: int, model: nn.Module) -> None:
        """Let the head have the outputs for the classes up to task `index`."""
        if self._is_on:
            self._resize(model, self._sizes[index], index)

    def begin_again(self, model: nn.Module) -> None:
        """Let the head have the outputs that the model came with."""
        if self._is_on:
            self._resize(model, self._first, 0)

    def _resize(self, model: nn.Module, rows: int, index: int) -> None:
        resize(model, rows, self._plan.args.seed + index)
        self._space.head_has_grown(model)

    def old(self, index: int) -> int | None:
        """How many rows are older than task `index`, where it has brought new ones."""
        if not self._is_on or not index or self._sizes[index] == self._sizes[index - 1]:
            return None
        return self._sizes[index - 1]

    def views(self, index: int) -> tuple[Task, ...]:
        """The tasks as task `index` trains on them: with classes where these are kept apart."""
        tasks, old = self._plan.tasks, self.old(index)
        if old is None or not self._plan.sequence.separated_softmax:
            return tasks
        earlier = [replace(task, classes=range(old)) for task in tasks[:index]]
        own = replace(tasks[index], classes=range(old, self._sizes[index]))
        return (*earlier, own, *tasks[index + 1 :])

    def finish(self, trainer: Any, index: int, data: TrainingData, collator: Any) -> None:
        """Align the new rows or correct their bias, as the plan asks."""
        old, model = self.old(index), trainer.model
        if old is None:
            return
        if self._plan.sequence.align_weights:
            align_weights(model, old)
        if data.kept_out:
            with self._space.of(self._plan.tasks[index], masked=False):
                logits, labels = self._outputs(trainer, data, collator)
            correct_bias(model, old, *fitted_bias(logits, labels, old))

    @torch.no_grad()
    def _outputs(self, trainer: Any, data: TrainingData, collator: Any) -> tuple[Tensor, Tensor]:
        """Logits and labels of the examples that were kept out, all in each process."""
        sources = [task.train_dataset for task in self._plan.tasks]
        loader = DataLoader(
            Mixture(sources, data.kept_out, tagged=False),
            batch_size=trainer.args.per_device_eval_batch_size,
            collate_fn=trainer._get_collator_with_removed_columns(collator),
        )
        model = unwrap(trainer.model).eval()
        logits, labels = [], []
        for batch in loader:
            inputs = trainer._prepare_inputs(batch)
            labels.append(inputs.pop("labels"))
            logits.append(model(**inputs)["logits"])
        return torch.cat(logits), torch.cat(labels)
