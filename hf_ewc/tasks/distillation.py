"""Learning without forgetting: the model stays close to its former outputs on the new inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import is_sharded
from hf_ewc.tasks.heads import key_of
from hf_ewc.tasks.label_space import LabelSpace
from hf_ewc.tasks.outputs import evaluating, logits_of
from hf_ewc.tasks.task import Task


class Distillation:
    """weight · T² Σ_k KL(p_k ‖ q_k), a mean over the batch, as a term of the loss.

    p_k and q_k are softmax(z / T) of the model before this task and of the model now, over what
    earlier task k knew: its classes, its head's outputs, or, where all tasks share all outputs, the
    known classes once (Li & Hoiem 2016, arXiv 1606.09282; the factor T² is Hinton et al.'s, 2015).
    Outputs of a regression are compared by their square distance. The teacher is run in evaluation
    mode; of the model it has a copy of what training changes alone (parameters that are trained,
    running statistics, heads), so that under an adapter the base is there once.

    Args:
        model: as it is before the task.
        space: what the model shows to each task.
        earlier: the tasks learnt before.
        known: the classes of earlier tasks where all share the head; None: all outputs.
        weight: of the term.
        temperature: T.

    Raises:
        ValueError: the model is in shards.
    """

    def __init__(
        self,
        model: nn.Module,
        space: LabelSpace,
        earlier: Sequence[Task],
        known: Sequence[int] | None,
        weight: float,
        temperature: float,
    ) -> None:
        self._space, self._weight, self._temperature = space, weight, temperature
        self._views = _different(earlier)
        self._known = None if known is None else torch.tensor(sorted(known))
        inner = unwrap(model)
        if any(is_sharded(p) for p in inner.parameters() if p.requires_grad):
            raise ValueError("distillation does not go with models in shards (FSDP2, ZeRO-3).")
        self._heads: dict[str | None, dict[str, Tensor]] = {}
        with space.one_head():
            changing = {name for name, t in _all_tensors(inner).items() if _may_change(t)}
            if space.heads is not None:
                changing -= space.heads.names_in_place()
                for task in self._views:
                    with space.of(task, masked=False):
                        self._heads[key_of(task)] = _copied(space.heads.names_in_place(), inner)
            self._teacher = _copied(changing, inner)

    def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        inner = unwrap(model)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        terms = []
        for task in self._views:
            with (
                self._space.one_head(),
                self._space.of(task, masked=False),
                self._space.frozen_head(),
            ):
                # The outputs at hand are those that the new task sees. This forward leaves running
                # statistics alone, which have taken the batch in already.
                statistics = {name: b.clone() for name, b in inner.named_buffers()}
                student = _logits(functional_call(inner, statistics, kwargs=given))
                teacher = self._taught(key_of(task), inner, given)
            terms.append(self._distance(task, inner, teacher, student, given))
        total: Tensor = torch.stack(terms).sum()
        return self._weight * total

    def _taught(self, key: str | None, inner: nn.Module, given: Mapping[str, Any]) -> Tensor:
        own = _all_tensors(inner)
        taught = {**self._teacher, **self._heads.get(key, {})}
        values = {name: t.to(own[name].device) for name, t in taught.items() if name in own}
        fits = {name: t for name, t in values.items() if t.shape == own[name].shape}
        with torch.no_grad(), evaluating(inner):
            return _logits(functional_call(inner, fits, kwargs=dict(given)))

    def _distance(
        self, task: Task, inner: Any, teacher: Tensor, student: Tensor, given: Mapping[str, Any]
    ) -> Tensor:
        teacher, student = teacher.float(), student.float()
        if _is_regression(inner, student):
            return F.mse_loss(student, teacher)
        shown = self._shown(task, student)
        teacher, student = teacher[..., shown], student[..., shown]
        temperature = self._temperature
        log_p, log_q = (torch.log_softmax(z / temperature, -1) for z in (teacher, student))
        each: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
        mean = each.mean()
        counted = given.get("attention_mask")
        if counted is not None and counted.shape == each.shape:  # one for each token
            mean = (each * counted).sum() / counted.sum().clamp(min=1)
        return mean * temperature**2

    def _shown(self, task: Task, logits: Tensor) -> Tensor:
        if task.classes is not None:
            return torch.tensor(list(task.classes), device=logits.device)
        if self._known is not None and task.head is None:
            return self._known.to(logits.device)
        return torch.arange(logits.shape[-1], device=logits.device)


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _may_change(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)


def _copied(names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    own = _all_tensors(model)
    return {name: own[name].detach().clone() for name in names}


def _different(earlier: Sequence[Task]) -> list[Task]:
    """One task for each set of outputs that was learnt."""
    found: dict[Any, Task] = {}
    for task in earlier:
        classes = None if task.classes is None else tuple(sorted(task.classes))
        found.setdefault((key_of(task), classes), task)
    return list(found.values())


def _logits(outputs: Any) -> Tensor:
    found = logits_of(outputs)
    if found is None:
        raise ValueError("distillation needs the model's outputs to have logits.")
    return found


def _is_regression(model: Any, logits: Tensor) -> bool:
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return problem == "regression" or logits.shape[-1] == 1
