"""The arguments of a script: fields of dataclasses, from a YAML file and the command line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_ewc.processes import is_main_process

_FAILED = 2


def parse_arguments(
    *types: Any,
    defaults: Mapping[str, Any] | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """One object of each dataclass, from `[FILE.yaml] [--field value ...]`.

    The file, where the first argument ends in `.yaml` or `.yml`, holds fields of any of the
    dataclasses; the command line wins over it, and it over the defaults. A field without default
    must be in one of them. Whatever is wrong ends the script with one line on stderr and status 2:
    a key or an option that no dataclass has, a value that is not allowed, a file that is no YAML.

    Args:
        types: dataclasses, as `HfArgumentParser` takes them.
        defaults: in place of the dataclasses' own.
        arguments: by default those of the script.
        description: what `--help` begins with.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(
        types,
        description=description,
        usage="%(prog)s [FILE.yaml] [--field value ...]",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    with one_line_errors():
        preset = dict(defaults or {})
        if given and given[0].endswith((".yaml", ".yml")):
            content = read_yaml(given[0])
            check_known(content, parser.fields(), given[0])
            preset |= content | parser.in_types(content, given[0])
            del given[0]
        parser.preset(preset)
        *found, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            options = {f"--{name}": None for name in parser.fields()}
            check_known([unknown[0].split("=")[0]], options, "the command line")
    return tuple(found)


@contextmanager
def one_line_errors(only_own: bool = False) -> Iterator[None]:
    """End the script with one line where the block raises what a user can mend.

    That is a `ValueError`, `TypeError` or `OSError`, and a `RuntimeError` that this package or the
    script itself raised; anything else keeps its traceback.

    Args:
        only_own: whether a `ValueError` or `TypeError` from elsewhere keeps it, too: in training it
            may be a fault of anyone's.
    """
    try:
        yield
    except OSError as error:
        _fail(error)
    except (ValueError, TypeError, RuntimeError) as error:
        from_anywhere = not only_own and not isinstance(error, RuntimeError)
        if not from_anywhere and not _is_own(error):
            raise
        _fail(error)


def _is_own(error: Exception) -> bool:
    """Whether the error comes from this package, or from a file beside the script."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    file = Path(frame.f_code.co_filename).resolve()
    return module.startswith("hf_ewc.") or file.parent == Path(sys.argv[0]).resolve().parent


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of keys and values; 1e-3 is a number in it, as in YAML 1.2.

    Raises:
        ValueError: there is no such file, it is no YAML, holds a key twice, or no keys at all.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40}; needed are lines of `key: value`.")
    return content


def check_known(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known: a `ValueError` with the nearest that is."""
    names = list(known)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where} has the unknown key {key!r}{meant}")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the defaults of all fields."""


class _Parser(HfArgumentParser):
    """Errors of one line, and defaults that may come from a file."""

    def error(self, message: str) -> NoReturn:
        _fail(ValueError(message))

    def fields(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def in_types(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Those of the values that have to be numbers, 1e3 as 1000 where it has to be whole.

        Argparse looks at words alone.

        Raises:
            ValueError: one is none, or another is no yes or no; `where` it stands.
        """
        found = {}
        for action in self._actions:
            value: Any = values.get(action.dest)
            needed = _NEEDED.get(action.type) if action.nargs in (None, "?") else None
            if action.dest not in values or needed is None:
                continue
            if value is None and action.default is None:
                continue  # nothing is what it is without the file, too
            if not _is_of(action.type, value):
                raise ValueError(f"{where} has {action.dest}: {value!r:.60}; needed is {needed}.")
            found[action.dest] = int(float(value)) if action.type is int else value
        return found

    def preset(self, values: Mapping[str, Any]) -> None:
        """Take these in place of the defaults, also of fields that have none."""
        self.set_defaults(**values)
        for action in self._actions:
            if action.dest in values:
                action.required = False


_NEEDED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    string_to_bool: "true or false",
}


def _is_of(kind: Any, value: Any) -> bool:
    """Whether it is a number, or true or false, also as a word, such as '3' or 'yes'."""
    if kind is not string_to_bool:
        return _is_number(value, whole=kind is int)
    try:
        return isinstance(value, (bool, str)) and isinstance(string_to_bool(value), bool)
    except argparse.ArgumentTypeError:
        return False


def _is_number(value: Any, whole: bool) -> bool:
    """Also as a word, such as '3'."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        number = float(value)
    except ValueError:
        return False
    return not whole or number.is_integer()


_MERGED = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 without two of its surprises: 1e-3 is a number, and a key twice is an error.

    What `<<: *anchor` merges is no key of its own: those beside it win over it.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != _MERGED]
        keys = [self.construct_object(key, deep=True) for key in own]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"the key {min(twice)!r} is there twice")
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _fail(error: Exception) -> NoReturn:
    """End with one line; of several processes the first says it, the others tell their launcher."""
    line = " ".join(str(error).split())
    if is_main_process():
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    ErrorHandler().record_exception(error)  # for torchrun's table of what failed
    sys.exit(_FAILED)
