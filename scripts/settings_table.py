"""The README's table of settings, from the fields of the configurations and their `help`.

    python scripts/settings_table.py [--write]

Prints the table; with --write puts it into README.md, between the two comments that mark its place.
`tests/test_readme.py` holds the README to it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_ewc import EWCConfig, SequenceConfig

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- settings: python scripts/settings_table.py --write -->\n", "<!-- /settings -->\n"
CONFIGURATIONS = [EWCConfig, SequenceConfig]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Put the table into README.md.")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


def with_table(readme: str) -> str:
    """The text with the table as it should be now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"README.md has no {BEGIN.strip()} with {END.strip()} behind it.")
    return f"{before}{BEGIN}{table()}{END}{after}"


def table() -> str:
    """One section of rows for each configuration."""
    rows = ["| setting | default | what it does, and when to change it |", "|---|---|---|"]
    rows += [row for kind in CONFIGURATIONS for row in rows_of(kind)]
    return "\n".join(rows) + "\n"


def rows_of(kind: type[Any]) -> Iterator[str]:
    yield f"| **`{kind.__name__}`** | | |"
    for setting in fields(kind):
        text = setting.metadata["help"].replace("|", r"\|")
        yield f"| `{setting.name}` | `{default_of(setting)}` | {text} |"


def default_of(setting: Field[Any]) -> str:
    value = setting.default if setting.default is not MISSING else setting.default_factory()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else f"{value!r}"


if __name__ == "__main__":
    main()
