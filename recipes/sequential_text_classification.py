"""Text classification, one data set after another, without losing what was learnt before.

    accelerate launch recipes/sequential_text_classification.py \\
        recipes/configs/sequential_text_classification/my_csv.yaml

The YAML file names the tasks: files of your own (csv, json, parquet) or data sets of the Hub, each
with its columns of text, one or two, and of labels. With `methods:` it trains in several ways side
by side, else once. Every field of TrainingArguments, EWCConfig and SequenceConfig may stand in the
file, or be given behind it, as in `--ewc_lambda 1e4 --max_train_samples 500 --use_peft`; started
again after a kill, it goes on where it was.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from peft import LoraConfig, get_peft_model
from text_tasks import Examples, TextTask, load, rows_of_head
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_ewc import EWCConfig, SequenceConfig, Task, compare_methods, run_tasks
from hf_ewc.cli.arguments import check_known, one_line_errors, parse_arguments
from hf_ewc.processes import leave
from hf_ewc.report import difference_table, score_table, summary_table


@dataclass
class DataArguments:
    tasks: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The tasks in their order (in the YAML)."}
    )
    methods: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Names of methods, and for each the settings that differ (in the YAML)."},
    )
    num_seeds: int = field(
        default=3, metadata={"help": "Repetitions of each method, from --seed on."}
    )
    shared_labels: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether a label's name means the same class in every task, and the model chooses "
                "among all. By default each task has classes of its own."
            )
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "At most so many training examples a task."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "At most so many evaluation examples a task."}
    )
    max_length: int = field(
        default=128, metadata={"help": "Tokens of an example; what is longer is cut off."}
    )


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the model to start."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA in place of all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of LoRA, times its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "The modules with LoRA: suffixes of their names, or all-linear."},
    )


DEFAULTS = dict(
    learning_rate=5e-5,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    max_grad_norm=0.0,  # clipping would shrink the task's gradient along with the penalty's
)


def parsed(arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Everything that was asked for, with what can be checked without data checked."""
    types = (DataArguments, ModelArguments, TrainingArguments, EWCConfig, SequenceConfig)
    found = parse_arguments(*types, defaults=DEFAULTS, arguments=arguments, description=__doc__)
    with one_line_errors():
        data, ewc = found[0], found[3]
        if not isinstance(data.tasks, list) or not data.tasks:
            raise ValueError("tasks are missing; give a YAML file with a list `tasks:`.")
        data.tasks = [TextTask.from_entry(entry, k + 1) for k, entry in enumerate(data.tasks)]
        data.methods = checked_methods(data.methods or {}, ewc)
    return found


def checked_methods(methods: dict[str, Any], ewc: EWCConfig) -> dict[str, dict[str, Any]]:
    """The methods' settings; those with settings of EWC begin with the file's own of these."""
    if not isinstance(methods, dict):
        raise ValueError(f"methods is {methods!r:.80}; needed is a settings dict for each name.")
    ewc_fields = {each.name for each in fields(EWCConfig)}
    known = [each.name for kind in (EWCConfig, SequenceConfig, TrainingArguments)
             for each in fields(kind)]  # fmt: skip
    for name, settings in methods.items():
        check_known(settings or {}, known, f"method {name!r}")
    return {
        name: {
            **({"ewc_config": ewc} if ewc_fields & {*(settings or {})} else {}),
            **(settings or {}),
        }
        for name, settings in methods.items()
    }


def main() -> None:
    data, model, args, ewc, sequence = parsed()
    transformers.logging.disable_progress_bar()  # those of loading; the tasks' own stay
    with one_line_errors():
        tasks, make_model, collator = prepared(data, model)

    options = dict(data_collator=collator, sequence_config=sequence)
    if data.methods:
        seeds = range(args.seed, args.seed + data.num_seeds)
        comparison = compare_methods(make_model, tasks, args, data.methods, seeds, **options)
        tables = [str(comparison), difference_table(comparison.runs)]
    else:
        set_seed(args.seed)
        result = run_tasks(make_model(), tasks, args, ewc, **options)
        tables = [score_table([result.matrix]), summary_table({"EWC": [result.matrix]})]
    if args.should_save:
        print("\n" + "\n\n".join(filter(None, tables)))
        print(f"\nWritten to {args.output_dir}: report.md with its pictures, results.json")
    leave()


def prepared(data: DataArguments, model: ModelArguments) -> tuple[list[Task], Any, Any]:
    """The tasks, what makes a model for them, and what puts their examples into batches."""
    loaded = [load(task, data.max_train_samples, data.max_eval_samples) for task in data.tasks]
    names, rows = rows_of_head(loaded, data.shared_labels)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def make_model() -> Any:
        made = AutoModelForSequenceClassification.from_pretrained(
            model.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: row for row, name in enumerate(names)},
            pad_token_id=tokenizer.pad_token_id,
            ignore_mismatched_sizes=True,  # a head for other classes makes way
        )
        return with_lora(made, model) if model.use_peft else made

    tasks = [
        as_task(examples, own, tokenizer, data) for examples, own in zip(loaded, rows, strict=True)
    ]
    return tasks, make_model, DataCollatorWithPadding(tokenizer)


def as_task(examples: Examples, rows: dict[str, int], tokenizer: Any, data: DataArguments) -> Task:
    texts = [f"text_{k}" for k in range(len(examples.task.columns))]

    def tokenized(batch: dict[str, list[Any]]) -> dict[str, Any]:
        found = tokenizer(*(batch[c] for c in texts), truncation=True, max_length=data.max_length)
        return {**found, "labels": [rows[label] for label in batch["label"]]}

    train, evaluation = (
        part.map(tokenized, batched=True, remove_columns=part.column_names)
        for part in (examples.train, examples.eval)
    )
    classes = None if data.shared_labels else list(rows.values())
    return Task(examples.task.name, train, evaluation, classes=classes)


def with_lora(model: Any, given: ModelArguments) -> Any:
    targets = given.lora_target_modules
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=given.lora_r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    main()
