"""The rule by which λ is found: what is tried next, and which trial is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

START = 1e4  # λ that is tried first
FACTOR = 10.0  # between one λ and the next
LOWEST, HIGHEST = 1.0, START  # a higher start was slower and no better over five tasks of digits
SHARE = 0.4  # of a task's optimizer steps, for which a trial trains


@dataclass(frozen=True)
class Trial:
    """A short training with one λ, scored on examples of the new task that it did not train on.

    Args:
        ewc_lambda: λ; 0 trains plainly.
        score: more is better; None where it was no finite number, or the trial was stopped.
        halfway: the score after half of the steps; None where that was not measured.
        stopped: whether it was given up there.
        kept: share of what plain training reached; None for the plain trial itself.
        steps: optimizer steps.
        seconds: of training and scoring.
    """

    ewc_lambda: float
    score: float | None
    halfway: float | None = None
    stopped: bool = False
    kept: float | None = None
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class LambdaCurve:
    """Score of the new task against λ, as far as it was tried, and the λ that it tells.

    The largest λ of the grid first, first/10, first/100 … whose score is at least (1 − give_up)
    times that of plain training for as many steps ("stability decay", De Lange et al. 2021, arXiv
    1909.08383). Where lower is better, or a score is not above 0, it is the improvement on the
    score before training that counts: (trial − before) / (plain − before) ≥ 1 − give_up.

    Args:
        task: its name.
        first: the λ that is tried first.
        give_up: the share of what plain training reaches that may be given up.
        before: the score before any training on the task.
        by_improvement: whether lower is better, for which `score` has the other sign.
        trials: in the order in which they were made, plain training first.
        lowest: λ that is used where none passes.
        examples: N, how many are held out, where the score is a share p of them that are right:
            √(p(1 − p)/N), one standard error, less than what is needed passes too. 0: none.
    """

    task: str
    first: float = START
    give_up: float = 0.1
    before: float | None = None
    by_improvement: bool = False
    trials: tuple[Trial, ...] = field(default=())
    lowest: float = LOWEST
    examples: int = 0

    @property
    def plain(self) -> Trial | None:
        """The trial without EWC."""
        return self.trials[0] if self.trials else None

    @property
    def chosen(self) -> float | None:
        """λ to train with: the first that passed, the lowest where none did; None before that."""
        if len(self.trials) < 2:
            return None
        last = self.trials[-1]
        return last.ewc_lambda if self.passed or last.ewc_lambda <= self.lowest else None

    @property
    def passed(self) -> bool:
        """Whether the last trial gave up no more than is allowed."""
        if len(self.trials) < 2 or self.trials[-1].kept is None:
            return False
        # 0.9 of a score is enough, whatever its last digit.
        return self.trials[-1].kept + self._noise() >= 1.0 - self.give_up - 1e-9

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials)

    def upcoming(self) -> float | None:
        """λ of the next trial, 0 for plain training; None where λ is found."""
        if not self.trials:
            return 0.0
        if self.chosen is not None:
            return None
        return self.first if len(self.trials) == 1 else self.trials[-1].ewc_lambda / FACTOR

    def with_trial(self, trial: Trial) -> LambdaCurve:
        """The curve with one more trial, of which it says what was kept."""
        if self.plain is not None:
            trial = replace(trial, kept=self.kept(trial.score, self.plain.score))
        return replace(self, trials=(*self.trials, trial))

    def kept(self, score: float | None, plain: float | None) -> float:
        """Share of what plain training reached; 1 where that reached nothing, 0 for no score."""
        if score is None:
            return 0.0
        if plain is None:
            return 1.0
        if not self.by_improvement and plain > 0:
            return score / plain
        before = 0.0 if self.before is None else self.before
        gained = plain - before
        if gained <= 0:
            return 1.0 if score >= plain else 0.0
        return (score - before) / gained

    def is_hopeless(self, halfway: float | None) -> bool:
        """Whether half a trial tells that it will not pass: five times too much is given up."""
        if self.plain is None or self.plain.halfway is None:
            return False
        return self.kept(halfway, self.plain.halfway) < 1.0 - 5 * self.give_up

    def _noise(self) -> float:
        """The standard error of the last score, in shares of what plain training reached."""
        score, plain = self.trials[-1].score, self.trials[0].score
        if not self.examples or not score or not plain or score >= 1.0:
            return 0.0
        return math.sqrt(score * (1.0 - score) / self.examples) / plain

    def next_first(self) -> float:
        """Where the next task's search begins: ten times higher if this one's first trial passed.

        Importances pile up from task to task, so λ is looked for around the last one.
        """
        if self.chosen is None:
            return START
        higher = self.passed and len(self.trials) == 2
        return min(HIGHEST, self.chosen * FACTOR) if higher else self.chosen

    def in_words(self) -> str:
        """One line for the log."""
        tried = ", ".join(
            f"{t.ewc_lambda:g}: {100 * (t.kept or 0.0):.0f} %" + (" (stopped)" if t.stopped else "")
            for t in self.trials[1:]
        )
        limit = f"at least {100 * (1 - self.give_up):g} %"
        if self.examples:
            limit += f", but for the noise of {self.examples} examples,"
        why = "" if self.passed else " No λ kept that much; this is the lowest that is tried."
        return (
            f"λ = {self.chosen:g} for task {self.task!r}: of what plain training reaches on it, "
            f"{limit} is to be kept ({tried}; {self.seconds:.1f} s).{why}"
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, with the λ that was chosen."""
        found = asdict(self)
        found["trials"] = [asdict(trial) for trial in self.trials]
        return found | {"chosen": self.chosen}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LambdaCurve:
        """The inverse of `to_dict`; a `TypeError` or `KeyError` where an entry is none of its."""
        given = {key: value for key, value in data.items() if key != "chosen"}
        return cls(**{**given, "trials": tuple(Trial(**trial) for trial in given["trials"])})
