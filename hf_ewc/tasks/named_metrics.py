"""Metrics by the names that `evaluate.load` knows, for tasks of classification and regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction

Metrics = Callable[[EvalPrediction], dict[str, float]]


class NamedMetrics:
    """A `compute_metrics` that asks modules of `evaluate`.

    Predictions are the classes of the highest logits; yes or no for each output where labels are 0
    and 1 for each; the outputs themselves where labels are other real numbers, or where they are
    classes already. Labels of -100 do not count.

    Args:
        names: as `evaluate.load` takes them: of the Hub, cached ones, or paths of scripts.
        shifted: whether position t predicts label t + 1, as in a causal language model.
        beside: further metrics, whose figures come first.

    Raises:
        ValueError: a name that `evaluate.load` does not find.
    """

    def __init__(
        self, names: str | Sequence[str], shifted: bool = False, beside: Metrics | None = None
    ) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.modules = [_loaded(name) for name in self.names]
        self.shifted, self.beside = shifted, beside
        # What a run records of its metrics.
        self.__qualname__ = f"evaluate: {', '.join(self.names)}"

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The figures of all modules, by the names that these give them."""
        found = dict(self.beside(prediction)) if self.beside is not None else {}
        predictions, references = decided(prediction, self.shifted)
        for name, module in zip(self.names, self.modules, strict=True):
            try:
                found |= module.compute(predictions=predictions, references=references)
            except Exception as error:
                raise ValueError(
                    f"compute_metrics {name!r} cannot be computed here ({error}); give a function "
                    "that calls it as it wants to be called."
                ) from error
        return found


def decided(prediction: EvalPrediction, shifted: bool = False) -> tuple[Any, Any]:
    """Predictions and references, of the same shape (N,), without what has the label -100."""
    outputs = prediction.predictions
    outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    labels = np.asarray(prediction.label_ids)
    if outputs.dtype.kind == "i" and outputs.shape == labels.shape:  # classes already
        if shifted:
            outputs, labels = outputs[:, :-1], labels[:, 1:]
        counted = labels != -100
        return outputs[counted], labels[counted]
    if labels.dtype.kind == "f" or outputs.shape == labels.shape:
        there = (labels != -100) & (labels == labels)  # which NaN is not
        outputs, labels = outputs.reshape(labels.shape)[there], labels[there]
        if there.ndim > 1 and there.shape[-1] > 1 and np.isin(labels, (0, 1)).all():
            return (outputs > 0).astype(np.int64), labels.astype(np.int64)
        return outputs, labels
    if labels.shape != outputs.shape[:-1]:
        raise ValueError(
            f"metrics by name need one label for each row of outputs; labels have the shape "
            f"{labels.shape}, outputs {outputs.shape}. Give compute_metrics as a function."
        )
    if shifted:
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    counted = labels != -100
    return outputs.argmax(-1)[counted], labels[counted]


@lru_cache
def _loaded(name: str) -> Any:
    """The module; kept in memory, so that processes do not share files of a cache."""
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        raise ValueError(
            f"compute_metrics names {name!r}, which evaluate.load does not load "
            f"({' '.join(str(error).split())}); give another name, a path, or a function."
        ) from error
