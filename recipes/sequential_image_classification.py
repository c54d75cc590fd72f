"""Image classification, one set of classes after another, without losing what was learnt before.

    accelerate launch recipes/sequential_image_classification.py \\
        recipes/configs/sequential_image_classification/my_images.yaml

The YAML file names the tasks: folders of images of your own (one folder for each class), files
(csv, json or parquet with a column of images, .npz with arrays) or data sets of the Hub; one data
set becomes several tasks by `labels:`, `classes_per_task:` or `permute_pixels:`. The model is a
pretrained one (`model_name_or_path`), or begins at random (`model_config:`). With `methods:` it
trains in several ways side by side, else once. Every field of TrainingArguments, EWCConfig and
SequenceConfig may stand in the file, or be given behind it, as in `--ewc_lambda 1e4
--dataset_name my/images`; started again after a kill, it goes on where it was.
"""

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
import transformers
from image_tasks import ImageArguments, ImageTask, permuted, pixels_for, with_pixels
from labelled_data import check_growth, load_all, names_of_head, rows_of_head, tasks_of
from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments

from hf_ewc import EWCConfig, SequenceConfig, Task
from hf_ewc.cli.arguments import check_known, one_line_errors, parse_arguments
from hf_ewc.cli.lora import LoraArguments, with_lora
from hf_ewc.cli.methods import MethodArguments, checked_methods, learn
from hf_ewc.cli.models import pretrained
from hf_ewc.processes import leave


@dataclass
class Arguments(ImageArguments, LoraArguments, MethodArguments):
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the pretrained model to start."}
    )
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Where there is none (in the YAML): the model_type, such as vit, and fields of "
            "its configuration, for a model that begins at random."
        },
    )


DEFAULTS = dict(
    learning_rate=5e-5,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
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
        if not own.model_name_or_path and not own.model_config:
            raise ValueError("the model is missing; give model_name_or_path, or model_config.")
        if own.num_tasks is not None:
            own.tasks = copies(own)
        own.tasks = tasks_of(own, ImageTask)
        own.methods = checked_methods(own.methods, ewc)
        own.seeds(args.seed)
        check_growth(own, sequence)
    return found


def copies(own: Arguments) -> list[dict[str, str]]:
    """The entries of so many tasks that differ in nothing but the order of their pixels."""
    if not own.permute_pixels or own.tasks or own.classes_per_task or own.num_tasks < 1:
        raise ValueError(
            f"num_tasks is {own.num_tasks}; it makes tasks of one data set by permute_pixels, at "
            "least one, without `tasks:` or classes_per_task."
        )
    return [{"name": f"order {k + 1}"} for k in range(own.num_tasks)]


def main() -> None:
    own, args, ewc, sequence = parsed()
    datasets.disable_progress_bars()  # those of loading; the tasks' own stay
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        tasks, make_model = prepared(own, sequence)
    learn(make_model, tasks, args, ewc, own, sequence_config=sequence)
    leave()


def prepared(own: Arguments, sequence: SequenceConfig) -> tuple[list[Task], Any]:
    """The tasks, and what makes a model for them."""
    loaded = load_all(own.tasks, own)
    names, rows = rows_of_head(loaded, own.shared_labels)
    names = names_of_head(names, rows, sequence.grow_head)
    config = config_of(own)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: row for row, name in enumerate(names)}
    pixels = pixels_for(config, own.model_name_or_path)

    def make_model() -> Any:
        if own.model_name_or_path is None:
            return with_lora(AutoModelForImageClassification.from_config(config), own)
        model = pretrained(
            AutoModelForImageClassification,
            own.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=True,  # a head for other classes makes way
        )
        return with_lora(model, own)

    tasks = []
    for k, (examples, head) in enumerate(zip(loaded, rows, strict=True)):
        view = permuted(pixels, own.permutation_seed + k) if own.permute_pixels else pixels
        train, evaluation = (
            with_pixels(part, examples.task, head, view) for part in (examples.train, examples.eval)
        )
        classes = None if own.shared_labels else list(head.values())
        tasks.append(Task(examples.task.name, train, evaluation, classes=classes))
    return tasks, make_model


def config_of(own: Arguments) -> Any:
    """The configuration of the model, with unknown fields refused."""
    if own.model_name_or_path is not None:
        return pretrained(AutoConfig, own.model_name_or_path)
    if not isinstance(own.model_config, dict) or "model_type" not in own.model_config:
        raise ValueError(
            f"model_config is {own.model_config!r:.60}; needed are lines of `key: value`, the "
            "model_type among them."
        )
    plain = AutoConfig.for_model(own.model_config["model_type"])
    check_known(own.model_config, [*plain.to_dict()], "model_config")
    try:
        config = AutoConfig.for_model(**own.model_config)
        AutoModelForImageClassification.from_config(config)  # by which sizes show that do not fit
    except Exception as error:  # each model has checks of its own
        raise ValueError(f"model_config makes no model: {error}") from error
    return config


if __name__ == "__main__":
    main()
