"""Tasks whose Fisher is next to nothing beside the others', so that no λ protects them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median

from hf_ewc.state.records import TaskRecord

logger = logging.getLogger("hf_ewc")

VANISHED = 1e-3  # of the median trace of the other tasks


def vanished(tasks: Sequence[TaskRecord]) -> list[TaskRecord]:
    """The tasks with Σ F < 1e-3 · median of the other tasks' Σ F.

    The Fisher is Σ_n E_y[(∂ log p(y|x_n))²]: on what a model knows by heart p is near
    1 and the Fisher near 0, whatever the same model's Fisher is on examples it has not seen.
    """
    traces = [(task, task.fisher_trace) for task in tasks if task.fisher_trace is not None]
    found = []
    for i, (task, trace) in enumerate(traces):
        others = [other for j, (_, other) in enumerate(traces) if j != i]
        if others and trace < VANISHED * median(others):
            found.append(task)
    return found


def warn_of_vanished(tasks: Sequence[TaskRecord], speaks: bool = True) -> None:
    """Log `warning_of` as the last task has come in, if this process is the one that speaks."""
    said = warning_of(tasks[:-1], tasks)
    if said and speaks:
        logger.warning("%s", said)


def warning_of(before: Sequence[TaskRecord], now: Sequence[TaskRecord]) -> str | None:
    """What to say of the tasks whose Fisher is seen to have vanished now and was not before."""
    known = vanished(before)
    new = [task for task in vanished(now) if task not in known]
    if not new:
        return None
    rest = [task.fisher_trace for task in now if task not in new and task.fisher_trace is not None]
    names = ", ".join(f"{task.name!r} ({task.fisher_trace:.2g})" for task in new)
    return (
        f"The Fisher of {names} is next to nothing beside the other tasks' (Σ F about "
        f"{median(rest):.2g}): it is protected at no λ. So it is where the model knows by heart "
        "what the Fisher is estimated on. Estimate it on examples that were not trained on "
        "(fisher_data='held_out', or consolidate(dataset)), on more of them (fisher_samples), or "
        "with more draws (fisher_draws)."
    )
