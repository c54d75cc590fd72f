"""How far a task has taken the model from what it was, on the task's own data."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from hf_ewc.fisher.labels import IGNORED
from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.parameters.names import unwrap
from hf_ewc.precision import widened
from hf_ewc.report.names import in_markdown
from hf_ewc.report.tables import table
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.main_process import is_main
from hf_ewc.tasks.outputs import evaluating, logits_of
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.task import Task
from hf_ewc.tasks.token_scores import is_causal
from hf_ewc.training.data_path import prepared
from hf_ewc.training.held_out import has_rows, rows_of

logger = logging.getLogger("hf_ewc")

MOST_NUMBERS = 1 << 26  # log-probabilities that are kept: 256 MiB
NOT_KNOWN = (
    "kl_examples: the divergence on %r is not known: its outputs are not finite, or no scores of "
    "classes at the positions of its labels."
)


class Divergence:
    """KL(p_before ‖ p_after) on examples of a task, from the model before it to the one after it.

    KL = (1/M) Σ_m Σ_c p_before(c | x_m) (log p_before(c | x_m) − log p_after(c | x_m)), in nats, a
    mean over the M labelled positions of the examples: forgetting follows it (Shenfeld et al. 2025,
    arXiv 2509.04259, who take this direction and new-task data). Classes are those that the task
    sees; of several yes or no labels each is a position.

    Of the model before only log p is kept, in fp32 on the CPU: of each example so many positions,
    evenly spread, that all processes together keep at most 2^26 numbers (256 MiB), but at least one
    position an example.

    Args:
        plan: of the run; 0 of its `kl_examples` measures nothing.
        space: what the model shows to each task.
    """

    def __init__(self, plan: Plan, space: LabelSpace) -> None:
        self._plan, self._space = plan, space
        self._before: list[Tensor] = []

    def remember(self, trainer: Any, index: int) -> None:
        """Keep what the model says before it trains on task `index`."""
        self._before = []
        if self._plan.sequence.kl_examples:
            self._before = [log_p for log_p, _ in self._seen(trainer, index)]

    def measured(self, trainer: Any, index: int) -> dict[str, Any] | None:
        """What task `index` came to, in JSON's types; None where it is not asked for.

        `kl` is None where the outputs are of no classes. Every process has to call it.
        """
        if not self._plan.sequence.kl_examples:
            return None
        sums = torch.zeros(2, dtype=torch.float64)
        pairs = itertools.zip_longest(self._before, self._seen(trainer, index))
        for before, (after, rows) in pairs:
            each = divergences(before, after)
            own = torch.zeros(len(rows), 2, dtype=torch.float64)
            own[:, 0].index_add_(0, rows.nonzero()[:, 0], each)
            own[:, 1] = rows.sum(1)
            sums += _of_all(trainer, own).sum(0)
        self._before = []
        total, labels = sums.tolist()
        name = self._plan.tasks[index].name
        kl = total / labels if labels and math.isfinite(total) else None
        if kl is None and is_main():
            logger.warning(NOT_KNOWN, name)
        return {"task": name, "kl": kl, "labels": int(labels)}

    @torch.no_grad()
    def _seen(self, trainer: Any, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch: log p (P, C) of the positions that count; which these are, (B, T)."""
        task, model = self._plan.tasks[index], unwrap(trainer.model)
        few = _examples(task, self._plan.sequence.kl_examples, self._plan.args.seed)
        examples = prepared(trainer, few)
        with preserved_random_states(), self._space.of(task), evaluating(model):
            set_seed(self._plan.args.seed)  # for data that are changed at random as they are read
            for inputs in trainer.get_test_dataloader(examples):
                given = trainer._prepare_inputs(inputs)
                with trainer.accelerator.autocast():
                    outputs = model(**given)
                scores, there = _scores(model, logits_of(outputs), given.get("labels"))
                most = MOST_NUMBERS // (len(examples) * scores.shape[-1])
                rows = spread(there, max(most, 1))
                log_p = scores[rows].float().log_softmax(-1)
                yield log_p.cpu(), rows.cpu()


def _of_all(trainer: Any, own: Tensor) -> Tensor:
    """The rows of all processes in fp64, those left out that only fill up the last batches."""
    device = trainer.args.device
    found: Tensor = trainer.accelerator.gather_for_metrics(own.float().to(device))
    return widened(found.cpu())


def _examples(task: Task, count: int, seed: int) -> Any:
    """So many of the task's evaluation examples, the same for each seed; of a stream the first."""
    data = task.eval_dataset
    if not has_rows(data):
        return list(itertools.islice(data, count))
    order = np.random.default_rng([seed, len(data)]).permutation(len(data))
    return rows_of(data, sorted(order[:count].tolist()))


def _scores(model: nn.Module, logits: Tensor | None, labels: Any) -> tuple[Tensor, Tensor]:
    """Scores of classes (B, T, C), and which of their positions (B, T) have a label.

    None has one where the outputs are something else.
    """
    if logits is None or not isinstance(labels, Tensor):
        return torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.bool)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification" and labels.shape == logits.shape:
        return torch.stack([torch.zeros_like(logits), logits], -1), labels == labels
    if labels.is_floating_point() or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
        return logits.new_zeros(len(labels), 1, 1), labels.new_zeros(len(labels), 1).bool()
    if labels.dim() == 2 and is_causal(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(len(labels), -1, logits.shape[-1])
    return flat, (labels != IGNORED).reshape(len(labels), -1)


def spread(there: Tensor, most: int) -> Tensor:
    """(B, T) bool: of the positions of each row that are there, `most` at most, evenly spread."""
    number = there.sum(1, keepdim=True)
    kept, rank = number.clamp(max=most), there.cumsum(1)
    number = number.clamp(min=1)
    return there & (rank * kept // number > (rank - 1) * kept // number)


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(p ‖ q) at each position, (P,) in fp64, of log p and log q (P, C); never below 0."""
    before, after = widened(before), widened(after)
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0.0).sum(-1).clamp_min(0.0)


def divergence_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what was measured."""
    rows = [[in_markdown(each["task"]), _figure(each["kl"]), str(each["labels"])] for each in found]
    return table(["task", "KL(before ‖ after) on its data, nats", "labels"], rows)


def in_words(kl: float) -> str:
    """For the line at a task's end."""
    return f"KL(before ‖ after) on its own data is {kl:.3g} nats a label"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
