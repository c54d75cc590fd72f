"""Scores of language models per labelled token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ewc.fisher.likelihood.label_shift import shifts_labels
from hf_ewc.parameters.names import unwrap


def is_causal(model: nn.Module) -> bool:
    """Whether a model is a causal language model by its class: position t predicts label t + 1."""
    plain: Any = unwrap(model)
    base: nn.Module = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    known = type(base).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return bool(known or shifts_labels(base))


class TokenScores:
    """A `compute_metrics` for language models: perplexity and, where asked, accuracy.

    perplexity = exp(−(1/N) Σ log p(token)) over all N labelled tokens of the evaluation data. The
    `loss` that a Trainer reports is something else: a mean over batches, in which some models
    divide by the first token of each sequence as well, which nothing predicts.

    Args:
        shifted: whether position t predicts label t + 1, as in a causal language model.
        with_accuracy: whether the share of tokens that have the highest logit is given, too.
    """

    __qualname__ = "TokenScores"

    def __init__(self, shifted: bool, with_accuracy: bool) -> None:
        self.shifted, self.with_accuracy = shifted, with_accuracy

    def sums(self, logits: Any, labels: Tensor) -> Tensor:
        """Σ −log p, tokens predicted, and labelled tokens, by row: (B, 3), fp32.

        It stands as `preprocess_logits_for_metrics`, so that no logits are kept beyond a batch.
        """
        outputs = logits[0] if isinstance(logits, (tuple, list)) else logits
        if outputs.ndim != 3 or outputs.shape[:2] != labels.shape:
            raise ValueError(
                f"perplexity needs one label for each position; labels have the shape "
                f"{tuple(labels.shape)}, outputs {tuple(outputs.shape)}. Give the tasks "
                "metric='loss', or compute_metrics= and the metric= that is the score."
            )
        if self.shifted:
            outputs, labels = outputs[:, :-1], labels[:, 1:]
        return torch.stack([_of_row(*row) for row in zip(outputs, labels, strict=True)])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The figures, from rows of `sums` or, where these were not taken, from logits."""
        found: Any = prediction.predictions
        found = np.asarray(found[0] if isinstance(found, tuple) else found)
        if found.ndim == 3:
            labels = torch.as_tensor(np.asarray(prediction.label_ids))
            found = self.sums(torch.as_tensor(found), labels).numpy()
        loss, hits, tokens = found.astype(np.float64).sum(0)
        if not tokens:
            raise ValueError("the evaluation data has no labels; it needs some that are not -100.")
        mean = loss / tokens
        figures = {"perplexity": math.exp(mean) if mean < 700 else math.inf}
        return figures | ({"accuracy": hits / tokens} if self.with_accuracy else {})


def _of_row(logits: Tensor, labels: Tensor) -> Tensor:
    counted = labels != -100
    kept, wanted = logits[counted].float(), labels[counted]
    loss = torch.nn.functional.cross_entropy(kept, wanted, reduction="sum")
    hits = (kept.argmax(-1) == wanted).sum()
    return torch.stack([loss, hits.float(), counted.sum().float()])
