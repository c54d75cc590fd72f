"""What reaches a model of the batches of a trainer that computes its loss in a way of its own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy
from torch import Tensor, arange, nn, set_grad_enabled
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_ewc.fisher.labels import LABEL_NAMES, are_there, label_name
from hf_ewc.fisher.likelihood.made_up_labels import made_up
from hf_ewc.fisher.likelihood.own_loss import StatedLoss
from hf_ewc.training.data_path import Collator
from hf_ewc.training.repeatable import copied, evaluated_as_if_not_run

logger = logging.getLogger("hf_ewc")

# On so many examples a loss is looked at, with their own labels and with others.
_EXAMPLES, _TURNS = 4, 3
_LOOKED_THROUGH = 64
# Options of a forward that say what it returns, not what it computes.
_OF_OUTPUTS = frozenset(
    {"return_dict", "output_attentions", "output_hidden_states", "use_cache", "num_items_in_batch"}
)


@dataclass(frozen=True)
class HandedOver:
    """Makes of a batch what reaches the model's forward, by the names that it has there.

    Args:
        names: the batch's name of each tensor that does, by its name there; None: not known.
        options: what else the forward is called with.
        taken: the names of all that it takes; None: anything.
        labels: the batch's name of its labels, where it is none of those that are known.
    """

    names: Mapping[str, str] | None = None
    options: Mapping[str, Any] | None = None
    taken: frozenset[str] | None = None
    labels: str | None = None

    def __call__(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return batch
        if self.labels in batch and not any(name in batch for name in LABEL_NAMES):
            batch = {"labels" if name == self.labels else name: v for name, v in batch.items()}
        labels = {name: value for name, value in batch.items() if "label" in name}
        labels |= {name: batch[name] for name in LABEL_NAMES if name in batch}
        if self.names is not None:
            given = {there: batch[here] for there, here in self.names.items() if here in batch}
            return {**labels, **given, **(self.options or {})}
        taken = self.taken
        return {name: v for name, v in batch.items() if taken is None or name in taken | {*labels}}

    def of(self, collator: Collator) -> Collator:
        return lambda examples: self(collator(examples))


def handed_over(
    trainer: Trainer, model: nn.Module, data: Any, collator: Collator, own_loss: bool
) -> HandedOver:
    """What reaches the model's forward, as the trainer's loss hands it on.

    A `compute_loss` of the user's own may take columns out, such as weights of the examples, or
    hand them on by other names: so it is run once, on the first examples, and what it hands to the
    forward is looked at. Elsewhere what the forward does not take is left out.
    """
    nothing_seen = HandedOver(taken=_arguments(model), labels=_own_name_of_labels(trainer))
    calls = _calls(trainer, model, data, collator) if own_loss else None
    if calls is None:
        return nothing_seen
    batch, seen = calls
    here = {id(value): name for name, value in batch.items() if isinstance(value, Tensor)}
    known = [(call, names) for call in seen if (names := _names_in(call, here))]
    if not known:
        return nothing_seen
    # Of several forwards, as one on data without labels, that of most columns by their own names.
    call, names = max(known, key=lambda pair: sum(there == own for there, own in pair[1].items()))
    return replace(nothing_seen, names=names, options=_options(model, call))


def _own_name_of_labels(trainer: Trainer) -> str | None:
    """The one that `TrainingArguments.label_names` gives them, if it is none that is known."""
    given = trainer.args.label_names or []
    return given[0] if len(given) == 1 and given[0] not in LABEL_NAMES else None


def stated_losses(
    trainer: Trainer, model: nn.Module, data: Any, collator: Collator, reaches: HandedOver
) -> list[StatedLoss]:
    """What the trainer's loss comes to on a few examples, with their labels and with others.

    None where there are no labels by a name that is known, and where it fails, which is said.
    """
    if (examples := _few_of(data)) is None:
        return []
    with contextlib.suppress(Exception):
        batch = trainer._prepare_inputs(collator(examples))
        name = label_name(batch) or reaches.labels
        if name in batch:
            return _stated(trainer, model, batch, name, reaches)
    return []


def _stated(
    trainer: Trainer, model: nn.Module, batch: Any, name: str, reaches: HandedOver
) -> list[StatedLoss]:
    """With any class in place of the labels, also one that a loss masks; or, where it fails, with
    those that the batch has; at last with gradients, which an adversarial term takes."""
    number = getattr(model.config, "num_labels", None) if hasattr(model, "config") else None
    every = None if number is None else arange(number)
    why: Exception | None = None
    for classes, graph in ((every, False), (None, False), (None, True)):
        try:
            with evaluated_as_if_not_run(trainer, model), set_grad_enabled(graph):
                return [
                    _stated_in(trainer, model, batch, name, reaches, classes, turn)
                    for turn in range(_TURNS)
                ]
        except Exception as error:
            why = error
    if trainer.is_world_process_zero():
        logger.warning(
            "The trainer's own loss cannot be looked at outside of training (%s: %.200s): what "
            "the model's outputs mean is read without it. Where that loss is none of the model's "
            "own, pass log_likelihood= a function of (model, batch) that returns log p(y|x) of "
            "each example, shape (batch,).",
            type(why).__name__,
            why,
        )
    return []


def _stated_in(
    trainer: Trainer,
    model: nn.Module,
    batch: Any,
    name: str,
    reaches: HandedOver,
    classes: Tensor | None,
    turn: int,
) -> StatedLoss:
    """The loss in this turn: of the true labels in the first, of made-up ones in the others."""
    given = copied(batch)
    if turn:
        labels = batch[name]
        fits = classes is not None and not labels.is_floating_point() and labels.dim() == 1
        given[name] = made_up(labels, classes if fits else None, turn, holes=False)
    number = int(are_there(given[name]).sum())
    reached = reaches(given)
    own = {id(value) for value in reached.values()}
    kept_back = tuple(n for n, v in given.items() if isinstance(v, Tensor) and id(v) not in own)
    return StatedLoss(reached, _loss(trainer, model, given, number), kept_back)


def _loss(trainer: Trainer, model: nn.Module, inputs: Any, labels: int) -> Tensor:
    """Without the number of labels, as in evaluation, or with it where the loss needs it."""
    compute: Any = trainer.compute_loss
    try:
        loss: Tensor = compute(model, copied(inputs))
    except TypeError:
        loss = compute(model, copied(inputs), num_items_in_batch=labels)
    return loss.detach().mean()


def _few_of(data: Any) -> list[Any] | None:
    """A few examples from all along the data, of texts the shortest among them.

    Of a stream the first ones. Padding that a loss leaves out shows in a batch of texts that are
    not as long as each other.
    """
    if isinstance(data, (IterableDataset, datasets.IterableDataset)):
        return list(itertools.islice(data, _EXAMPLES)) or None
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return None
    few = [data[i] for i in _spread(len(data), _EXAMPLES)]
    if not isinstance(few[0], Mapping) or "input_ids" not in few[0]:
        return few
    more = few + [data[i] for i in _spread(len(data), _LOOKED_THROUGH)]
    return sorted([*few[1:], min(more, key=_length)], key=_length, reverse=True)


def _spread(size: int, number: int) -> list[int]:
    """At most so many places, from the first to the last, as far from each other as can be."""
    number = min(size, number)
    return [i * (size - 1) // max(number - 1, 1) for i in range(number)]


def _length(example: Mapping[str, Any]) -> int:
    tokens = numpy.asarray(example["input_ids"])
    return int(
        numpy.count_nonzero(example.get("attention_mask", tokens))
    )  # 0 is most often padding


def _arguments(model: nn.Module) -> frozenset[str] | None:
    """The names of what the forward takes; None for anything."""
    parameters = _signature(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    get_base: Any = getattr(model, "get_base_model", None)  # of a PEFT model
    return inspect.signature((get_base() if callable(get_base) else model).forward).parameters


def _calls(
    trainer: Trainer, model: nn.Module, data: Any, collator: Collator
) -> tuple[Mapping[str, Any], list[dict[str, Any]]] | None:
    """A batch, and what each forward on it is called with; None where the loss fails."""
    if (examples := _few_of(data)) is None:
        return None
    calls: list[dict[str, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positional = zip(inspect.signature(module.forward).parameters, args, strict=False)
        calls.append({**dict(positional), **kwargs})

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with evaluated_as_if_not_run(trainer, model):
            batch = trainer._prepare_inputs(collator(examples))
            trainer.compute_loss(model, copy.copy(batch))
    except Exception:
        return None  # the estimate itself says what is wrong
    finally:
        handle.remove()
    return batch, calls


def _names_in(call: Mapping[str, Any], here: Mapping[int, str]) -> dict[str, str] | None:
    """The batch's names of the tensors of a call; None where some are not the batch's."""
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    if any(id(value) not in here for value in tensors.values()):
        return None
    return {name: here[id(value)] for name, value in tensors.items()}


def _options(model: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a call says beside tensors that the forward would not take by itself."""
    signature = _signature(model)
    return {
        name: value
        for name, value in call.items()
        if isinstance(value, (bool, int, float, str))
        and name in signature
        and name not in _OF_OUTPUTS
        and value != signature[name].default
    }
