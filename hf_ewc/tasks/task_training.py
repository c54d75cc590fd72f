"""The trainers of a run's tasks, and training with them as the plan asks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_ewc.tasks.adapting import trainer_arguments
from hf_ewc.tasks.arguments import arguments_of
from hf_ewc.tasks.averaging import Average
from hf_ewc.tasks.evaluation import metrics_of
from hf_ewc.tasks.growth import Growth
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.learning_rates import only_these_train
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.protection import Protection
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.sequence_trainer import Additions, SequenceMixin, sequence_trainer
from hf_ewc.tasks.training_data import TrainingData
from hf_ewc.tasks.ways import additions, adds_to_steps, average, trained
from hf_ewc.training.checkpoints import was_stopped
from hf_ewc.training.prepared import let_it_be_wrapped
from hf_ewc.training.runs import none_beyond_the_last_step


class TaskTraining:
    """Makes a trainer for a task's data, and trains.

    Attributes:
        collator: for the tasks that have none: the plan's, or the trainer's default; known from the
            first trainer on.
    """

    def __init__(
        self,
        plan: Plan,
        space: LabelSpace,
        growth: Growth,
        protection: Protection,
        folder: RunFolder,
    ) -> None:
        self.plan, self._space, self._growth = plan, space, growth
        self._protection, self._folder = protection, folder
        self.collator: Any = None

    def arguments(self, index: int, data: TrainingData) -> TrainingArguments:
        task, folder = self.plan.tasks[index], str(self._folder.task(index))
        args = arguments_of(task, self.plan.args, index, folder)
        if data.apart:  # several forwards in a step; see `SequenceMixin`
            args.ddp_find_unused_parameters = args.ddp_broadcast_buffers = False
        return args

    def trainer(
        self,
        model: nn.Module,
        index: int,
        data: TrainingData,
        protected: Mapping[str, Any],
        args: TrainingArguments | None = None,
        leave_out: str = "",
    ) -> Any:
        """The trainer of task `index`; its model may be another than `model`, with an adapter.

        Args:
            protected: state and settings of EWC, as its arguments.
            args: in place of the task's own.
            leave_out: one of the plan's arguments for the trainer that this one is not to have.
        """
        plan, task = self.plan, self.plan.tasks[index]
        # An accelerator with DeepSpeed is the only one, until its state is reset.
        AcceleratorState._reset_state()
        trainer_class = plan.trainer_class
        if adds_to_steps(plan, index, data):
            trainer_class = sequence_trainer(trainer_class)
        given = trainer_arguments(model, plan)
        trainer = trainer_class(
            model=model,
            args=args or self.arguments(index, data),
            train_dataset=data.dataset,
            eval_dataset=task.eval_dataset,
            data_collator=plan.data_collator,
            compute_metrics=metrics_of(task, plan, model),
            **protected,
            **{key: value for key, value in given.items() if key != leave_out},
        )
        self.collator = trainer.data_collator
        trainer.data_collator = task.data_collator or self.collator
        if isinstance(trainer, SequenceMixin):
            trainer.additions = Additions(plan.tasks, self._space, masked=plan.mask_training)
        return trainer

    def train(
        self, trainer: Any, index: int, data: TrainingData, checkpoint: str | None = None
    ) -> Average | None:
        """Train on the task; the average that is to be taken then, if the plan asks for one."""
        plan, views = self.plan, self._growth.views(index)
        model, collator = trainer.model, trainer.data_collator
        with self._space.of(views[index], plan.mask_training):
            set_seed(trainer.args.seed)
            trainer.data_collator = data.collator(trainer, plan, self.collator)
            with self.all_heads(data), only_these_train(model, trained(plan, model)):
                if isinstance(trainer, SequenceMixin):
                    trainer.additions = additions(plan, index, model, self._space, views)
                mean = average(plan, index, model, self._protection)
                let_it_be_wrapped(trainer)
                stopped = checkpoint is not None and was_stopped(Path(checkpoint))
                with none_beyond_the_last_step(trainer, stopped):
                    trainer.train(resume_from_checkpoint=checkpoint)
        trainer.data_collator = collator
        _refuse_no_step(trainer, plan.tasks[index].name)
        return mean

    def all_heads(self, data: TrainingData) -> AbstractContextManager[None]:
        """All heads in the model, where a batch may have examples for any of them."""
        if self._space.heads is None or not data.tagged:
            return nullcontext()
        return self._space.heads.all_registered()


def _refuse_no_step(trainer: Any, name: str) -> None:
    """What a Trainer only logs: of fewer examples than a batch, dropped, nothing is learnt."""
    state, args = trainer.state, trainer.args
    if state.global_step or not state.max_steps:
        return
    data, processes = trainer.train_dataset, args.world_size
    examples = f"{len(data)} examples" if hasattr(data, "__len__") else "the examples"
    raise ValueError(
        f"Task {name!r} was trained for no step: no batch came of {examples} that were left to "
        f"train on, {args.train_batch_size} for each of {processes} process(es) needed where "
        f"dataloader_drop_last is {args.dataloader_drop_last}. Give more examples, smaller "
        "batches, or keep the last one."
    )
