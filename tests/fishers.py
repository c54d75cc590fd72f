"""A classifier and its scores, for the tests of the Fisher."""

from __future__ import annotations

import torch
import transformers as t
from torch import nn


class Classifier(nn.Module):
    """Two layers on 4 features."""

    def __init__(self, outputs: int, problem_type: str | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, outputs)
        if problem_type:
            self.config = t.PretrainedConfig(problem_type=problem_type, num_labels=outputs)

    def forward(self, x, labels=None):
        return {"logits": self.head(torch.tanh(self.hidden(x)))}


def features(examples: int = 6) -> torch.Tensor:
    return torch.randn(examples, 4, generator=torch.Generator().manual_seed(5))


def squared_scores(model, values):
    """(∂ value / ∂θ)² for each of the scalars."""
    parameters = dict(model.named_parameters())
    for value in values:
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        yield {name: g**2 for name, g in zip(parameters, gradients, strict=True)}


def mean(terms, count):
    terms = list(terms)
    return {name: sum(term[name] for term in terms) / count for name in terms[0]}


class Tokens(nn.Module):
    """A class for each position of (batch, time, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        return {"logits": self.head(x)}
