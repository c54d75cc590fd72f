"""Models that mix examples in their order, as experts that take the first ones only."""

import warnings

import pytest
import torch
from torch import nn

from hf_ewc import estimate_fisher


class FirstComeFirstServed(nn.Module):
    """Two experts, chosen by the sign of a feature; each takes so many examples of a batch."""

    def __init__(self, capacity):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.capacity = capacity

    def forward(self, x, labels=None):
        chosen = (x[:, 0] > 0).long()
        places = torch.stack([(chosen == e).long().cumsum(0) for e in range(2)], 1)
        kept = places.gather(1, chosen[:, None])[:, 0] <= self.capacity
        both = torch.stack([expert(x) for expert in self.experts], 1)
        own = both[torch.arange(len(x)), chosen]
        logits = self.head(torch.where(kept[:, None], own, torch.zeros_like(own)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Running(FirstComeFirstServed):
    """Adds to each example a share of those before it."""

    def forward(self, x, labels=None):
        return super().forward(x + 0.1 * (x.cumsum(0) - x), labels)


def data(number=16):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(number)
    ]


def single_examples(model, rows):
    model = model.double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        loss = model(row["x"][None].double(), row["labels"][None])["loss"]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for value, gradient in zip(total.values(), gradients, strict=True):
            value += gradient**2 / len(rows)
    return total


@pytest.mark.parametrize(
    "make", [lambda: FirstComeFirstServed(1), lambda: FirstComeFirstServed(2), lambda: Running(99)]
)
@pytest.mark.parametrize("size", [4, 8])
def test_examples_that_depend_on_those_before_them_are_run_alone(make, size):
    with pytest.warns(UserWarning, match="one by one"):
        found = estimate_fisher(make(), data(), fisher_type="empirical", batch_size=size)
    for name, expected in single_examples(make(), data()).items():
        torch.testing.assert_close(found.diagonal[name].double(), expected, rtol=1e-4, atol=1e-9)


def test_room_enough_for_all_is_no_mixing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_fisher(
            FirstComeFirstServed(99), data(), fisher_type="empirical", batch_size=8
        )
    for name, expected in single_examples(FirstComeFirstServed(99), data()).items():
        torch.testing.assert_close(found.diagonal[name].double(), expected, rtol=1e-4, atol=1e-9)
