"""The runner over a sequence of tasks, which trains, tests and remembers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.config.checked import boolean
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.checks import (
    check_calls,
    check_data,
    check_evaluated,
    check_names,
    check_optimizers,
    check_score,
    check_sequence,
    check_tasks,
    check_trains,
    check_types,
)
from hf_ewc.tasks.lambda_search import check_search
from hf_ewc.tasks.main_process import by_main_process
from hf_ewc.tasks.plan import AfterTask, Plan
from hf_ewc.tasks.publishing import Repository
from hf_ewc.tasks.results import TaskResults
from hf_ewc.tasks.scenario import CLASS_INCREMENTAL, guess_scenario
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.tasks.task import Metrics, Task
from hf_ewc.tasks.task_run import TaskRun
from hf_ewc.tasks.trainer_arguments import check_trainer_arguments
from hf_ewc.training.trainer import EWCTrainer

logger = logging.getLogger("hf_ewc")


def run_tasks(
    model: nn.Module,
    tasks: Sequence[Task],
    args: TrainingArguments,
    ewc_config: EWCConfig | None = None,
    *,
    sequence_config: SequenceConfig | None = None,
    trainer_class: type[Any] = EWCTrainer,
    ewc_state: EWCState | str | None = None,
    data_collator: Callable[..., Any] | None = None,
    compute_metrics: Metrics | str | Sequence[str] | None = None,
    mask_training: bool = True,
    evaluate_unseen: bool = False,
    evaluate_also: Sequence[Task] = (),
    joint: Sequence[float] | Mapping[str, float] | None = None,
    scenario: str | None = None,
    log_likelihood: Callable[..., Any] | None = None,
    after_task: AfterTask | None = None,
    resume: bool = True,
    **trainer_kwargs: Any,
) -> TaskResults:
    """Train on one task after another, testing all that were seen after each, and keep the results.

    For each task: a trainer with `args`, `train()`, `evaluate` on every task so far,
    `consolidate()`; then model, state and results are saved. After a crash or a kill at any moment
    the same call goes on: with the last whole checkpoint that `args.save_strategy` left inside the
    task, or with the task's beginning, and ends with the same weights and results; with further
    tasks behind those of an earlier call it goes on with these. Task k trains with the seed
    `args.seed + k`, counted from 0.

    Args:
        model: trained in place (under FSDP2 a new one for each further task: see the result's); to
            go on, give it as it was at first.
        tasks: in the order of training.
        args: for every task; `args.output_dir` holds the run, with a folder for each task. With
            `push_to_hub` the last model goes to the Hub in the end, with its state and card.
        ewc_config: None trains plainly, for comparison.
        sequence_config: replay, warm-up, L2-SP and other ways to go from task to task, with EWC or
            without.
        trainer_class: any Trainer; with `ewc_config` an `EWCMixin` one.
        ewc_state: what protects the model already during the first task.
        data_collator: for the tasks that have none.
        compute_metrics: for the tasks that have none; the default is accuracy, labels of -100 left
            out. A name or names that `evaluate.load` knows will do.
        mask_training: whether training and Fisher, too, see only the task's own classes.
        evaluate_unseen: score the tasks to come as well, and the untrained model, which forward
            transfer needs.
        evaluate_also: tasks without training data, such as general text, that are scored before the
            first task and after each; no measure counts them.
        joint: scores by task of a model trained jointly, which intransigence needs.
        scenario: "task", "domain" or "class"; None looks at `classes` and the labels.
        log_likelihood: for heads whose likelihood is not known, as `consolidate` takes it.
        after_task: called as `after_task(trainer, task, results)` after each task, with the results
            so far; the figures that it returns, in a dict or None, are kept in results.json.
        resume: False begins anew and removes what an earlier run wrote for these tasks, but for
            nothing else.
        trainer_kwargs: for the trainer's constructor, such as `callbacks` or `processing_class`. A
            `peft_config` is for the first trainer alone: all tasks train the adapter that it adds.

    Raises:
        ValueError: no tasks, names that repeat, labels outside a task's classes, a metric that
            evaluation did not return, an output folder that holds a different run or is in use by
            one, or fewer processes than were asked for.
        ForgettingError: more was lost of an earlier task than `max_forgetting` allows; the model
            before is kept.
        TypeError: an argument of another type, one that the trainer does not take, or `ewc_config`
            is given and `trainer_class` cannot consolidate.
    """
    if ewc_state is not None and ewc_config is None:
        raise ValueError("run_tasks got an ewc_state without ewc_config; give both, or neither.")
    boolean("resume", resume)
    plan = planned(
        tasks,
        args,
        ewc_config,
        sequence_config=sequence_config,
        trainer_class=trainer_class,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
        mask_training=mask_training,
        evaluate_unseen=evaluate_unseen,
        evaluate_also=evaluate_also,
        scenario=scenario,
        log_likelihood=log_likelihood,
        after_task=after_task,
        **trainer_kwargs,
    )
    if not any(task.head is not None for task in tasks):  # which would be put on it first
        check_trains(model, plan)
    state = EWCState.from_pretrained(ewc_state) if isinstance(ewc_state, str) else ewc_state
    matrix = AccuracyMatrix(
        [task.name for task in tasks],
        joint=joint,
        lower_is_better={
            task.name: task.metric for task in (*tasks, *evaluate_also) if task.lower_is_better
        },
        others={task.name: None for task in evaluate_also},
    )
    run = TaskRun(plan, model, state, matrix)
    if plan.scenario == "class":
        logger.warning(CLASS_INCREMENTAL)
    repository = Repository(args)
    with run.started(resume):
        if repository.is_wanted:
            by_main_process(repository.make)
        run.learn_all()
        if repository.is_wanted:
            folder, done = run.folder.model(len(tasks) - 1), run.results
            by_main_process(lambda: repository.upload(folder, matrix, ewc_config, done.state))
    return run.results


def planned(
    tasks: Sequence[Task],
    args: TrainingArguments,
    ewc_config: EWCConfig | None = None,
    *,
    sequence_config: SequenceConfig | None = None,
    trainer_class: type[Any] = EWCTrainer,
    data_collator: Callable[..., Any] | None = None,
    compute_metrics: Metrics | str | Sequence[str] | None = None,
    mask_training: bool = True,
    evaluate_unseen: bool = False,
    evaluate_also: Sequence[Task] = (),
    scenario: str | None = None,
    log_likelihood: Callable[..., Any] | None = None,
    after_task: AfterTask | None = None,
    **trainer_kwargs: Any,
) -> Plan:
    """The plan of a run, whose arguments are all looked at here, before anything is done."""
    check_types(tasks, args, ewc_config, sequence_config)
    boolean("mask_training", mask_training)
    boolean("evaluate_unseen", evaluate_unseen)
    check_trainer_arguments(trainer_class, trainer_kwargs, "run_tasks")
    sequence = sequence_config or SequenceConfig()
    check_evaluated(evaluate_also, tasks, data_collator)
    check_calls(
        data_collator=data_collator,
        log_likelihood=log_likelihood,
        after_task=after_task,
        processing_class=trainer_kwargs.get("processing_class"),
    )
    check_optimizers(tasks, trainer_kwargs.get("optimizers"))
    check_names([*tasks, *evaluate_also])
    check_data(tasks, data_collator)
    check_tasks(tasks, args, ewc_config, trainer_class, scenario)
    check_sequence(tasks, args, trainer_class, sequence, ewc_config)
    for task in (*tasks, *evaluate_also):
        check_score(task, task.compute_metrics or compute_metrics, args)
    plan = Plan(
        tasks=tuple(tasks),
        args=args,
        config=ewc_config,
        trainer_class=trainer_class,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
        mask_training=mask_training,
        evaluate_unseen=evaluate_unseen,
        evaluate_also=tuple(evaluate_also),
        scenario=scenario or guess_scenario([(t.train_dataset, t.classes) for t in tasks]),
        sequence=sequence,
        log_likelihood=log_likelihood,
        after_task=after_task,
        trainer_kwargs=trainer_kwargs,
    )
    check_search(plan)
    return plan
