"""What a task is trained on: its own examples, and those of earlier tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from hf_ewc.config import EWCConfig
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.mixture import MixtureCollator, Place, joint_places, mixed, places_with_replay
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.replay import Replayed, replayed_in
from hf_ewc.tasks.task import Task
from hf_ewc.training.held_out import held_out_rows


@dataclass(frozen=True)
class TrainingData:
    """The training data of one task.

    Attributes:
        dataset: for the trainer.
        places: where its examples come from; None where they are just the task's.
        tagged: whether they tell which task they are of.
        apart: whether a batch is to be made for each task, not one for all.
        replayed: what is replayed, by task.
        kept_out: examples of the same kinds that are not trained on.
        held_out: numbers of the task's own examples that are not, for the Fisher.
    """

    dataset: Any
    places: list[Place] | None = None
    tagged: bool = False
    apart: bool = False
    replayed: Replayed | None = None
    kept_out: list[Place] = field(default_factory=list)
    held_out: list[int] = field(default_factory=list)

    def own_part(self, prepared: Any, index: int) -> Any:
        """The task's own examples in a trainer's data set, as it has prepared them; else None.

        Where it has packed them they are no more to be told apart.
        """
        if self.places is None or not isinstance(prepared, datasets.Dataset):
            return None
        if len(prepared) != len(self.places):
            return None
        own = [i for i, (task, _) in enumerate(self.places) if task == index]
        return prepared.select(own)

    def collator(self, trainer: Any, plan: Plan, default: Any) -> Any:
        """For the trainer: its own, or one for the examples of several tasks.

        Args:
            default: for the tasks that have none.
        """
        if not self.tagged:
            return trainer.data_collator
        own = [task.data_collator or default for task in plan.tasks]
        cleaned = [trainer._get_collator_with_removed_columns(collator) for collator in own]
        return MixtureCollator(cleaned, self.apart)


def training_data(plan: Plan, index: int, space: LabelSpace) -> TrainingData:
    """What task `index` is trained on; `space` says whether tasks see the model differently."""
    data, task = _all_data(plan, index, space), plan.tasks[index]
    if not holds_out(plan.config, task):
        return data
    rows = held_out_rows(len(task.train_dataset), plan.args.seed + index)
    sources = [each.train_dataset for each in plan.tasks]
    return replace(without(data, sources, index, rows), held_out=rows)


def holds_out(config: EWCConfig | None, task: Task) -> bool:
    """Whether a part of the task's training data is kept for its Fisher alone."""
    if config is None or task.fisher_dataset is not None:
        return False
    return config.fisher_data == "held_out"


def _all_data(plan: Plan, index: int, space: LabelSpace) -> TrainingData:
    sources = [task.train_dataset for task in plan.tasks[: index + 1]]
    if not index or not (plan.sequence.replays or plan.sequence.joint_training):
        return TrainingData(sources[index])
    collators = {id(task.data_collator) for task in plan.tasks}
    apart = space.heads is not None or len(collators) > 1
    tagged = apart or space.has_classes
    if plan.sequence.joint_training:
        places = joint_places([len(data) for data in sources], plan.args.seed)
        return TrainingData(mixed(sources, places, tagged), places, tagged, apart)
    replayed = replayed_in(index, sources, plan.sequence)
    if not replayed:
        return TrainingData(sources[index])
    places = places_with_replay(index, len(sources[index]), replayed)
    places, kept_out = _kept_out(places, plan, index)
    dataset = mixed(sources, places, tagged)
    return TrainingData(dataset, places, tagged, apart, replayed, kept_out)


def without(
    data: TrainingData, sources: Sequence[Any], index: int, rows: Collection[int]
) -> TrainingData:
    """The training data of task `index` without these of its own examples.

    Args:
        sources: the training data of each task.
        rows: numbers of examples in `sources[index]`.
    """
    out = {(index, row) for row in rows}
    places = data.places
    if places is None:
        places = [(index, row) for row in range(len(sources[index]))]
    left = [place for place in places if place not in out]
    return replace(data, dataset=mixed(sources, left, data.tagged), places=left)


def _kept_out(places: list[Place], plan: Plan, index: int) -> tuple[list[Place], list[Place]]:
    """The examples to train on, and the share of each task's that is kept out for bias correction.

    Of each task as many: as the share comes to of the task that has fewest.
    """
    share = plan.sequence.bias_correction_share
    if not share:
        return places, []
    groups: dict[int, list[Place]] = {}
    for k in np.random.default_rng([plan.sequence.replay_seed, index]).permutation(len(places)):
        groups.setdefault(places[k][0], []).append(places[k])
    count = max(1, round(share * min(map(len, groups.values()))))
    out = {place for group in groups.values() for place in group[:count]}
    return [place for place in places if place not in out], sorted(out)
