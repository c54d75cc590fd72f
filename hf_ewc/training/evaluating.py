"""An evaluation by a Trainer of the data that it is given, which leaves its model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_ewc.parameters.names import unwrap


@contextmanager
def all_of_its_own_data(trainer: Any) -> Iterator[None]:
    """Inside the block the trainer evaluates on all of the data set that it is given.

    A Trainer keeps the loader of its first evaluation for any other data where workers persist,
    leaves the last examples out with `dataloader_drop_last`, and casts its model to half precision
    for good with `fp16_full_eval` and `bf16_full_eval`.
    """
    args, drops = trainer.args, trainer.args.dataloader_drop_last
    in_half = (args.fp16_full_eval or args.bf16_full_eval) and not trainer.is_in_train
    kept = _Values(unwrap(trainer.model)) if in_half else None
    loaders = vars(trainer).pop("_eval_dataloaders", None)
    args.dataloader_drop_last = False
    try:
        yield
    finally:
        args.dataloader_drop_last = drops
        vars(trainer).pop("_eval_dataloaders", None)
        if loaders is not None:
            trainer._eval_dataloaders = loaders
        if kept is not None:
            kept.put_back()


class _Values:
    """The tensors of a model as they are now, held, not copied."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(p, p.data) for p in model.parameters()]
        self._buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items()]

    def put_back(self) -> None:
        for parameter, value in self._parameters:
            if parameter.dtype != value.dtype:
                parameter.data = value
        for module, name, buffer in self._buffers:
            if buffer is not None:
                module._buffers[name] = buffer
