"""`hf-ewc COMMAND ...`: what there is, and errors of one line."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import hf_ewc

_EXAMPLES = """
examples:
  hf-ewc fisher runs/model news.csv -o runs/model/ewc
  hf-ewc inspect runs/model/ewc
  hf-ewc report runs/plain runs/ewc -o runs/report
"""
_FAILED = 2


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(_FAILED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line; each command's file adds its own arguments."""
    found = Parser(
        prog="hf-ewc",
        description=hf_ewc.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"hf-ewc {hf_ewc.__version__}")
    found.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = found.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in ("fisher", "inspect", "report"):
        module: Any = importlib.import_module(f"hf_ewc.cli.{name}_command")
        summary = str(module.__doc__).splitlines()[0].split(": ", 1)[1]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 with one line on stderr where that fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of any encoding, which may have no λ
            stream.reconfigure(errors="replace")
    given = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            _quiet()
            given.run(given)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("hf-ewc: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if given.traceback:
            raise
        print(f"hf-ewc: error: {_one_line(error)}", file=sys.stderr)
        return _FAILED
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_plain = isinstance(error, (ValueError, TypeError, OSError)) and text
    return text if is_plain else f"{type(error).__name__}: {text}"


def _quiet() -> None:
    """Warnings of one line, and none that are meant for programmers."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"hf-ewc: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.simplefilter("default")
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = show
