"""The settings of a sequence of tasks beside EWC, as a dataclass for `HfArgumentParser`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_ewc.config import _boolean, _choice, _integer, _layer_lambdas, _modules, _number
from hf_ewc.config import _help as described

KEPT = ("all", "last")
AVERAGES = ("none", "mean", "constant", "fisher")


@dataclass
class SequenceConfig:
    """How a model goes from task to task, beside the penalty of `EWCConfig`.

    Each option is independent of the others and of EWC, and off by default. Each field's meaning is
    its `help`; patterns are those of `EWCConfig`: `trained_modules` and `frozen_modules` as
    `ewc_target_modules`, `learning_rate_factors` as `ewc_layer_lambdas`.

    Raises:
        ValueError: at construction, for a value that is not allowed, or for two ways to replay; it
            names the field, the value and what is allowed.
    """

    replay_share: float = field(
        default=0.0,
        metadata=described(
            "Replay examples of earlier tasks, this share of each later task's training examples, "
            "drawn evenly from the earlier tasks (0.05). 0 to 1."
        ),
    )
    replay_per_class: int = field(
        default=0,
        metadata=described(
            "Replay this many training examples of each class of each earlier task (of a task "
            "without classes, such as a regression, this many in all)."
        ),
    )
    replay_size: int = field(
        default=0,
        metadata=described(
            "Replay a buffer of this many examples in all, each example seen so far being as "
            "likely to be in it as any other (a reservoir)."
        ),
    )
    replay_seed: int = field(default=0, metadata=described("Seed of what is replayed."))
    joint_training: bool = field(
        default=False,
        metadata=described(
            "Train each task on the data of all tasks so far, from the weights that the first "
            "began with: the upper bound that intransigence compares with."
        ),
    )
    head_warmup_share: float = field(
        default=0.0,
        metadata=described(
            "Share of a task's optimizer steps, its first, in which only the head is trained "
            "(Kumar et al. 2022). 0 to 1."
        ),
    )
    l2sp_lambda: float = field(
        default=0.0,
        metadata=described(
            "Strength of λ/2 ‖θ − θ*‖², θ* the weights that the task begins with, from the second "
            "task on (Li et al. 2018). At least 0."
        ),
    )
    trained_modules: list[str] | str | None = field(
        default=None,
        metadata=described(
            "Train only the parameters in these modules: suffixes of module names, one regular "
            "expression, or 'all-linear'. By default all that are trainable.",
            nargs="+",
        ),
    )
    frozen_modules: list[str] | str | None = field(
        default=None,
        metadata=described(
            "Leave the parameters in these modules as they are; given as trained_modules.",
            nargs="+",
        ),
    )
    learning_rate_factors: dict[str, float] | str | None = field(
        default=None,
        metadata=described(
            "Factor of the learning rate by pattern, as JSON: a suffix of the name of a module or "
            "parameter, or a regular expression for one; the longest match wins."
        ),
    )
    keep_models: str = field(
        default="all",
        metadata=described(
            "Which tasks' models and states stay on disk: 'all', or the 'last'.", choices=KEPT
        ),
    )

    def __post_init__(self) -> None:
        for name in ("replay_share", "head_warmup_share"):
            setattr(self, name, _number(name, getattr(self, name), low=0.0, high=1.0))
        self.l2sp_lambda = _number("l2sp_lambda", self.l2sp_lambda, low=0.0)
        for name in ("replay_per_class", "replay_size", "replay_seed"):
            setattr(self, name, _integer(name, getattr(self, name), low=0))
        _boolean("joint_training", self.joint_training)
        _choice("keep_models", self.keep_models, KEPT)
        for name in ("trained_modules", "frozen_modules"):
            setattr(self, name, _modules(name, getattr(self, name)))
        self.learning_rate_factors = _layer_lambdas(
            self.learning_rate_factors, "learning_rate_factors"
        )
        ways = [n for n in ("replay_share", "replay_per_class", "replay_size") if getattr(self, n)]
        if self.joint_training:
            ways.append("joint_training")
        if len(ways) > 1:
            raise ValueError(
                f"{' and '.join(f'{name} is {getattr(self, name)!r}' for name in ways)}; allowed "
                "is one way to train on earlier examples."
            )

    @property
    def replays(self) -> bool:
        """Whether later tasks train on examples of earlier ones."""
        return bool(self.replay_share or self.replay_per_class or self.replay_size)

    def changes(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        defaults = {each.name: each.default for each in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def summary(self) -> str:
        """What is switched on, in a line for people; empty where nothing is."""
        return ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.changes().items())
