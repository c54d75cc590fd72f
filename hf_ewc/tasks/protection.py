"""What holds a model to earlier tasks while it learns the next: the EWC state, and L2-SP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_ewc.config import EWCConfig
from hf_ewc.parameters.adapters import has_adapters
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.class_mask import classification_heads
from hf_ewc.tasks.growing_head import head_parameters
from hf_ewc.tasks.head import head_names, head_names_in_states
from hf_ewc.tasks.head_state import joined, split
from hf_ewc.tasks.heads import as_head, heads_of, key_of
from hf_ewc.tasks.l2_sp import with_l2_sp
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.training_data import TrainingData
from hf_ewc.training.held_out import rows_of
from hf_ewc.training.lambda_curve import START


class Protection:
    """The state as it goes from task to task, that of each task's own head kept apart.

    Args:
        plan: of the run.
        space: whether tasks have heads of their own.
        model: as it is before the first task.
        state: what protects it already then.

    Raises:
        ValueError: settings that do not go with a state of the weights under adapters.

    Attributes:
        config: the settings of EWC, λ a number; None without EWC.
        state: of the backbone, or of the whole model where all tasks share its head; None before
            the first task and without EWC.
    """

    def __init__(
        self, plan: Plan, space: LabelSpace, model: nn.Module, state: EWCState | None
    ) -> None:
        _check_space(plan, model)
        self._plan, self._space = plan, space
        self._of_heads: dict[str | None, EWCState] = {}
        self._grown_rows: dict[str, Sequence[int]] = {}
        self.config = plan.config
        if self.config is not None and self.config.fisher_data != "train":
            self.config = replace(self.config, fisher_data="train")  # the run holds out by itself
        if self.config is not None and self.config.finds_lambda:
            self.use(START)
        self.state = state
        if state and space.heads is not None:
            self.state, self._of_heads[None] = split(state, head_names_in_states(model))

    def use(self, ewc_lambda: float) -> None:
        """Protect with this λ from now on."""
        if self.config is not None:
            self.config = replace(self.config, ewc_lambda=ewc_lambda)

    def settled(self, index: int) -> EWCConfig | None:
        """The settings for task `index`, λ a number also where the state tells it."""
        if self.config is None:
            return None
        return self.config.settled(self._of(self._plan.tasks[index]))

    def told_lambda(self, index: int) -> float:
        """λ that the state tells for task `index`."""
        return self._of(self._plan.tasks[index]).told_lambda()

    def given(
        self,
        index: int,
        model: nn.Module,
        factor: float = 1.0,
        config: EWCConfig | None = None,
        with_ewc: bool = True,
    ) -> dict[str, Any]:
        """State and settings for the trainer of task `index`, as its arguments.

        Args:
            factor: of all strengths.
            config: in place of the settings in force.
            with_ewc: False lets its penalty out, and nothing else.
        """
        config = config or self.config
        strength = factor * self._plan.sequence.l2sp_lambda
        state = self._of(self._plan.tasks[index]) if with_ewc else EWCState()
        if config is not None and (strength or factor != 1.0):
            config = config.settled(state)
        if config is not None and factor != 1.0:
            config = stronger(config, factor)
        if strength and index:
            free = {**self.new_rows(index, model), **self._grown_rows}
            state, config = with_l2_sp(state, config, model, strength, free)
        return {} if config is None else {"ewc_config": config, "ewc_state": state}

    def grow(self, model: nn.Module, old: int | None) -> None:
        """Admit the new rows of the head, which has had `old`; they are not protected."""
        self._grown_rows = {}
        if old is not None:
            rows = range(old, classification_heads(model)[0].out_features)
            self._grown_rows = dict.fromkeys(head_parameters(model), rows)
        if self.state:
            names = [name for name in self._grown_rows if name in self.state.importance]
            self.state = self.state.grow_rows(model, names) if names else self.state

    def consolidate(self, trainer: Any, index: int, data: TrainingData) -> None:
        """Fold the task into the state; what is of its own head is kept apart."""
        plan, task = self._plan, self._plan.tasks[index]
        given: dict[str, Any] = {}
        if plan.log_likelihood is not None:
            given["log_likelihood"] = plan.log_likelihood
        dataset = task.fisher_dataset
        if data.held_out:
            dataset = rows_of(task.train_dataset, data.held_out)
        if dataset is None:
            dataset = data.own_part(trainer.train_dataset, index)
        if dataset is None and data.places is not None:
            dataset = task.train_dataset
        if trainer.ewc_config is not self.config:  # in force while training: L2-SP, more strength
            trainer.ewc_config, trainer.ewc_state = self.config, self._of(task)
        state = trainer.consolidate(dataset, name=task.name, weight=task.weight, **given)
        self._take(state, task, trainer.model)

    def _take(self, state: EWCState, task: Task, model: nn.Module) -> None:
        self.state = state
        if self._space.heads is None:
            return
        self.state, of_head = split(state, head_names_in_states(model))
        head = as_head(task.head)
        if head is None or head.protected:
            self._of_heads[key_of(task)] = of_head

    def save_heads(self, folder: Path) -> None:
        """Write the states of the heads beside a model; only the main process does."""
        for i, key in enumerate(self._keys()):
            if key in self._of_heads:
                self._of_heads[key].save_pretrained(folder / f"head-{i}", is_main_process=True)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Take back what was saved with the model in `folder`, whose head is in place."""
        if self._plan.config is None:
            return
        self.state = EWCState.from_pretrained(str(folder))
        if self._space.heads is None:
            return
        self.state, _ = split(self.state, head_names_in_states(model))
        self._of_heads = {}
        for i, key in enumerate(self._keys()):
            if (folder / f"head-{i}").is_dir():
                self._of_heads[key] = EWCState.from_pretrained(folder / f"head-{i}")

    def _of(self, task: Task) -> EWCState:
        """The state of the backbone, with that of the task's head."""
        return joined(self.state or EWCState(), self._of_heads.get(key_of(task)))

    def _keys(self) -> list[str | None]:
        """Of the heads, the model's own first; those of further tasks come behind."""
        return [None, *heads_of(self._plan.tasks)]

    def new_head(self, index: int, model: nn.Module) -> set[str]:
        """The parameters of the task's head, if no task before had it."""
        keys = [key_of(task) for task in self._plan.tasks[: index + 1]]
        return set() if keys[-1] in keys[:-1] else set(head_names(model))

    def new_rows(self, index: int, model: nn.Module) -> dict[str, Sequence[int] | None]:
        """By name, which rows of a parameter task `index` is the first to train; None: all.

        Those of a head of its own, and those of its own classes on the shared head.
        """
        *earlier, task = self._plan.tasks[: index + 1]
        found: dict[str, Sequence[int] | None] = dict.fromkeys(self.new_head(index, model))
        if task.classes is None or not self._plan.mask_training:
            return found
        if any(each.classes is None for each in earlier):
            return found
        known = {label for each in earlier for label in each.classes or ()}
        new = [label for label in task.classes if label not in known]
        return {**found, **dict.fromkeys(head_parameters(model), new)} if new else found


def stronger(config: EWCConfig, factor: float) -> EWCConfig:
    """The settings with every λ multiplied."""
    by_layer = config.ewc_layer_lambdas
    return replace(
        config,
        ewc_lambda=factor * config.strength,
        ewc_layer_lambdas=(
            {pattern: factor * value for pattern, value in by_layer.items()}
            if isinstance(by_layer, dict)
            else None
        ),
    )


def _check_space(plan: Plan, model: nn.Module) -> None:
    sequence = plan.sequence
    asked = {
        "l2sp_lambda": sequence.l2sp_lambda > 0,
        "weight_average": sequence.weight_average == "fisher",
    }
    adapted = has_adapters(model) or plan.trainer_kwargs.get("peft_config") is not None
    if plan.config is None or plan.config.ewc_space != "weight" or not adapted:
        return
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"{name} is {getattr(sequence, name)!r}, which holds an adapter's own A and B, and "
                "ewc_space is 'weight'; use ewc_space='adapter' with it."
            )
