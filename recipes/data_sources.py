"""Where the data of a task is: what all recipes ask of an entry of their `tasks:`."""

from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hf_ewc.cli.arguments import check_known

# An entry that says where its data is says all of it.
SOURCES = {
    *("train_file", "eval_file", "train_folder", "eval_folder"),
    *("dataset_name", "dataset_config_name"),
}


@dataclass
class SourceArguments:
    """The tasks, and where the data is for each that does not say it itself."""

    tasks: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The tasks in their order (in the YAML): for each a name and, as far as it "
            "differs from what stands outside, the data."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "File of the training examples."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "File of the evaluation examples."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, in place of files."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Which configuration of it."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "At most so many training examples a task."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "At most so many evaluation examples a task."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            most = getattr(self, name)
            if most is not None and most < 1:
                raise ValueError(f"{name} is {most}; needed is at least 1.")


@dataclass
class Source:
    """One entry of a YAML file: files of its own, or a data set of the Hub."""

    name: str
    train_file: str | None = None
    eval_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str = "train"
    eval_split: str = "test"

    @classmethod
    def of_entry(cls, entry: Any, where: str, given: SourceArguments | None) -> Any:
        """An entry, with what is `given` for all in place of what it leaves out.

        Raises:
            ValueError: it has no name, or something that there is not; `where` it stands.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {entry!r:.60}; needed are lines of `key: value`.")
        known = {each.name for each in fields(cls)}
        check_known(entry, known, where)
        if not isinstance(entry.get("name"), str):
            raise ValueError(
                f"{where} has no name; give each a `name:` of its own (a number in quotes)."
            )
        common = {} if given is None else {k: v for k, v in vars(given).items() if k in known}
        if SOURCES & entry.keys():
            common = {key: value for key, value in common.items() if key not in SOURCES}
        _check_kinds(cls, {**common, **entry}, where)
        return cls(**{**common, **entry})

    def of_part(self, part: str) -> tuple[str | None, str]:
        """The file and the split of the part "train" or "eval"."""
        return getattr(self, f"{part}_file"), getattr(self, f"{part}_split")


def _check_kinds(kind: Any, values: dict[str, Any], where: str) -> None:
    """Refuse a list where one word is needed, a number where a name is: a `ValueError`."""
    for key, hint in get_type_hints(kind).items():
        value = values.get(key)
        kinds = [get_origin(each) or each for each in get_args(hint) or (hint,)]
        if key not in values or (value is None and NoneType in kinds):
            continue
        if not isinstance(value, tuple(kinds)):
            needed = " or ".join(_WORDS[each] for each in kinds if each in _WORDS)
            raise ValueError(f"{where} has {key}: {value!r:.60}; needed is {needed}.")


_WORDS = {str: "one word or path (a number in quotes)", list: "a list"}
