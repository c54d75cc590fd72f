"""What a model's outputs mean for each task of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType

from torch import nn

from hf_ewc.tasks.class_mask import ClassMask
from hf_ewc.tasks.task import Task


class LabelSpace:
    """Shows a model to a task: all of its outputs, or only those of the task's own `classes`.

    As a context manager it attaches itself to the model.

    Args:
        model: which all tasks share.
        tasks: whose classes are checked against the model's head.

    Raises:
        ValueError: classes that the head does not have, or no linear head for them.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[Task]) -> None:
        self._mask = ClassMask(model) if any(task.classes is not None for task in tasks) else None
        for task in tasks:
            if self._mask is not None and task.classes is not None:
                self._mask.check(task.classes)

    def __enter__(self) -> LabelSpace:
        if self._mask is not None:
            self._mask.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mask is not None:
            self._mask.__exit__(kind, error, trace)

    @contextmanager
    def of(self, task: Task | None) -> Iterator[None]:
        """The model as this task sees it, inside the block; None sees all."""
        classes = None if task is None else task.classes
        with nullcontext() if self._mask is None else self._mask.only(classes):
            yield

    @property
    def tells_tasks_apart(self) -> bool:
        """Whether what the model shows depends on the task."""
        return self._mask is not None

    @contextmanager
    def of_rows(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Inside the block each row of a batch sees the model as its own task does."""
        classes = [task.classes for task in tasks]
        with nullcontext() if self._mask is None else self._mask.only_by_row(classes):
            yield

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model without anything attached to it, inside the block."""
        with nullcontext() if self._mask is None else self._mask.lifted():
            yield

    def move_to(self, model: nn.Module) -> None:
        """Go over to another model of the same kind."""
        if self._mask is not None:
            self._mask.move_to(model)
