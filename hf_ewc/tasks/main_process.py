"""What the main process does for all, and what becomes of the others if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(PartialState().is_main_process)


def by_main_process(action: Callable[[], object]) -> None:
    """Let the main process do it, and everyone go on when it is done; a collective.

    Raises:
        Exception: what `action` raised, in the main process; a `ValueError` or an `OSError` with
            the same message in the others, which would otherwise wait for ever.
    """
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as raised:
            error = raised
    told = [None if error is None else (isinstance(error, ValueError), str(error))]
    if PartialState().num_processes > 1:
        broadcast_object_list(told)
    if error is not None:
        raise error
    if told[0] is not None:
        is_value, message = told[0]
        raise ValueError(message) if is_value else OSError(message)


@contextmanager
def held_by_main_process(manager: AbstractContextManager[object]) -> Iterator[None]:
    """Inside the block the main process has entered `manager`; if it cannot, all raise."""
    with ExitStack() as stack:
        by_main_process(lambda: stack.enter_context(manager))
        yield
