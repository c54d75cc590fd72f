"""Text classification, one data set after another, without losing what was learnt before.

    accelerate launch recipes/sequential_text_classification.py \\
        recipes/configs/sequential_text_classification/my_csv.yaml

The YAML file names the tasks: files of your own (csv, json, parquet) or data sets of the Hub, each
with its columns of text, one or two, and of labels. With `methods:` it trains in several ways side
by side, else once. Every field of TrainingArguments, EWCConfig and SequenceConfig may stand in the
file, or be given behind it, as in `--ewc_lambda 1e4 --max_train_samples 500 --use_peft`; started
again after a kill, it goes on where it was.
"""

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
import transformers
from labelled_data import check_growth, load_all, names_of_head, rows_of_head, tasks_of
from text_tasks import TextArguments, TextTask, tokenized
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

from hf_ewc import EWCConfig, SequenceConfig, Task
from hf_ewc.cli.arguments import one_line_errors, parse_arguments
from hf_ewc.cli.lengths import fitting_length
from hf_ewc.cli.lora import LoraArguments, with_lora
from hf_ewc.cli.methods import MethodArguments, checked_methods, learn
from hf_ewc.cli.models import pretrained
from hf_ewc.processes import leave


@dataclass
class Arguments(TextArguments, LoraArguments, MethodArguments):
    model_name_or_path: str = field(
        kw_only=True, metadata={"help": "Folder or Hub id of the model to start."}
    )


DEFAULTS = dict(
    learning_rate=5e-5,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),  # elsewhere it only warns
    max_grad_norm=0.0,  # clipping would shrink the task's gradient along with the penalty's
)


def parsed(arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Everything that was asked for, with what can be checked without data checked."""
    types = (Arguments, TrainingArguments, EWCConfig, SequenceConfig)
    found = parse_arguments(*types, defaults=DEFAULTS, arguments=arguments, description=__doc__)
    own, args, ewc, sequence = found
    with one_line_errors():
        own.tasks = tasks_of(own, TextTask)
        own.methods = checked_methods(own.methods, ewc)
        own.seeds(args.seed)
        check_growth(own, sequence)
    return found


def main() -> None:
    own, args, ewc, sequence = parsed()
    datasets.disable_progress_bars()  # those of loading; the tasks' own stay
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        tasks, make_model, collator = prepared(own, sequence)
    options = dict(data_collator=collator, processing_class=collator.tokenizer)
    learn(make_model, tasks, args, ewc, own, sequence_config=sequence, **options)
    leave()


def prepared(own: Arguments, sequence: SequenceConfig) -> tuple[list[Task], Any, Any]:
    """The tasks, what makes a model for them, and what puts their examples into batches."""
    loaded = load_all(own.tasks, own)
    names, rows = rows_of_head(loaded, own.shared_labels)
    names = names_of_head(names, rows, sequence.grow_head)
    tokenizer = pretrained(AutoTokenizer, own.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = pretrained(AutoConfig, own.model_name_or_path)
    texts = max(len(task.columns) for task in own.tasks)
    length = fitting_length("max_length", own.max_length, tokenizer, config, texts=texts)

    def tokenize(*texts: list[str]) -> Any:
        return tokenizer(*texts, truncation=True, max_length=length)

    def make_model() -> Any:
        model = pretrained(
            AutoModelForSequenceClassification,
            own.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: row for row, name in enumerate(names)},
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # a head for other classes makes way
        )
        return with_lora(model, own, "SEQ_CLS")

    tasks = [
        Task(
            examples.task.name,
            tokenized(examples.train, examples.task.columns, head, tokenize),
            tokenized(examples.eval, examples.task.columns, head, tokenize),
            classes=None if own.shared_labels else list(head.values()),
        )
        for examples, head in zip(loaded, rows, strict=True)
    ]
    return tasks, make_model, DataCollatorWithPadding(tokenizer)


if __name__ == "__main__":
    main()
