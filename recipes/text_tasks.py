"""Tasks of texts with labels."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from labelled_data import DataArguments, LabelledTask, Part


@dataclass
class TextArguments(DataArguments):
    text: str = field(
        default="text", metadata={"help": "Column of the text; in the YAML also a list of two."}
    )
    max_length: int = field(
        default=128, metadata={"help": "Tokens of an example; what is longer is cut off."}
    )


@dataclass
class TextTask(LabelledTask):
    text: str | list[str] = "text"  # one column, or two

    @property
    def columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)

    def check(self) -> None:
        super().check()
        if not 1 <= len(self.columns) <= 2 or not all(type(c) is str for c in self.columns):
            raise ValueError(
                f"task {self.name!r} has the texts {self.columns}; give the name of one column, or "
                "of two."
            )
        named = [*self.columns, self.label]
        if len({*named}) < len(named):
            raise ValueError(
                f"task {self.name!r} has the texts {self.columns} and the label {self.label!r}; "
                "give each a column of its own."
            )


def tokenized(part: Part, columns: list[str], rows: dict[str, int], tokenize: Any) -> Dataset:
    """The part as a model takes it, with the rows of the head as labels.

    Raises:
        ValueError: with the first example that is no text.
    """
    for column in columns:
        for row, value in zip(part.rows, part.column(column), strict=True):
            if not isinstance(value, str) or not value.strip():
                seen = "nothing" if value is None or isinstance(value, str) else repr(value)
                raise ValueError(
                    f"{part.where} has {seen} in column {column!r} of example {row + 1}; needed is "
                    "text."
                )
    texts = {column: f"text {k}" for k, column in enumerate(columns)}  # one may be named "labels"
    return part.with_labels(texts, rows).map(
        lambda batch: tokenize(*(batch[text] for text in texts.values())),
        batched=True,
        remove_columns=[*texts.values()],
    )
