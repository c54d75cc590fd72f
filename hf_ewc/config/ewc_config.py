"""The settings of EWC, as a dataclass that `HfArgumentParser` understands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Protocol

from hf_ewc.config.checked import (
    boolean,
    by_pattern,
    choice,
    hint,
    integer,
    modules,
    number,
    refuse,
    share,
)
from hf_ewc.parameters.selection import layer_lambdas

MODES = ("online", "separate")
ANCHORS = ("copy", "reference")
SPACES = ("adapter", "weight")
STATE_DTYPES = ("float32", "bfloat16", "float16", "float8")
LARGEST = 3.4e38
AUTO, STATE = "auto", "state"
FISHER_DATA = ("train", "held_out")
FISHER_CHOICES = ("auto", "exact", "sampled", "empirical", "batched")


class TellsLambda(Protocol):
    """What λ is taken from where nobody gives one: an `EWCState`."""

    def told_lambda(self) -> float: ...

    def told_layer_lambdas(self) -> dict[str, float]: ...


@dataclass
class EWCConfig:
    """How strongly, where and with which Fisher information a model is held to its anchor.

    L(θ) = L_task(θ) + (λ/2) Σ_i F_i (θ_i − θ*_i)²   (Kirkpatrick et al. 2017, arXiv 1612.00796)

    Each field's meaning is its `help`. `ewc_target_modules` and `ewc_exclude_modules` follow PEFT:
    a list holds suffixes of module names, a string is one regular expression over whole module
    names, and "all-linear" is every linear layer but the output or head. On the command line and
    in lists, a single entry with a character that no module name has (one of `*+?()[]{}|\\^$`) is
    taken as that regular expression: `--ewc_target_modules '.*layer\\.[01]\\..*'`.
    `ewc_layer_lambdas` is a dict, or on the command line the same as a JSON string:
    `--ewc_layer_lambdas '{"encoder.layer.0": 10, ".*bias": 0}'`, or "state".

    Raises:
        ValueError: at construction, for a value that is not allowed; it names the field, the value
            and what is allowed.
    """

    ewc_lambda: float | str | None = field(
        default=STATE,
        metadata=hint(
            "Strength λ of the penalty (λ/2) Σ F (θ − θ*)². At least 0; 0 switches it off. Larger "
            "where earlier tasks are forgotten, smaller where new ones are not learned; try powers "
            "of ten. 'state' takes what the state's importance tells: 0.4 / (g ρ²), at most 1e4, "
            "g its typical root and ρ the share of the parameters it is spread over. 'auto' begins "
            "there and tries it before each task, by short trials on the task's training data "
            "alone (in run_tasks; see find_lambda for a trainer)."
        ),
    )
    ewc_give_up: float = field(
        default=0.03,
        metadata=hint(
            "With ewc_lambda 'auto': give up at most this share of what plain training would reach "
            "on the new task, to keep the old ones. Above 0, below 1. Larger where remembering "
            "counts more than learning."
        ),
    )
    ewc_mode: str = field(
        default="online",
        metadata=hint(
            "How tasks add up: 'online' anchors at the newest parameters (Schwarz et al. 2018), "
            "'separate' keeps the exact sum of one penalty a task (Kirkpatrick et al. 2017), in as "
            "much memory: for early tasks that should keep pulling to where they were learned.",
            choices=MODES,
        ),
    )
    ewc_gamma: float = field(
        default=1.0,
        metadata=hint(
            "Decay γ of the earlier importance at each consolidation, F ← γ F + F_new. 0 to 1. "
            "Below 1 where a long row of tasks leaves no room to learn: old ones fade."
        ),
    )
    ewc_lambda_growth: float = field(
        default=1.0,
        metadata=hint(
            "λ after k consolidated tasks is ewc_lambda · growth^(k − 1). Above 0. Other than 1 "
            "where the right λ is seen to change from task to task."
        ),
    )
    ewc_layer_lambdas: dict[str, float] | str | None = field(
        default=None,
        metadata=hint(
            "λ by pattern in place of ewc_lambda, as JSON: a pattern is a suffix of the name of a "
            "module or parameter, or a regular expression for one; the longest match wins. For "
            "layers that should move more than the others, or less. 'state' takes for each layer "
            "what its own importance tells, beside ewc_lambda 'state'."
        ),
    )
    ewc_target_modules: list[str] | str | None = field(
        default=None,
        metadata=hint(
            "Protect only the parameters in these modules: suffixes of module names, one regular "
            "expression, or 'all-linear'. By default all that are trainable. For a smaller state, "
            "or where only some layers hold what should last.",
            nargs="+",
        ),
    )
    ewc_exclude_modules: list[str] | str | None = field(
        default=None,
        metadata=hint(
            "Leave the parameters in these modules free; given as ewc_target_modules. For a head "
            "that each task trains anew.",
            nargs="+",
        ),
    )
    ewc_space: str = field(
        default="adapter",
        metadata=hint(
            "What of a PEFT model is held: 'adapter', the adapter's own A and B, which is small "
            "and means something only while the same adapter goes on; or 'weight', the weights "
            "W = W0 + s B A, by the names of the model without an adapter, for any rank, further "
            "adapters and full fine-tuning alike, at the memory of the weights under adapters.",
            choices=SPACES,
        ),
    )
    ewc_state_dtype: str = field(
        default="float32",
        metadata=hint(
            "How the importance is held and saved. In half precision, with one scale a tensor, for "
            "a state of 0.75 times the size; in float8, with one for 128 values, of 0.63 times.",
            choices=STATE_DTYPES,
        ),
    )
    ewc_keep_fraction: float = field(
        default=1.0,
        metadata=hint(
            "Share of all importances, the largest, that is kept, as sparse tensors. Above 0 to 1. "
            "Below 1 where the state is too large for disk or memory."
        ),
    )
    ewc_anchor: str = field(
        default="copy",
        metadata=hint(
            "What a saved state has of θ*: a 'copy', or, where the model saved in the same folder "
            "is it bit for bit, a 'reference' to that, which spares the disk as much as the model "
            "takes. Such a state can be read only with the model's files beside it, unchanged.",
            choices=ANCHORS,
        ),
    )
    ewc_offload: bool = field(
        default=False,
        metadata=hint(
            "Hold the state in CPU memory and bring it to the device a part at a time. For when "
            "GPU memory runs out; steps take longer."
        ),
    )
    ewc_log_groups: bool = field(
        default=False,
        metadata=hint("Log the penalty of each group of layers as well, to see where it pulls."),
    )
    fisher_type: str = field(
        default="auto",
        metadata=hint(
            "Expectation over the labels: 'exact' over the model's own classes, 'sampled' from the "
            "model, 'empirical' the true label, 'batched' squares of batch gradients; "
            "'auto' is exact where classes are few, else sampled. 'empirical' for a quicker, "
            "coarser estimate; 'batched' to compare with other libraries.",
            choices=FISHER_CHOICES,
        ),
    )
    fisher_data: str = field(
        default="train",
        metadata=hint(
            "What the Fisher is estimated on where consolidate() gets no data: the 'train'ing "
            "data, or a fifth of it that is 'held_out' of training, the same rows for each seed. "
            "For tasks that are learnt by heart, whose Fisher on training examples vanishes.",
            choices=FISHER_DATA,
        ),
    )
    fisher_samples: int | None = field(
        default=200,
        metadata=hint(
            "Examples that the Fisher is estimated on; -1 (in Python also None) takes all. More "
            "where results differ from one fisher_seed to another."
        ),
    )
    fisher_draws: int = field(
        default=1,
        metadata=hint(
            "Labels drawn for an example when fisher_type is 'sampled'. More for less noise where "
            "examples are few; each takes a backward pass."
        ),
    )
    fisher_batch_size: int | None = field(
        default=None,
        metadata=hint(
            "Examples in a batch of the estimate; by default those that the trainer has on a "
            "device. Changes its speed and memory only."
        ),
    )
    fisher_stratified: bool = field(
        default=False,
        metadata=hint(
            "Draw the examples evenly over the labels instead of at random. For rare classes."
        ),
    )
    fisher_seed: int = field(
        default=0,
        metadata=hint(
            "Seed of the choice of examples and of sampled labels. Another one for repetitions."
        ),
    )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse a name that is none of a setting: a `ValueError`."""
        if not hasattr(type(self), name) and name not in type(self).__dataclass_fields__:
            like = get_close_matches(name, type(self).__dataclass_fields__, 1)
            meant = f"; is {like[0]} meant?" if like else "."
            raise ValueError(f"EWCConfig has no setting {name!r}{meant}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        if self.ewc_lambda not in (AUTO, STATE):
            also = "'state' or 'auto'"
            self.ewc_lambda = number("ewc_lambda", self.ewc_lambda, low=0.0, also=also)
        self.ewc_give_up = number("ewc_give_up", self.ewc_give_up, low=0.0, open_low=True)
        if self.ewc_give_up >= 1.0:
            refuse("ewc_give_up", self.ewc_give_up, "a number above 0 and below 1")
        self.ewc_gamma = number("ewc_gamma", self.ewc_gamma, low=0.0, high=1.0)
        self.ewc_lambda_growth = number(
            "ewc_lambda_growth", self.ewc_lambda_growth, low=0.0, open_low=True
        )
        self.ewc_keep_fraction = share("ewc_keep_fraction", self.ewc_keep_fraction)
        if self.finds_lambda and self.ewc_lambda_growth != 1.0:
            raise ValueError(
                f"ewc_lambda is 'auto', which finds λ for each task, and ewc_lambda_growth is "
                f"{self.ewc_lambda_growth:g}; leave that at 1."
            )
        choice("ewc_mode", self.ewc_mode, MODES)
        choice("ewc_space", self.ewc_space, SPACES)
        choice("ewc_anchor", self.ewc_anchor, ANCHORS)
        choice("ewc_state_dtype", self.ewc_state_dtype, STATE_DTYPES)
        choice("fisher_type", self.fisher_type, FISHER_CHOICES)
        choice("fisher_data", self.fisher_data, FISHER_DATA)
        if self.ewc_layer_lambdas != STATE:
            self.ewc_layer_lambdas = by_pattern("ewc_layer_lambdas", self.ewc_layer_lambdas)
        elif self.ewc_lambda != STATE:
            raise ValueError(
                f"ewc_layer_lambdas is 'state', which tells the λ of every layer, and ewc_lambda "
                f"is {self.ewc_lambda!r}; leave that at 'state'."
            )
        self.ewc_target_modules = modules("ewc_target_modules", self.ewc_target_modules)
        self.ewc_exclude_modules = modules("ewc_exclude_modules", self.ewc_exclude_modules)
        for name in ("ewc_offload", "ewc_log_groups", "fisher_stratified"):
            boolean(name, getattr(self, name))
        if self.fisher_samples == -1:
            self.fisher_samples = None
        if self.fisher_samples is not None:
            self.fisher_samples = integer(
                "fisher_samples", self.fisher_samples, low=1, also="None or -1 for all"
            )
        self.fisher_draws = integer("fisher_draws", self.fisher_draws, low=1)
        if self.fisher_batch_size is not None:
            self.fisher_batch_size = integer(
                "fisher_batch_size", self.fisher_batch_size, low=1, also="None"
            )
        self.fisher_seed = integer("fisher_seed", self.fisher_seed, low=0)

    @property
    def finds_lambda(self) -> bool:
        """Whether λ is looked for before each task."""
        return self.ewc_lambda == AUTO

    @property
    def strength(self) -> float:
        """λ, where it is a number.

        Raises:
            ValueError: it is "auto", or "state", which takes one (`settled`).
        """
        if isinstance(self.ewc_lambda, (int, float)):
            return self.ewc_lambda
        if self.ewc_lambda == STATE:
            raise ValueError(
                "ewc_lambda is 'state', and there is none that tells it here; give a number."
            )
        raise ValueError(
            "ewc_lambda is 'auto', which run_tasks and compare_methods find before each task; for "
            "a trainer by itself give a number, which hf_ewc.find_lambda(trainer) finds."
        )

    def settled(self, told: TellsLambda) -> EWCConfig:
        """The settings with numbers for λ where the state tells it.

        Args:
            told: the state that is in force.
        """
        if self.ewc_lambda != STATE:
            return self
        layers = self.ewc_layer_lambdas
        if layers == STATE:
            layers = told.told_layer_lambdas()
        return replace(self, ewc_lambda=told.told_lambda(), ewc_layer_lambdas=layers)

    def strength_after(self, num_tasks: int) -> float | None:
        """λ after k consolidated tasks, ewc_lambda · growth^(k − 1); None before the first."""
        growth: float = self.ewc_lambda_growth ** (num_tasks - 1)
        return self.strength * growth if num_tasks else None

    def lambdas(self, names: Iterable[str], num_tasks: int = 1) -> dict[str, float]:
        """λ of each parameter after `num_tasks` consolidated tasks.

        λ_i = λ(pattern of i, else ewc_lambda) · ewc_lambda_growth^(num_tasks − 1)

        Raises:
            ValueError: a pattern of `ewc_layer_lambdas` matches none of the names, or a λ is more
                than fp32 holds.
        """
        patterns = self.ewc_layer_lambdas if isinstance(self.ewc_layer_lambdas, dict) else None
        values = layer_lambdas(names, patterns, self.strength)
        try:
            growth = self.ewc_lambda_growth ** (max(num_tasks, 1) - 1)
            largest = max(values.values(), default=0.0) * growth
        except OverflowError:
            largest = math.inf
        if largest > LARGEST:
            raise ValueError(
                f"λ is {largest:g} after {num_tasks} tasks, with ewc_lambda {self.strength:g} "
                f"and ewc_lambda_growth {self.ewc_lambda_growth:g}; fp32 holds up to {LARGEST:.2g}."
            )
        return {name: value * growth for name, value in values.items()}

    def shown_lambda(self) -> str:
        """λ for people: a number, or how it is found."""
        if self.finds_lambda:
            return f"auto (gives up at most {100 * self.ewc_give_up:g} % of each new task)"
        if self.ewc_lambda == STATE:
            return "as the state tells"
        return f"{self.strength:g}"

    def summary(self) -> str:
        """The settings that matter most, in a line for people."""
        samples = "all" if self.fisher_samples is None else f"{self.fisher_samples}"
        growth = f" × {self.ewc_lambda_growth:g} a task" if self.ewc_lambda_growth != 1 else ""
        return (
            f"EWC: λ = {self.shown_lambda()}{growth}, {self.ewc_mode}, γ = {self.ewc_gamma:g}; "
            f"Fisher: {self.fisher_type}, {samples} examples."
        )
