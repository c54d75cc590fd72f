"""Domains for a language model: texts or chats from files or the Hub, cut into examples."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_sources import Source, SourceArguments
from datasets import Dataset

from hf_ewc.cli.sources import check_columns, from_file, from_hub

TOOLS = "tools"
"""The column of what an assistant may call in a chat, by the convention of chat templates."""
_SAID = {"content", "tool_calls"}  # a message of a chat has one of them, and a role


@dataclass
class DomainArguments(SourceArguments):
    """The domains, and how their texts are cut."""

    protect: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "General texts (in the YAML, as for a task): what the model knows of them is "
            "protected from the first task on."
        },
    )
    evaluate_also: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "A list like `tasks` of texts that are scored, and never trained on."},
    )
    text: str = field(
        default="text",
        metadata={
            "help": "Column of the texts, or of chats: lists of messages (role, content), also as "
            "JSON in a text. What a column `tools` beside it has goes to the chat's template."
        },
    )
    block_size: int = field(
        default=512,
        metadata={
            "help": "Tokens of an example. Texts are joined, with the tokenizer's end-of-text "
            "token behind each, where it has one, and cut into blocks of this; a chat is an "
            "example of its own, cut off there."
        },
    )


@dataclass
class Domain(Source):
    """One entry of `tasks`, `protect` or `evaluate_also`."""

    text: str = "text"  # the column

    @classmethod
    def from_entry(
        cls, entry: Any, where: str, given: DomainArguments, needed: tuple[str, ...]
    ) -> "Domain":
        """The domain of an entry, with what is `given` for all in place of what it leaves out.

        Args:
            needed: the parts that it must have, of "train" and "eval".
        """
        domain: Domain = cls.of_entry(entry, where, given)
        files = [f"{part}_file" for part in needed]
        found = [name for name in files if getattr(domain, name)]
        if found != ([] if domain.dataset_name else files):
            raise ValueError(f"{where} needs either {' and '.join(files)}, or dataset_name.")
        return domain

    def read(self, part: str) -> tuple[str, list[Any], list[Any]]:
        """The name, the texts or chats, and the chats' tools of the part "train" or "eval"."""
        file, split = self.of_part(part)
        if self.dataset_name:
            where = f"{self.dataset_name} ({split})"
            data = from_hub(self.dataset_name, self.dataset_config_name, split)
        elif str(file).lower().endswith(".txt"):
            texts = from_file(str(file), sample_by="document")["text"][:]
            return str(file), texts, [None] * len(texts)
        else:
            where, data = str(file), from_file(str(file))
        check_columns(data, [self.text], where)
        tools = data[TOOLS] if TOOLS in data.column_names else [None] * len(data)
        return where, data[self.text], tools


def domains_of(given: DomainArguments) -> tuple[list[Domain], Domain | None, list[Domain]]:
    """What is learnt, what is protected first, and what is only scored.

    Raises:
        ValueError: with the entry, and what is wrong with it.
    """
    if not isinstance(given.tasks, list) or not given.tasks:
        raise ValueError("tasks are missing; give a YAML file with a list `tasks:`.")
    if not isinstance(given.evaluate_also or [], list):
        raise ValueError(f"evaluate_also is {given.evaluate_also!r:.60}; needed is a list.")

    def each(entries: Any, what: str, *needed: str) -> list[Domain]:
        return [
            Domain.from_entry(entry, f"{what} {k + 1}", given, needed)
            for k, entry in enumerate(entries or [])
        ]

    protect = given.protect
    if isinstance(protect, dict):
        protect = {"name": "pretraining", **protect}
    return (
        each(given.tasks, "task", "train", "eval"),
        protect and Domain.from_entry(protect, "protect", given, ("train",)),
        each(given.evaluate_also, "evaluate_also", "eval"),
    )


def examples_of(
    domain: Domain, part: str, tokenizer: Any, size: int, most: int | None, whole: bool = False
) -> Dataset:
    """The part's examples: `input_ids` and, the same, `labels`.

    Args:
        domain: whose.
        part: "train" or "eval".
        tokenizer: of the model.
        size: tokens of an example, at most.
        most: examples, at most.
        whole: leave chats as long as they are.

    Raises:
        ValueError: something is neither text nor chat, or there is nothing to learn from.
    """
    where, values, tools = domain.read(part)
    chats = map(_chat, values, tools)
    found = []
    for ids in _tokens(where, domain.text, chats, tokenizer, size, whole):
        if len(ids) > 1:  # of one token alone there is nothing to predict
            found.append(ids)
        if len(found) == most:
            break
    if not found:
        in_column = "" if where.lower().endswith(".txt") else f" in column {domain.text!r}"
        raise ValueError(f"{where} has no text{in_column}.")
    return Dataset.from_dict({"input_ids": found, "labels": found})


@dataclass
class _Chat:
    """What was said, and what the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


def _chat(value: Any, tools: Any) -> Any:
    """The chat that a value is, also one that a text has as JSON; what is none as it is."""
    messages = _of_json(value)
    if not _is_chat(messages):
        return value
    return _Chat([_as_written(turn) for turn in messages], _as_written(_of_json(tools)) or None)


def _of_json(value: Any) -> Any:
    """What a text has as JSON; else the value."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _as_written(value: Any) -> Any:
    """Without the keys that a table adds, as None, since other rows have them."""
    if isinstance(value, dict):
        return {
            key: _as_written(own)
            for key, own in value.items()
            if own is not None or key == "content"
        }
    return [_as_written(own) for own in value] if isinstance(value, list) else value


def _tokens(
    where: str, column: str, values: Any, tokenizer: Any, size: int, whole: bool
) -> Iterator[list[int]]:
    """The tokens of each example."""
    rest: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row, value in enumerate(values):
        if isinstance(value, str):
            if not value.strip():
                continue
            rest += [*tokenizer(value, verbose=False)["input_ids"], *end]
            while len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
        elif isinstance(value, _Chat):
            ids = _of_chat(value, tokenizer, f"{where}, example {row + 1}")
            yield ids if whole else ids[:size]
        else:
            raise ValueError(
                f"{where} has {value!r:.60} in column {column!r} of example {row + 1}; needed is "
                "text, or a list of messages, each with role and content."
            )
    yield rest


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and "role" in turn and turn.keys() & _SAID for turn in value)
    )


def _of_chat(chat: _Chat, tokenizer: Any, where: str) -> list[int]:
    """The chat in the words of the tokenizer's template; all of it is learnt."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is a chat, and the model's tokenizer has no chat template; choose a model "
            "that was trained on chats, or save a template with the tokenizer."
        )
    try:
        written = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, return_dict=True)
        return list(written["input_ids"])
    except Exception as error:  # a template is a program of its own
        raise ValueError(
            f"{where} is a chat that the template of the model's tokenizer cannot write: {error}; "
            f"it is {chat.messages!r:.200}. Leave it out or change it, or save a template that "
            "takes such chats with the tokenizer."
        ) from error
