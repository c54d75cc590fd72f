"""What a model's outputs mean for each task of a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType

from torch import nn

from hf_ewc.tasks.class_mask import ClassMask
from hf_ewc.tasks.heads import Heads, heads_of, key_of
from hf_ewc.tasks.task import Task


class LabelSpace:
    """Shows a model to a task: with the task's own head, or only the outputs of its `classes`.

    As a context manager it attaches itself to the model.

    Args:
        model: which all tasks share.
        tasks: whose classes are checked against the model's head.
        seed: of the first weights of the tasks' own heads.
        separated: whether old and new classes will be told apart in training.
        also: further tasks that are only evaluated.

    Attributes:
        heads: the tasks' own; None where there are none.
        has_classes: whether training may see some classes of the shared head alone.

    Raises:
        ValueError: classes that the head does not have, no linear head for them, or heads that do
            not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        seed: int = 0,
        separated: bool = False,
        also: Sequence[Task] = (),
    ) -> None:
        self.has_classes = separated or any(task.classes is not None for task in tasks)
        masks = self.has_classes or any(task.classes is not None for task in also)
        self._mask = ClassMask(model) if masks else None
        for task in (*tasks, *also):
            if self._mask is not None and task.classes is not None:
                self._mask.check(task.classes)
        heads = heads_of(tasks)
        self.heads = Heads(model, heads, seed) if heads else None

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

    def put(self, task: Task) -> None:
        """Let the model have the task's head from now on."""
        if self.heads is not None:
            self.heads.put(key_of(task))

    @contextmanager
    def of(self, task: Task, masked: bool = True) -> Iterator[None]:
        """The model as this task sees it, inside the block; not `masked`, with all outputs."""
        with ExitStack() as stack:
            if self.heads is not None:
                stack.enter_context(self.heads.only(key_of(task)))
            if self._mask is not None:
                stack.enter_context(self._mask.only(task.classes if masked else None))
            yield

    @contextmanager
    def frozen_head(self) -> Iterator[None]:
        """Inside the block the head in place gets no gradient, where tasks have their own."""
        with nullcontext() if self.heads is None else self.heads.frozen():
            yield

    @contextmanager
    def one_head(self) -> Iterator[None]:
        """Inside the block the model holds the head in place alone, where tasks have their own."""
        with nullcontext() if self.heads is None else self.heads.unregistered():
            yield

    @contextmanager
    def of_rows(self, tasks: Sequence[Task], masked: bool = True) -> Iterator[None]:
        """Inside the block each row of a batch sees the outputs that its own task does."""
        classes = [task.classes if masked else None for task in tasks]
        with nullcontext() if self._mask is None else self._mask.only_by_row(classes):
            yield

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model without anything attached to it, inside the block."""
        with nullcontext() if self._mask is None else self._mask.lifted():
            yield

    def head_has_grown(self, model: nn.Module) -> None:
        """Go over to the model's new head, of another size."""
        if self._mask is not None:
            is_attached = self._mask.is_attached
            self._mask.__exit__(None, None, None)
            self._mask = ClassMask(model)
            if is_attached:
                self._mask.__enter__()

    def move_to(self, model: nn.Module) -> None:
        """Go over to another model of the same kind."""
        if self._mask is not None:
            self._mask.move_to(model)
