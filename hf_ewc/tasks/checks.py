"""What is wrong with the arguments of `run_tasks`, said before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.config.checked import number
from hf_ewc.fisher.examples.kinds import check_kind, check_label_numbers
from hf_ewc.tasks.adapting import lacks_adapter
from hf_ewc.tasks.arguments import check_run
from hf_ewc.tasks.heads import heads_of, key_of
from hf_ewc.tasks.named_metrics import NamedMetrics
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.run_folder import safe_name
from hf_ewc.tasks.scenario import SCENARIOS, labels_in_rows_of, labels_of
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.tasks.task import Metrics, Task
from hf_ewc.tasks.training_data import holds_out
from hf_ewc.training.held_out import FEWEST, has_rows

LONGEST_NAME = 200  # file systems take 255 bytes, of which the number of the task needs some


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse names that are no text, empty, alike, or too long for a folder.

    Raises:
        TypeError: a name is no string.
        ValueError: with the name.
    """
    for task in tasks:
        if not isinstance(task.name, str):
            raise TypeError(f"a task's name is a string, got {task.name!r}.")
        if not task.name.strip():
            raise ValueError("a task's name is empty; give each a name of its own.")
        if max(len(task.name), len(safe_name(task.name))) > LONGEST_NAME:
            raise ValueError(
                f"the task's name {task.name[:40]!r}… has {len(task.name)} characters; its folder "
                f"is named after it, so at most {LONGEST_NAME} are allowed."
            )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks are {names}; each needs a name of its own.")


# What evaluation has of itself.
WITHOUT_METRICS = ("accuracy", "loss", "perplexity")


def check_data(tasks: Sequence[Task], data_collator: Callable[..., Any] | None) -> None:
    """Refuse data that no Trainer can read: tables, paths, nothing, labels that are words.

    Raises:
        TypeError: it is no data set.
        ValueError: it is empty, or its labels are strings and no collator turns them into numbers.
    """
    for task in tasks:
        if task.train_dataset is None:
            raise ValueError(f"task {task.name!r} has no train_dataset.")
        named = {"train": task.train_dataset, "eval": task.eval_dataset}
        named |= {} if task.fisher_dataset is None else {"fisher": task.fisher_dataset}
        for kind, data in named.items():
            what = f"the {kind}_dataset of task {task.name!r}"
            if isinstance(data, Iterator):
                raise TypeError(
                    f"{what} is a {type(data).__name__}, which can be read once only; give a list "
                    "of examples, a data set, or a torch.utils.data.IterableDataset."
                )
            _check_no_loader(what, data)
            check_kind(what, data)
            if task.data_collator is None and data_collator is None:
                check_label_numbers(what, data)


def _check_no_loader(what: str, data: Any) -> None:
    if isinstance(data, DataLoader):
        raise TypeError(
            f"{what} is a DataLoader, and the trainer makes its own; give its .dataset, with the "
            "batch size in the training arguments and its collate_fn as data_collator."
        )


def check_evaluated(
    tasks: Any, learnt: Sequence[Task], data_collator: Callable[..., Any] | None
) -> None:
    """Refuse what cannot be evaluated beside the tasks that are learnt, or is one of them.

    Raises:
        TypeError: these are no tasks.
        ValueError: one has training data, or a head that no task learns.
    """
    heads = heads_of(learnt)
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        raise TypeError("evaluate_also must be a list of hf_ewc.Task.")
    for task in tasks:
        if task.train_dataset is not None:
            raise ValueError(
                f"task {task.name!r} of evaluate_also has a train_dataset; put it among the tasks, "
                "or give None."
            )
        if key_of(task) not in (None, *heads) or heads_of([*learnt, task]) != heads:
            raise ValueError(
                f"task {task.name!r} of evaluate_also has a head of its own, which no task trains; "
                f"name the head of one, as Head(…, name=…): {', '.join(heads) or 'none has one'}."
            )
        what = f"the eval_dataset of task {task.name!r}"
        _check_no_loader(what, task.eval_dataset)
        check_kind(what, task.eval_dataset)
        if task.data_collator is None and data_collator is None:
            check_label_numbers(what, task.eval_dataset)


def check_tasks(
    tasks: Sequence[Task],
    args: TrainingArguments,
    config: EWCConfig | None,
    trainer_class: type[Any],
    scenario: str | None,
) -> None:
    """Refuse tasks that cannot be learnt together: a `ValueError`, or a `TypeError`."""
    if not tasks:
        raise ValueError("run_tasks got no tasks; give at least one.")
    if scenario not in (None, *SCENARIOS):
        raise ValueError(f"scenario is {scenario!r}; allowed are {', '.join(SCENARIOS)} or None.")
    if config is not None and not hasattr(trainer_class, "consolidate"):
        raise TypeError(
            f"{trainer_class.__name__} cannot consolidate; with ewc_config, trainer_class must be "
            f"EWCTrainer or a class that begins with EWCMixin."
        )
    for task in tasks:
        if holds_out(config, task):
            check_rows(task, "fisher_data='held_out'")
        if task.classes is None:
            continue
        for kind, data in (("training", task.train_dataset), ("evaluation", task.eval_dataset)):
            outside = (labels_of(data) or labels_in_rows_of(data)) - set(task.classes)
            if outside:
                raise ValueError(
                    f"task {task.name!r} has the labels {sorted(outside)} in its {kind} data, "
                    f"which are not among its classes {list(task.classes)}."
                )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; it would spread over "
                f"the classes of other tasks as well. Set it to 0 for tasks with classes."
            )


def check_calls(**given: Any) -> None:
    """Refuse what is to be called and cannot be: a `TypeError` with its name."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {value!r:.60}; needed is a function, or None.")


def check_optimizers(tasks: Sequence[Task], optimizers: Any) -> None:
    """Refuse an optimizer or schedule that would go on from one task to the next: `ValueError`."""
    if optimizers in (None, (None, None)) or len(tasks) < 2:
        return
    raise ValueError(
        f"optimizers= are given for {len(tasks)} tasks: the schedule would be at its end, and the "
        "learning rate perhaps 0, from the second task on. Let the trainer make new ones for each: "
        "args.optim and args.lr_scheduler_type, optimizer_cls_and_kwargs=, or a trainer_class "
        "with create_optimizer of its own."
    )


def check_types(tasks: Any, args: Any, config: Any, sequence: Any) -> None:
    """Refuse arguments of `run_tasks` that are something else: a `TypeError`."""
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        raise TypeError("tasks must be a list of hf_ewc.Task, one for each task.")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be TrainingArguments, got {type(args).__name__}.")
    if config is not None and not isinstance(config, EWCConfig):
        raise TypeError(f"ewc_config must be an EWCConfig or None, got {type(config).__name__}.")
    if sequence is not None and not isinstance(sequence, SequenceConfig):
        raise TypeError(
            f"sequence_config must be a SequenceConfig or None, got {type(sequence).__name__}."
        )


def check_trains(model: nn.Module, plan: Plan) -> None:
    """Refuse a model of which nothing would be learnt: a `ValueError`, or none: a `TypeError`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {model!r:.80}, a {type(model).__name__}; needed is a model, such as "
            "AutoModelForSequenceClassification.from_pretrained(name)."
        )
    if lacks_adapter(model, plan):
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model requires a gradient, so that nothing would be learnt; call "
            "requires_grad_() on those that are to be trained, or load an adapter with "
            "is_trainable=True."
        )


def check_sequence(
    tasks: Sequence[Task],
    args: TrainingArguments,
    trainer_class: type[Any],
    config: SequenceConfig,
    ewc: EWCConfig | None,
) -> None:
    """Refuse ways to train that these tasks or this trainer cannot have.

    Raises:
        ValueError, TypeError: with what is missing.
    """
    heads_of(tasks)
    check_run(args, tasks, trainer_class)
    for task in tasks:
        if task.head is not None and task.classes is not None:
            raise ValueError(
                f"task {task.name!r} has classes and a head; give it classes on the shared head, "
                "or a head of its own."
            )
        number(f"weight of task {task.name!r}", task.weight, low=0.0)
    if config.l2sp_lambda and not hasattr(trainer_class, "consolidate"):
        raise TypeError(
            f"l2sp_lambda is {config.l2sp_lambda:g}; {trainer_class.__name__} has no penalty: "
            "trainer_class must be EWCTrainer or a class that begins with EWCMixin."
        )
    if config.weight_average == "fisher" and (ewc is None or ewc.ewc_mode != "separate"):
        raise ValueError(
            "weight_average is 'fisher', which needs the sums over all tasks: give an ewc_config "
            "with ewc_mode='separate' (ewc_lambda=0 lets the penalty out)."
        )
    if config.gate_retries and ewc is None and not config.l2sp_lambda:
        raise ValueError(
            f"gate_retries is {config.gate_retries}; a task is tried again with more strength of "
            "EWC or L2-SP, and there is neither."
        )
    if not (config.replays or config.joint_training):
        return
    for task in tasks:
        data = task.train_dataset
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"the training data of task {task.name!r} is a stream; to train on it again it "
                "must have a length and examples by number."
            )
    if args.n_gpu > 1 and any(task.classes is not None for task in tasks):
        raise ValueError(
            f"one process has {args.n_gpu} GPUs, among which it would deal out batches whose rows "
            "belong to different tasks; launch one process for each GPU (accelerate launch)."
        )


def check_score(
    task: Task, compute_metrics: Metrics | str | Sequence[str] | None, args: TrainingArguments
) -> None:
    """Refuse a task whose score cannot be had, before it is trained: a `ValueError`."""
    if task.eval_dataset is None:
        raise ValueError(f"task {task.name!r} has no eval_dataset, on which its score is measured.")
    if compute_metrics is not None and not callable(compute_metrics):
        NamedMetrics(compute_metrics)
        if getattr(args, "predict_with_generate", False):
            raise ValueError(
                f"compute_metrics names {compute_metrics!r} and predict_with_generate is set: what "
                "is generated stands in other places than the labels, and has to be decoded. Give "
                "compute_metrics as a function that decodes both."
            )
    if not callable(compute_metrics) and not args.eval_do_concat_batches:
        raise ValueError(
            "eval_do_concat_batches is False, which leaves outputs in batches for compute_metrics; "
            "give that as a function which takes them, or leave the setting out."
        )
    if compute_metrics is None and task.metric not in WITHOUT_METRICS:
        raise ValueError(
            f"task {task.name!r} is scored by {task.metric!r}; without compute_metrics there are "
            "'accuracy' and 'loss' ('perplexity' for language models)."
        )


def check_rows(task: Task, setting: str) -> None:
    """Refuse a task of which no examples can be held out, as `setting` asks: a `ValueError`."""
    if not has_rows(task.train_dataset):
        raise ValueError(
            f"the training data of task {task.name!r} is a stream; {setting} holds a part of it "
            "out, for which it must have a length and examples by number. Give those, or another "
            "setting."
        )
    if len(task.train_dataset) < FEWEST:
        raise ValueError(
            f"the training data of task {task.name!r} has {len(task.train_dataset)} examples, of "
            f"which {setting} holds some out; needed are {FEWEST} or more."
        )
