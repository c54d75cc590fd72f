"""The rule by which λ is found: what is tried next, and which trial is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

START = 1e4  # λ that is tried first, where no state tells one
FACTOR = 10.0  # between one λ and the next
LOWEST = 1.0
GIVE_UP = 0.03  # of what plain training reaches on the new task
SHARE = 0.4  # of a task's optimizer steps, for which a trial trains
SURE = 1.645  # standard errors, by which a score has to lie below the limit to be refused
TOLD = 200.0  # held-out labels whose trials count as much as what the state tells
NOTHING = 1e-3  # of the score before training: a gain up to that is none


@dataclass(frozen=True)
class Trial:
    """A short training with one λ, scored on examples of the new task that it did not train on.

    Args:
        ewc_lambda: λ; 0 trains plainly.
        score: more is better; None where it was no finite number, or the trial was stopped.
        halfway: the score after half of the steps, on at most 1000 of these examples; None where
            that was not measured.
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

    The largest λ of first, first/10, first/100 … down to `lowest` whose score is at least
    (1 − give_up) times that of plain training for as many steps ("stability decay", De Lange et al.
    2021, arXiv 1909.08383). Where lower is better, or a score is not above 0, it is the improvement
    on the score before training that counts: (trial − before) / (plain − before) ≥ 1 − give_up.

    Args:
        task: its name.
        first: the λ that is tried first.
        give_up: the share of what plain training reaches that may be given up.
        before: the score before any training on the task.
        by_improvement: whether lower is better, for which `score` has the other sign.
        trials: in the order in which they were made, plain training first.
        lowest: λ that is used where none passes.
        labels: N, how many the held-out examples have, where the score is a share p of them. A
            score passes unless it is below what is needed by more than 1.645 standard errors of its
            difference from the plain score q, √(p(1 − p)/N + q(1 − q)/N): by chance that is so once
            in twenty times. 0: every difference counts.
        left: optimizer steps that earlier tasks have left over for trials; None: there is no limit.
            With it, the trials of all tasks together take no more steps than these tasks' own
            trainings: one that would go beyond is not made, and the λ that has kept most is used.
        chance: the share of the held-out examples that have the most frequent label, which takes no
            learning to get right; None where that is not known.
        told: λ that the state tells, to which N labels hold the one that is chosen: log λ is told's
            by TOLD / (N + TOLD) and the trials' by the rest. None: the trials alone count.
    """

    task: str
    first: float = START
    give_up: float = GIVE_UP
    before: float | None = None
    by_improvement: bool = False
    trials: tuple[Trial, ...] = field(default=())
    lowest: float = LOWEST
    labels: int = 0
    left: int | None = None
    chance: float | None = None
    told: float | None = None

    @property
    def plain(self) -> Trial | None:
        """The trial without EWC."""
        return self.trials[0] if self.trials else None

    @property
    def chosen(self) -> float | None:
        """λ to train with; None while it is looked for.

        What few labels say of a short training is mostly chance: the fewer there are, the less it
        is away from what the state tells.
        """
        found = self._found
        if found is None or self.told is None or not self.labels or found == self.told:
            return found
        share = self.labels / (self.labels + TOLD)
        return float(f"{self.told * (found / self.told) ** share:.2g}")

    @property
    def _found(self) -> float | None:
        """What the trials say.

        Between a λ that failed and the next that passed it is where the straight line through both,
        of what is kept over log λ, comes to what has to be kept.
        """
        if not self._is_over:
            return None
        if not self.passed:
            return max(self.trials[1:], key=lambda t: (t.kept or 0.0, -t.ewc_lambda)).ewc_lambda
        last, failed = self.trials[-1], self.trials[-2]
        if len(self.trials) < 3 or failed.score is None:
            return last.ewc_lambda
        return _between(last, failed, 1.0 - self.give_up)

    @property
    def passed(self) -> bool:
        """Whether the last trial gave up no more than is allowed."""
        if len(self.trials) < 2 or self.trials[-1].kept is None:
            return False
        # 0.97 of a score is enough, whatever its last digit.
        return self.trials[-1].kept + self._noise() >= 1.0 - self.give_up - 1e-9

    @property
    def _is_over(self) -> bool:
        if len(self.trials) < 2:
            return False
        return self.passed or self.trials[-1].ewc_lambda <= self.lowest or not self._may_go_on

    @property
    def _may_go_on(self) -> bool:
        """Whether one more trial, as long as the plain one, is within the limit."""
        plain = self.trials[0].steps
        spent = sum(trial.steps for trial in self.trials)
        return self.left is None or spent + plain <= self.left + plain / SHARE

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials)

    def upcoming(self) -> float | None:
        """λ of the next trial, 0 for plain training; None where λ is found."""
        if not self.trials:
            return 0.0
        if self._is_over:
            return None
        return following(self.trials[-1].ewc_lambda, self.first, self.lowest)

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
        """Whether half a trial tells that it will not pass: it has half of what is to be kept."""
        if self.plain is None or self.plain.halfway is None:
            return False
        return self.kept(halfway, self.plain.halfway) < 0.5 * (1.0 - self.give_up)

    def _noise(self) -> float:
        """What chance may take from the last score, in shares of what plain training reached."""
        score, plain = self.trials[-1].score, self.trials[0].score
        if not self.labels or not score or not plain:
            return 0.0
        variance = score * (1.0 - score) + plain * (1.0 - plain)
        return SURE * math.sqrt(max(variance, 0.0) / self.labels) / plain

    @property
    def taught_nothing(self) -> bool:
        """Whether plain training is no better than none, or than always the most frequent label.

        Of N labels it has to be by more than 1.645 √(b(1 − b)/N), b the larger of both, of other
        scores by more than a thousandth. Then what λ keeps of it is no choice.
        """
        if self.plain is None or self.plain.score is None:
            return self.plain is not None
        known = [score for score in (self.before, self.chance) if score is not None]
        if not known:
            return False
        base = max(known)
        margin = NOTHING * abs(base)
        if self.labels:
            margin = SURE * math.sqrt(max(base * (1.0 - base), 0.0) / self.labels)
        return self.plain.score <= base + margin

    def warning(self, learning_rate: float) -> str | None:
        """What to say where plain training has taught nothing: the cause, and what to do."""
        plain = self.plain
        if plain is None or not self.taught_nothing:
            return None
        begins = f"Plain training for {plain.steps} steps has taught nothing of task {self.task!r}"
        ends = "So the λ that was chosen means nothing."
        if plain.score is None:
            return (
                f"{begins}: its score on held-out examples is no finite number. {ends} The "
                f"learning rate ({learning_rate:g}) is too large; lower it."
            )
        sign = -1.0 if self.by_improvement else 1.0
        beside = [] if self.before is None else [f"{sign * self.before:.4g} before"]
        if self.chance is not None:
            beside.append(f"{self.chance:.4g} by the most frequent label alone")
        held_out = f"{self.labels} held-out labels" if self.labels else "held-out examples"
        return (
            f"{begins}: it scores {sign * plain.score:.4g} on {held_out}, "
            f"{' and '.join(beside)}. {ends} The learning rate ({learning_rate:g}) is too small or "
            f"the steps are too few: raise learning_rate, or num_train_epochs or max_steps, of "
            f"which a trial takes {100 * SHARE:g} %. Where the model knows the task already, give "
            "ewc_lambda a number."
        )

    def in_words(self) -> str:
        """One line for the log."""
        tried = ", ".join(
            f"{t.ewc_lambda:g}: {100 * (t.kept or 0.0):.0f} %" + (" (stopped)" if t.stopped else "")
            for t in self.trials[1:]
        )
        limit = f"at least {100 * (1 - self.give_up):g} %"
        if self.labels:
            limit += f", but for the noise of {self.labels} labels,"
        why = "" if self.passed else " No λ that was tried kept that much; this one kept most."
        why += " Plain training had taught nothing." if self.taught_nothing else ""
        if self.chosen != self._found:
            why += (
                f" The trials alone would say {self._found:g}; so few labels leave it near the "
                f"{self.told:g} that the state tells."
            )
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
        given["labels"] = given.pop("examples", given.get("labels", 0))  # as it was named
        return cls(**{**given, "trials": tuple(Trial(**trial) for trial in given["trials"])})


def following(strength: float, first: float, lowest: float) -> float:
    """The λ that is tried after this one: `first` after none, in the end `lowest`."""
    return max(strength / FACTOR, lowest) if strength else first


def _between(passed: Trial, failed: Trial, needed: float) -> float:
    """Where log λ → kept, straight from one trial to the other, comes to `needed`."""
    low, high = passed.kept or 0.0, failed.kept or 0.0
    if not high < needed < low:
        return passed.ewc_lambda
    share = (low - needed) / (low - high)
    return float(f"{passed.ewc_lambda * (failed.ewc_lambda / passed.ewc_lambda) ** share:.2g}")
