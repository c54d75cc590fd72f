"""The options that every table takes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class TableOptions:
    """What a table is made from, how often, and where its runs are kept."""

    data: str | None = field(
        default=None,
        metadata={"help": "Folder with local files, as in `sources.py`; by default the Hub's."},
    )
    minilm: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Name or folder of the encoder that the tables on texts start from."},
    )
    seeds: int = field(default=3, metadata={"help": "Repetitions, of each method."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where the runs are kept; started again, they go on. runs/tables/NAME."},
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps a task, in place of the table's own."}
    )
    validation: bool = field(
        default=False,
        metadata={
            "help": "To choose settings by: leave the test data alone, score on a fifth of each "
            "task's training data, which is then not trained on, and count seeds from 100."
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Only these sequences or methods, by their names."}
    )

    @property
    def folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)

    @property
    def repetitions(self) -> range:
        """The seeds; none is used both to choose settings and to show them."""
        first = 100 if self.validation else 0
        return range(first, first + self.seeds)

    def among(self, names: Any) -> list[str]:
        """Those of `names` that are asked for by `only`; see `those_of`."""
        return those_of(names, self.only, "only")


def those_of(names: Any, asked: list[str] | None, option: str) -> list[str]:
    """Those of `names` that are asked for, all of them where nothing is.

    Raises:
        ValueError: something else is asked for.
    """
    unknown = [name for name in asked or [] if name not in names]
    if unknown:
        raise ValueError(f"--{option} {unknown}: there are {', '.join(names)}.")
    return [name for name in names if asked is None or name in asked]


def parsed(
    name: str, arguments: list[str] | None = None, kind: Any = TableOptions, **defaults: Any
) -> Any:
    """The options of the table `name`, a `kind` of them, from the command line."""
    parser = HfArgumentParser(kind)
    parser.set_defaults(**{"output_dir": f"runs/tables/{name}", **defaults})
    (options,) = parser.parse_args_into_dataclasses(args=arguments)
    if options.validation:
        options.output_dir = f"{options.output_dir}/validation"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # models this small are fastest so
    return options


def training_arguments(folder: Path, options: TableOptions, **own: Any) -> TrainingArguments:
    """Plain steps of one learning rate, which keep no checkpoints and report to nothing."""
    common: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "max_grad_norm": 0.0,  # clipping would shrink the task's gradient along with the penalty's
        "disable_tqdm": True,
        "per_device_eval_batch_size": 1000,
    }
    steps = {} if options.max_steps is None else {"max_steps": options.max_steps}
    return TrainingArguments(str(folder), **{**common, **own, **steps})
