"""The settings of a sequence of tasks beside EWC, as a dataclass for `HfArgumentParser`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_ewc.config.checked import boolean, by_pattern, choice, hint, integer, modules, number

KEPT = ("all", "last")
AVERAGES = ("none", "mean", "constant", "fisher")
COUNTS = ("replay_per_class", "replay_size", "replay_seed", "gate_retries", "kl_examples")
OF_THE_GATE = ("max_forgetting", "gate_retries", "gate_factor")


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
        metadata=hint(
            "Replay examples of earlier tasks, this share of each later task's training examples, "
            "drawn evenly from the earlier tasks (0.05). 0 to 1."
        ),
    )
    replay_per_class: int = field(
        default=0,
        metadata=hint(
            "Replay this many training examples of each class of each earlier task (of a task "
            "without classes, such as a regression, this many in all)."
        ),
    )
    replay_size: int = field(
        default=0,
        metadata=hint(
            "Replay a buffer of this many examples in all, each example seen so far being as "
            "likely to be in it as any other (a reservoir)."
        ),
    )
    replay_seed: int = field(default=0, metadata=hint("Seed of what is replayed."))
    joint_training: bool = field(
        default=False,
        metadata=hint(
            "Train each task on the data of all tasks so far, from the weights that the first "
            "began with: the upper bound that intransigence compares with."
        ),
    )
    head_warmup_share: float = field(
        default=0.0,
        metadata=hint(
            "Share of a task's optimizer steps, its first, in which only the head is trained "
            "(Kumar et al. 2022). 0 to 1."
        ),
    )
    l2sp_lambda: float = field(
        default=0.0,
        metadata=hint(
            "Strength of λ/2 ‖θ − θ*‖², θ* the weights that the task begins with, from the second "
            "task on (Li et al. 2018). At least 0."
        ),
    )
    weight_average: str = field(
        default="none",
        metadata=hint(
            "After each task θ ← (1 − α) θ* + α θ, θ* the weights that it began with: 'mean', "
            "α = 1/k after the k-th task; 'constant', α = weight_average_alpha. 'fisher': the "
            "average of all tasks' weights that their Fishers weigh (with ewc_mode 'separate').",
            choices=AVERAGES,
        ),
    )
    weight_average_alpha: float = field(
        default=0.5, metadata=hint("α of weight_average 'constant'. 0 to 1.")
    )
    distillation_weight: float = field(
        default=0.0,
        metadata=hint(
            "Weight of the divergence from the model before the task, on the new inputs and what "
            "earlier tasks knew (learning without forgetting, Li & Hoiem 2016). At least 0."
        ),
    )
    distillation_temperature: float = field(
        default=2.0, metadata=hint("Temperature of the distillation. Above 0.")
    )
    trained_modules: list[str] | str | None = field(
        default=None,
        metadata=hint(
            "Train only the parameters in these modules: suffixes of module names, one regular "
            "expression, or 'all-linear'. By default all that are trainable.",
            nargs="+",
        ),
    )
    frozen_modules: list[str] | str | None = field(
        default=None,
        metadata=hint(
            "Leave the parameters in these modules as they are; given as trained_modules.",
            nargs="+",
        ),
    )
    learning_rate_factors: dict[str, float] | str | None = field(
        default=None,
        metadata=hint(
            "Factor of the learning rate by pattern, as JSON: a suffix of the name of a module or "
            "parameter, or a regular expression for one; the longest match wins."
        ),
    )
    grow_head: bool = field(
        default=False,
        metadata=hint(
            "Let the shared head grow with the labels of the tasks (class-incremental); new rows "
            "are not protected."
        ),
    )
    separated_softmax: bool = field(
        default=False,
        metadata=hint(
            "With grow_head: train a task's examples on the softmax over its new classes alone, "
            "and replayed ones on that over the old."
        ),
    )
    align_weights: bool = field(
        default=False,
        metadata=hint(
            "With grow_head: after each task scale the new rows of the head to the mean length of "
            "the old ones (Zhao et al. 2020)."
        ),
    )
    bias_correction_share: float = field(
        default=0.0,
        metadata=hint(
            "With grow_head and replay: share of the examples of both that is kept out of "
            "training, on which scale and bias of the new outputs are fitted (Wu et al. 2019)."
        ),
    )
    max_forgetting: float | None = field(
        default=None,
        metadata=hint(
            "The most by which an earlier task's score may fall below its best; a task after which "
            "it has fallen by more is tried again (gate_retries), then the run stops."
        ),
    )
    gate_retries: int = field(
        default=0,
        metadata=hint(
            "How often such a task is tried again, each time with gate_factor times the strength "
            "of EWC and L2-SP."
        ),
    )
    gate_factor: float = field(
        default=10.0, metadata=hint("Factor of the strength for each new try. Above 0.")
    )
    kl_examples: int = field(
        default=0,
        metadata=hint(
            "Measure at each task's end, on this many of its evaluation examples (200), the "
            "divergence KL(before ‖ after) of the model from what it was before the task: "
            "forgetting follows it (Shenfeld et al. 2025). 0: not."
        ),
    )
    keep_models: str = field(
        default="all",
        metadata=hint(
            "Which tasks' models and states stay on disk: 'all', or the 'last'.", choices=KEPT
        ),
    )

    def __post_init__(self) -> None:
        for name in ("replay_share", "head_warmup_share", "weight_average_alpha"):
            setattr(self, name, number(name, getattr(self, name), low=0.0, high=1.0))
        for name in ("l2sp_lambda", "distillation_weight"):
            setattr(self, name, number(name, getattr(self, name), low=0.0))
        for name in ("distillation_temperature", "gate_factor"):
            setattr(self, name, number(name, getattr(self, name), low=0.0, open_low=True))
        if self.max_forgetting is not None:
            self.max_forgetting = number("max_forgetting", self.max_forgetting, low=0.0)
        choice("weight_average", self.weight_average, AVERAGES)
        for name in COUNTS:
            setattr(self, name, integer(name, getattr(self, name), low=0))
        for name in ("joint_training", "grow_head", "separated_softmax", "align_weights"):
            boolean(name, getattr(self, name))
        self.bias_correction_share = number(
            "bias_correction_share", self.bias_correction_share, low=0.0, high=0.5
        )
        choice("keep_models", self.keep_models, KEPT)
        for name in ("trained_modules", "frozen_modules"):
            setattr(self, name, modules(name, getattr(self, name)))
        self.learning_rate_factors = by_pattern("learning_rate_factors", self.learning_rate_factors)
        ways = [n for n in ("replay_share", "replay_per_class", "replay_size") if getattr(self, n)]
        if self.joint_training:
            ways.append("joint_training")
        if len(ways) > 1:
            raise ValueError(
                f"{' and '.join(f'{name} is {getattr(self, name)!r}' for name in ways)}; allowed "
                "is one way to train on earlier examples."
            )

        self._check_growth()

    def _check_growth(self) -> None:
        """Refuse what needs a head that grows without one, and averages of a head that does."""
        needs = ("separated_softmax", "align_weights", "bias_correction_share")
        for name in needs:
            if getattr(self, name) and not self.grow_head:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is for a head that grows: set "
                    "grow_head=True."
                )
        if self.bias_correction_share and not self.replays:
            raise ValueError(
                f"bias_correction_share is {self.bias_correction_share:g}; it takes replayed "
                "examples: set one of replay_share, replay_per_class and replay_size."
            )
        if self.grow_head and self.weight_average in ("mean", "constant"):
            raise ValueError(
                f"weight_average is {self.weight_average!r}; new rows of a head that grows have "
                "nothing to be averaged with. Allowed with grow_head is 'none' or 'fisher'."
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
