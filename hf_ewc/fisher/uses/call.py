"""One call of a torch function, as a handler is given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Uncovered(Exception):
    """Raised by a handler that cannot account for this use; the operation then runs as it is."""


@dataclass(frozen=True)
class Call:
    """`func(*args, **kwargs)`; `name` is what `func` is called, without the name of its class."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def run(self) -> Any:
        """What the function itself returns."""
        return self.func(*self.args, **self.kwargs)
