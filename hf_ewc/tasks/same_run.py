"""Whether a run over tasks may go on from the results of an earlier one."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_ewc.config import EWCConfig
from hf_ewc.parameters.names import class_name
from hf_ewc.parameters.sharding import whole_shape
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks.arguments import own_arguments
from hf_ewc.tasks.evaluation import metrics_of
from hf_ewc.tasks.fingerprints import of_data, of_model, of_training, of_weights
from hf_ewc.tasks.heads import Head, as_head
from hf_ewc.tasks.plan import Plan
from hf_ewc.tasks.sequence_config import OF_THE_GATE
from hf_ewc.tasks.task import Task

logger = logging.getLogger("hf_ewc")

# The training arguments that a run must share with the one it goes on from.
RECORDED = (
    "seed",
    "data_seed",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "lr_scheduler_kwargs",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "dataloader_drop_last",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "train_sampling_strategy",
    "average_tokens_across_devices",
    "optim_target_modules",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "bf16_full_eval",
    "fp16_full_eval",
    "accelerator_config",
)
_ROUNDING = 1e-3

ADAPTER = "peft_config"
# Arguments of the trainer that change what is learnt.
GIVEN = (
    *(ADAPTER, "optimizer_cls_and_kwargs", "compute_loss_func"),
    *("formatting_func", "preprocess_logits_for_metrics"),
)
# Of an adapter's configuration: not what it does, but where it is from.
_ORIGIN = ("peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")

# A run that stopped at the gate may go on with another; what is measured beside changes nothing.
FREE = (*OF_THE_GATE, "kl_examples")


def settings_of(plan: Plan, model: nn.Module, state: EWCState | None = None) -> dict[str, Any]:
    """What has to be the same for one run to go on from another, in JSON's types.

    Args:
        model, state: as they are before the first task.
    """
    settings = {
        "state": [] if state is None else [[r.name, r.fisher_trace] for r in state.tasks],
        "looks": _looks(plan, model),
        "trainer": plan.trainer_class.__name__,
        "model": [class_name(model), sum(whole_shape(p).numel() for p in model.parameters())],
        "tasks": [_settings_of_task(task, plan, model) for task in plan.tasks],
        "mask_training": plan.mask_training,
        "evaluate_unseen": plan.evaluate_unseen,
        "evaluate_also": [_settings_of_task(task, plan, model) for task in plan.evaluate_also],
        "ewc_config": None if plan.config is None else asdict(plan.config),
        "sequence_config": {
            name: value for name, value in plan.sequence.changes().items() if name not in FREE
        },
        "args": {name: getattr(plan.args, name, None) for name in RECORDED},
        "own_args": _own_fields(plan.args),
        "given": {
            **{name: _described(plan.trainer_kwargs.get(name)) for name in GIVEN},
            "data_collator": _described(plan.data_collator),
            "log_likelihood": _described(plan.log_likelihood),
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _own_fields(args: TrainingArguments) -> dict[str, Any]:
    """What a trainer's own kind of arguments has beyond the Trainer's, such as TRL's."""
    common = {field.name for field in fields(TrainingArguments)}
    return {f.name: _described(getattr(args, f.name)) for f in fields(args) if f.name not in common}


def _described(value: Any) -> Any:
    """What can be compared of an object: numbers and words, a configuration, a name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "to_dict"):  # an adapter's
        found = {name: _described(own) for name, own in value.to_dict().items()}
        return {name: own for name, own in found.items() if name not in _ORIGIN}
    if isinstance(value, Mapping):
        return {str(name): _described(own) for name, own in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_described(own) for own in value]
    return qualified_name(value) or type(value).__qualname__


def _settings_of(given: Any) -> Any:
    """The numbers and words that a function or a collator was made with."""
    if isinstance(given, functools.partial):
        found = {str(i): value for i, value in enumerate(given.args)} | given.keywords
    else:
        found = dict(getattr(given, "__dict__", {}))
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    }


def _looks(plan: Plan, model: nn.Module) -> dict[str, Any]:
    """What may be another without being refused, but not without a word."""
    return {
        "model": of_model(model),
        "training": of_training(model),
        "weights": of_weights(model),
        "name": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "examples": {
            task.name: [
                of_data(d) for d in (task.train_dataset, task.eval_dataset, task.fisher_dataset)
            ]
            for task in (*plan.tasks, *plan.evaluate_also)
        },
        "settings": {
            "compute_loss_func": _settings_of(plan.trainer_kwargs.get("compute_loss_func")),
            "data_collator": _settings_of(plan.data_collator),
            "log_likelihood": _settings_of(plan.log_likelihood),
        },
        "callbacks": [_class_of(each) for each in plan.trainer_kwargs.get("callbacks") or ()],
        "processing_class": _look_of_processor(plan.trainer_kwargs.get("processing_class")),
        "processes": plan.args.world_size,
    }


def _look_of_processor(given: Any) -> list[Any] | None:
    """The class of a tokenizer or a processor, where it is from, and how many words it knows."""
    if given is None:
        return None
    return [_class_of(given), str(getattr(given, "name_or_path", "")), length(given)]


def _class_of(given: Any) -> str:
    """The name of a class, or of the class of an object."""
    return (given if isinstance(given, type) else type(given)).__qualname__


def _settings_of_task(task: Task, plan: Plan, model: nn.Module) -> dict[str, Any]:
    return {
        "name": task.name,
        "classes": None if task.classes is None else [int(c) for c in task.classes],
        "metric": task.metric,
        "compute_metrics": qualified_name(metrics_of(task, plan, model)),
        "examples": [length(task.train_dataset), length(task.eval_dataset)],
        "training_args": own_arguments(task, plan.args),
        "weight": task.weight,
        "head": _settings_of_head(as_head(task.head)),
        "fisher_examples": length(task.fisher_dataset),
        "lower_is_better": task.lower_is_better,
        "data_collator": _described(task.data_collator),
    }


def _settings_of_head(head: Head | None) -> dict[str, Any] | None:
    if head is None:
        return None
    return {**vars(head), "model_class": qualified_name(head.model_class)}


def qualified_name(metrics: Any) -> str | None:
    """The name of a function, also inside a `functools.partial`."""
    metrics = getattr(metrics, "func", metrics)
    return getattr(metrics, "__qualname__", None)


def length(dataset: Any) -> int | None:
    """How many examples a data set has; None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def check_same_run(
    path: Path, found: Any, wanted: Mapping[str, Any], from_the_model: bool = False
) -> None:
    """Refuse to go on from a run with other settings; further tasks are welcome.

    Settings of EWC that there were not yet when the run was begun are as they are untouched, and
    training arguments that were not recorded yet as they are now. The size of the Fisher's batches
    may be another where it changes no result.

    Args:
        from_the_model: whether what is to be learnt begins from the model's weights as they are.
    """
    found = dict(found) if isinstance(found, Mapping) else {}
    if isinstance(found.get("ewc_config"), Mapping):
        found["ewc_config"] = asdict(EWCConfig()) | dict(found["ewc_config"])
    if isinstance(found.get("args"), Mapping):
        found["args"] = wanted["args"] | dict(found["args"])
    found["own_args"] = _of_both(found.get("own_args", {}), wanted.get("own_args"))
    found["given"] = _of_both(found.get("given", {}), wanted.get("given"))
    # Not recorded by earlier versions; of the same state when its last digits alone are others.
    if "state" not in found or _is_same_state(found["state"], wanted.get("state")):
        found["state"] = wanted.get("state")
    looks = dict(wanted.get("looks", {}))
    if not from_the_model:
        looks.pop("weights", None)
    _warn_of_other_looks(path, found.pop("looks", {}), looks)
    wanted = {name: value for name, value in wanted.items() if name != "looks"}
    before = found.get("tasks") or []
    wanted = {**wanted, "tasks": wanted["tasks"][: len(before)]}
    for key in ("tasks", "evaluate_also"):
        found[key] = _with_new_settings(found.get(key), wanted.get(key, []))
    found, wanted = _decisive(found), _decisive(wanted)
    lines = [line for key in wanted for line in differences(key, found.get(key), wanted[key])]
    if lines:
        raise ValueError(
            f"{path} is of a run with other settings:\n"
            + ";\n".join(lines)
            + ".\nChoose another output_dir, or begin anew with resume=False (--resume false)."
        )


def _of_both(found: Any, wanted: Any) -> Any:
    """The entries that are wanted, as they were found; other versions, and PEFT's, had others."""
    if not isinstance(wanted, Mapping) or not isinstance(found, Mapping):
        return found
    known = {name: found.get(name, own) for name, own in wanted.items()}
    if ADAPTER in known:
        known[ADAPTER] = _of_both(known[ADAPTER], wanted[ADAPTER])
    return known


def _with_new_settings(found: Any, wanted: Sequence[Mapping[str, Any]]) -> Any:
    """The tasks' settings, those that earlier versions did not record as they are now."""
    if not isinstance(found, list) or len(found) != len(wanted):
        return found
    pairs = zip(found, wanted, strict=True)
    new = ("lower_is_better", "data_collator")
    return [{name: own[name] for name in new} | dict(task) for task, own in pairs]


def _is_same_state(found: Any, wanted: Any) -> bool:
    """Whether the tasks have the same names and, up to rounding, traces of the Fisher.

    One that is estimated anew has other last digits on another number of processes, or a GPU.
    """
    try:
        pairs = [*zip(found, wanted, strict=True)]
        return all(a[0] == b[0] and _is_close(a[1], b[1]) for a, b in pairs)
    except (TypeError, ValueError, IndexError):
        return False


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_ROUNDING)


def _warn_of_other_looks(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Say what differs although its name and size are the same: another order, other contents."""
    found = found if isinstance(found, Mapping) else {}
    before = found.get("examples") or {}
    others = [
        f"the {kind} data of task {name!r}"
        for name, looks in wanted.get("examples", {}).items()
        for kind, was, is_now in zip(
            ("training", "evaluation", "Fisher's"), before.get(name, looks), looks, strict=False
        )
        if None not in (was, is_now) and was != is_now
    ]
    now = wanted.get("model")
    others += ["the model's modules"] * (found.get("model", now) != now)
    for key, what in (
        ("training", "the model's configuration, dtypes or which of its parameters are trained"),
        ("weights", "the model's weights"),
        ("settings", "the settings of the data collator, loss function or likelihood"),
        ("callbacks", "the callbacks"),
        ("processing_class", "the processing_class"),
        ("processes", "the number of processes, by which a step's examples grow"),
    ):
        own = wanted.get(key)
        others += [what] * (own not in (None, found.get(key, own)))
    was, name = found.get("name"), wanted.get("name")
    others += [f"the model {was} (now {name})"] * (None not in (was, name) and was != name)
    if others:
        logger.warning(
            "%s was begun with others than these: %s. What was learnt and scored before stays as "
            "it is. To have it of these, choose another output_dir, or begin anew with "
            "resume=False.",
            path.parent,
            ", ".join(others),
        )


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the settings of EWC that change nothing of what a run comes to."""
    ewc = settings.get("ewc_config")
    if not isinstance(ewc, Mapping):
        return dict(settings)
    free = ["ewc_anchor"]
    if ewc.get("fisher_type") != "batched":
        free.append("fisher_batch_size")
    kept = {name: value for name, value in ewc.items() if name not in free}
    return {**settings, "ewc_config": kept}


def differences(key: str, found: Any, wanted: Any) -> list[str]:
    """One line for each entry that is not the same."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = dict.fromkeys((*found, *wanted))
        return [
            line
            for name in names
            for line in differences(f"{key}.{name}", found.get(name), wanted.get(name))
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for i, (f, w) in pairs for line in differences(f"{key}[{i}]", f, w)]
    return [] if found == wanted else [f"  {key}: {found} there, {wanted} now"]
