"""Names of tasks and methods as text: for pictures, for Markdown, and never as mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 40
# What Markdown, and the mathematics inside it, would read as more than text.
_MARKUP = re.compile(r"([\\|*<`$\[\]])")


def printable(name: str) -> str:
    """On one line; what cannot be printed, such as half of a surrogate pair, becomes U+FFFD."""
    line = " ".join(name.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def shortened(name: str, longest: int = LONGEST) -> str:
    """At most so many characters; a longer name loses its middle, where names differ least."""
    name = printable(name)
    if len(name) <= longest:
        return name
    head = longest // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def in_markdown(name: str) -> str:
    """So that a Markdown table shows the name itself."""
    return _MARKUP.sub(r"\\\1", printable(name))


def numbered(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Names behind their numbers, which tell apart what was shortened alike."""
    return [f"{i}  {shortened(name, longest)}" for i, name in enumerate(names, 1)]


def in_legend(name: str) -> str:
    """matplotlib leaves out of a legend what begins with `_`; a hair space before it does not."""
    return f"\N{HAIR SPACE}{name}" if name.startswith("_") else name
