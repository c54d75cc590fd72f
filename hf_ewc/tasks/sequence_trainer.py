"""Any Trainer, with what a sequence of tasks adds to its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer

from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.learning_rates import with_factors
from hf_ewc.tasks.mixture import PARTS, TASK_OF_ROW
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.warm_up import HeadWarmUp

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# A term of the loss, a mean over the batch: of the model, its inputs and its outputs.
Term = Callable[[nn.Module, dict[str, Any], Any], Tensor]


@dataclass
class Additions:
    """What is added to a trainer's steps.

    Args:
        tasks: of the sequence, by number, as a mixture's examples name them.
        space: what the model shows to each of them.
        terms: of the loss, beside the task's.
        factors: of the learning rate, by parameter name.
        warm_up: which steps train the head alone.
        masked: whether training sees only a task's own classes.
    """

    tasks: Sequence[Task]
    space: LabelSpace
    terms: list[Term] = field(default_factory=list)
    factors: dict[str, float] = field(default_factory=dict)
    warm_up: HeadWarmUp | None = None
    masked: bool = True


class SequenceMixin(_Base):
    """Batches of several tasks, further terms of the loss, learning rates by parameter, warm-up.

    Stands before any subclass of the Trainer; what is to be done is in `additions`, set after the
    construction. Evaluation is the Trainer's own.
    """

    additions: Additions

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's loss, each example as its own task sees it, plus the terms."""
        if PARTS in inputs:
            loss = self._loss_of_parts(model, inputs[PARTS], **kwargs)
            return (loss, None) if return_outputs else loss
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        if TASK_OF_ROW in inputs:
            inputs = copy.copy(inputs)
            tasks = [self.additions.tasks[k] for k in inputs.pop(TASK_OF_ROW).tolist()]
            with self.additions.space.of_rows(tasks, self.additions.masked):
                return self._loss_with_terms(model, inputs, return_outputs, **kwargs)
        return self._loss_with_terms(model, inputs, return_outputs, **kwargs)

    def _loss_with_terms(
        self, model: nn.Module, inputs: Any, return_outputs: bool, **kwargs: Any
    ) -> Any:
        if not model.training or not self.additions.terms:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        given = copy.copy(inputs)  # a Trainer may take labels out
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        share = self._share_of_step(kwargs.get("num_items_in_batch"))
        for term in self.additions.terms:
            loss = loss + share * term(model, given, outputs)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_parts(self, model: nn.Module, parts: dict[str, Any], **kwargs: Any) -> Tensor:
        """Σ_k n_k/n L_k over the tasks in the batch, n_k the number of labels in each part."""
        counts = {name: _num_labels(part) for name, part in parts.items()}
        losses = []
        for name, part in parts.items():
            task = self.additions.tasks[int(name)]
            with self.additions.space.of(task, self.additions.masked):
                loss = self._loss_with_terms(model, part, False, **kwargs)
            losses.append(loss * (counts[name] / sum(counts.values())))
        total: Tensor = sum(losses[1:], losses[0])
        if self.accelerator.num_processes > 1:
            # DDP waits for every gradient, also of heads that this process had no example for.
            total = total + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return total * self._share_of_step(None)

    def _share_of_step(self, num_items: Any) -> float:
        """What a mean over a batch is multiplied by: 1 where the Trainer itself divides it."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items is not None
            )
        return 1.0 / self.current_gradient_accumulation_steps if scaled else 1.0

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent; during warm-up no gradient but the head's is left."""
        loss = super().training_step(model, *args, **kwargs)
        self._warm_up()
        return loss

    def _ewc_enter(self) -> None:
        """As the parent, where there is a penalty: it moves nothing but the head in warm-up."""
        super()._ewc_enter()  # type: ignore[misc]
        self._warm_up()

    def _warm_up(self) -> None:
        if self.additions.warm_up is not None:
            self.additions.warm_up.after_backward(self.state.global_step, self.state.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent, with the learning rates multiplied by their factors."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.additions.factors:
            with_factors(optimizer, cast(nn.Module, self.model), self.additions.factors)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent, with all heads beside the model where all of them are trained."""
        heads = self.additions.space.heads
        if heads is None:
            super().save_model(output_dir, _internal_call)
            return
        with heads.unregistered():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir is not None:
            heads.save(Path(output_dir))

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        heads = self.additions.space.heads
        with nullcontext() if heads is None else heads.unregistered():
            super()._load_from_checkpoint(folder, model)
        if heads is not None:
            heads.load(Path(folder))


def sequence_trainer(trainer_class: type[Any]) -> type[Any]:
    """A subclass of `trainer_class`, of the same name, that takes `Additions`."""
    return type(trainer_class.__name__, (SequenceMixin, trainer_class), {})


def _num_labels(batch: Any) -> int:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        return len(next(value for value in batch.values() if isinstance(value, Tensor)))
    if labels.is_floating_point():
        return len(labels)
    return int((labels != -100).sum())
