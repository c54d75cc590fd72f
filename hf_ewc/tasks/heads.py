"""A head of its own for each task: other sizes, other problem types, over one backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ewc.parameters.adapters import base_model
from hf_ewc.parameters.names import class_name, unwrap
from hf_ewc.tasks.head import backbone_of

PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
FILE = "heads.safetensors"
OTHERS = "other_heads"  # where heads that are not in place are kept while all of them train


@dataclass(frozen=True)
class Head:
    """What a task's own head is.

    Args:
        num_labels: its outputs.
        problem_type: "regression", "single_label_classification" or "multi_label_classification";
            None leaves it to the model, which looks at the labels.
        model_class: of a model with the same backbone, such as `BertForTokenClassification`; None
            is the class of the model itself.
        name: tasks that name the same head share it; by default it is the task's alone.
        protected: whether EWC holds it, too, where it is trained again.
    """

    num_labels: int
    problem_type: str | None = None
    model_class: type[PreTrainedModel] | None = None
    name: str | None = None
    protected: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.num_labels, bool) or not isinstance(self.num_labels, int):
            raise TypeError(f"num_labels of a head is {self.num_labels!r}; needed is an integer.")
        if self.num_labels < 1:
            raise ValueError(f"num_labels of a head is {self.num_labels}; allowed is at least 1.")
        if self.problem_type not in PROBLEMS:
            raise ValueError(
                f"problem_type of a head is {self.problem_type!r}; allowed are "
                f"{', '.join(map(repr, PROBLEMS))}."
            )


def as_head(given: Any) -> Head | None:
    """A head from a number of labels, a dict of `Head`'s arguments, or a `Head`."""
    if given is None or isinstance(given, Head):
        return given
    if isinstance(given, Mapping):
        return Head(**given)
    if isinstance(given, int) and not isinstance(given, bool):
        return Head(given)
    raise TypeError(
        f"head is {given!r:.60}; give a number of labels, a hf_ewc.tasks.Head, or a dict such as "
        "{'num_labels': 1, 'problem_type': 'regression'}."
    )


@dataclass
class _Fitted:
    """A head as it is put into the model: its modules by name, and what the model is with it."""

    model_class: type[nn.Module]
    config: Any
    modules: dict[str, nn.Module]
    attributes: dict[str, Any]


class Heads:
    """Heads over one backbone, of which one at a time is in place.

    The model keeps being the same object: its head's modules, its configuration and, where a head
    needs another forward, its class are exchanged. Under a PEFT adapter the copies in
    `modules_to_save` are.

    Args:
        model: with the head that it came with, which is for the tasks that have none of their own.
        heads: by key.
        seed: of their first weights.

    Raises:
        ValueError: the model is no `PreTrainedModel` with a backbone, or its head cannot be
            exchanged.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, Head], seed: int) -> None:
        inner = base_model(model)
        if backbone_of(model) is None or not isinstance(inner, PreTrainedModel):
            raise ValueError(
                f"{class_name(model)} has no backbone apart from its head; head= needs a "
                "transformers model such as AutoModelForSequenceClassification makes."
            )
        self._model, self._inner = model, inner
        self._heads: dict[str | None, _Fitted] = {None: _found_in(inner)}
        for i, (key, head) in enumerate(heads.items()):
            with torch.random.fork_rng():
                torch.manual_seed(seed + i)
                self._heads[key] = _made(inner, head, self._heads[None])
        self._in_place: str | None = None
        self._beginning = {name: t.detach().clone() for name, t in self._tensors().items()}

    def begin_again(self) -> None:
        """Put the head that the model came with in place, and all heads back to first weights."""
        self.put(None)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(self._beginning[name])

    def put(self, key: str | None) -> None:
        """Let this be the model's head from now on."""
        if key == self._in_place:
            return
        inner, old, new = self._inner, self._heads[self._in_place], self._heads[key]
        device = next(inner.parameters()).device
        for name in old.modules:
            _Slot(inner, name).empty()
        for name, module in new.modules.items():
            module.to(device).train(inner.training)
            _Slot(inner, name).fill(module)
        inner.__class__ = new.model_class  # type: ignore[assignment]
        inner.config = new.config
        for name, value in new.attributes.items():
            setattr(inner, name, value)
        self._in_place = key

    @contextmanager
    def only(self, key: str | None) -> Iterator[None]:
        """With this head in place inside the block."""
        before = self._in_place
        self.put(key)
        try:
            yield
        finally:
            self.put(before)

    def names_in_place(self) -> set[str]:
        """The names of the present head's parameters in the model."""
        own = {
            id(p)
            for module in self._heads[self._in_place].modules.values()
            for p in module.parameters()
        }
        return {name for name, p in unwrap(self._model).named_parameters() if id(p) in own}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """With the head in place requiring no gradient inside the block."""
        modules = self._heads[self._in_place].modules.values()
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def all_registered(self) -> Iterator[None]:
        """Inside the block the model holds the parameters of all heads, so that all are trained."""
        others = nn.ModuleDict(
            {
                str(i): nn.ModuleDict(head.modules)
                for i, (key, head) in enumerate(self._heads.items())
                if key != self._in_place
            }
        )
        self._inner.add_module(OTHERS, others)
        try:
            yield
        finally:
            self._inner._modules.pop(OTHERS, None)

    @contextmanager
    def unregistered(self) -> Iterator[None]:
        """Inside the block the model holds the head in place alone, as it is saved."""
        others = self._inner._modules.pop(OTHERS, None)
        try:
            yield
        finally:
            if others is not None:
                self._inner._modules[OTHERS] = others

    def save(self, folder: Path) -> None:
        """Write the weights of all heads beside the model."""
        tensors = {name: t.detach().contiguous().clone() for name, t in self._tensors().items()}
        save_file(tensors, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote.

        Raises:
            ValueError: the file is not there or damaged, or is of other heads.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{path} is not there; it has the heads of all tasks.")
        try:
            stored, own = load_file(path), self._tensors()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error!s:.200}") from error
        if any(name not in own or own[name].shape != t.shape for name, t in stored.items()):
            raise ValueError(f"{path} has the weights of other heads than these tasks'.")
        with torch.no_grad():
            for name, tensor in stored.items():  # those of further tasks have theirs already
                own[name].copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}.{inside}": tensor
            for i, head in enumerate(self._heads.values())
            for name, module in head.modules.items()
            for inside, tensor in module.state_dict(keep_vars=True).items()
        }


class _Slot:
    """The place of one module of the head: a child of the model, or PEFT's trained copy of it."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        child = inner._modules.get(name)
        copies = getattr(child, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            active: Any = getattr(child, "active_adapter", "default")
            name = active if isinstance(active, str) else active[0]
        self._is_copy = isinstance(copies, nn.ModuleDict)
        self._owner: Any = copies if self._is_copy else inner
        self._name = name

    @property
    def module(self) -> nn.Module:
        found: nn.Module = self._owner._modules[self._name]
        return found

    def empty(self) -> None:
        if not self._is_copy:  # PEFT's wrapper stays, and is filled again
            del self._owner._modules[self._name]

    def fill(self, module: nn.Module) -> None:
        self._owner._modules[self._name] = module


def _found_in(inner: nn.Module) -> _Fitted:
    modules = {name: _Slot(inner, name).module for name in _head_children(inner)}
    return _Fitted(type(inner), inner.config, modules, _attributes(inner))


def _made(inner: PreTrainedModel, head: Head, first: _Fitted) -> _Fitted:
    """A new head: built without memory inside a model of its class, then given values."""
    config = copy.deepcopy(first.config)
    config.num_labels = head.num_labels
    config.problem_type = head.problem_type
    model_class: Any = head.model_class or first.model_class
    prefix = inner.base_model_prefix
    if getattr(model_class, "base_model_prefix", None) != prefix:
        raise ValueError(
            f"a head of {model_class.__name__} does not fit {class_name(inner)}: their backbones "
            "differ."
        )
    with torch.device("meta"):
        empty = model_class(config)
    modules = {name: empty._modules[name] for name in _head_children(empty)}
    wrapped = {n for n in first.modules if hasattr(inner._modules[n], "modules_to_save")}
    if wrapped and (model_class is not first.model_class or modules.keys() != first.modules.keys()):
        raise ValueError(
            f"under a PEFT adapter a head of another class ({model_class.__name__}) cannot be put "
            "into the model; give the tasks heads of its own class."
        )
    like = next(inner.parameters())
    for module in modules.values():
        module.to_empty(device=like.device).to(like.dtype)
        module.apply(empty._init_weights)
    return _Fitted(model_class, config, modules, _attributes(empty))


def _head_children(model: nn.Module) -> list[str]:
    backbone = str(getattr(model, "base_model_prefix", ""))
    return [name for name in model._modules if name not in (backbone, OTHERS)]


def _attributes(model: nn.Module) -> dict[str, Any]:
    """What a model's class sets in its construction, such as `num_labels`."""
    return {
        name: value
        for name, value in vars(model).items()
        if not name.startswith("_") and name not in ("training", "config", "call_super_init")
    }


def heads_of(tasks: Sequence[Any]) -> dict[str, Head]:
    """The heads that tasks ask for, by key.

    Raises:
        ValueError: two tasks name the same head and describe it differently.
    """
    found: dict[str, Head] = {}
    for task in tasks:
        head = as_head(task.head)
        if head is None:
            continue
        key = head.name or task.name
        if found.setdefault(key, head) != head:
            raise ValueError(
                f"the head {key!r} of task {task.name!r} is {head}, of an earlier one {found[key]}."
            )
    return found


def key_of(task: Any) -> str | None:
    """Which head a task has: None is the one that the model came with."""
    head = as_head(task.head)
    return None if head is None else head.name or str(task.name)
