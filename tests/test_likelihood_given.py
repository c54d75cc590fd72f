"""A `log_likelihood` of the user's: what it may do with a batch, and what it has to return."""

import warnings

import pytest
import torch
from torch import nn

from hf_ewc import estimate_fisher

MODEL = nn.Linear(3, 2).double()
DATA = [
    {"x": torch.randn(3, generator=torch.Generator().manual_seed(i)).double(), "y": i % 2}
    for i in range(8)
]


def good(model, batch):
    return model(batch["x"]).log_softmax(-1).gather(1, batch["y"][:, None])[:, 0]


def pops(model, batch):
    labels = batch.pop("y")
    return model(input=batch.pop("x")).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def replaces(model, batch):
    batch["x"] = 1.0 * batch["x"]
    batch["more"] = None
    return good(model, batch)


def by_single_examples():
    total = torch.zeros(2, 3, dtype=torch.float64)
    for row in DATA:
        log_p = MODEL(row["x"]).log_softmax(-1)[row["y"]]
        (gradient,) = torch.autograd.grad(log_p, [MODEL.weight])
        total += gradient**2 / len(DATA)
    return total


@pytest.mark.parametrize("given", [good, pops, replaces])
@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_may_be_taken_apart(given, size):
    found = estimate_fisher(MODEL, DATA, log_likelihood=given, batch_size=size)
    torch.testing.assert_close(
        found.diagonal["weight"].double(), by_single_examples(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.no_grad()(good), "no gradient leads back from"),
        (torch.inference_mode()(good), "no gradient leads back from"),
        (lambda m, b: good(m, b).detach(), "no gradient leads back from"),
        (lambda m, b: torch.tensor(good(m, b).tolist()), "no gradient leads back from"),
        (lambda m, b: m(b["x"]).argmax(-1), "int64.*no gradient leads back from"),
        (lambda m, b: list(good(m, b)), "returned a list"),
        (lambda m, b: None, "returned a NoneType"),
        (lambda m, b: (good(m, b),), "returned a tuple"),
        (lambda m, b: good(m, b).detach().numpy(), "returned a ndarray"),
        (lambda m, b: good(m, b).sum(), r"returned shape \(\)"),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_what_is_no_log_likelihood_is_refused(given, message, size):
    with pytest.raises(ValueError, match=f"log_likelihood .*{message}"):
        estimate_fisher(MODEL, DATA, log_likelihood=given, batch_size=size)
    assert all(p.grad is None and p.requires_grad for p in MODEL.parameters())


class OfFeatures(nn.Module):
    """Takes what its trainer makes of a batch, and nothing that is in one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, features, scale=1.0):
        return {"logits": scale * self.head(features["values"])}


class OneAtATime(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        if len(x) > 1:
            raise ValueError("no padding token is defined")
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def labelled(name):
    return [{name: torch.randn(3), "labels": i % 2} for i in range(8)]


@pytest.mark.parametrize("size", [1, 4])
def test_a_forward_of_other_arguments_names_the_likelihood_alone(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none that examples will be run one by one
        with pytest.raises(ValueError, match="takes none of these but features, scale, so that"):
            estimate_fisher(OfFeatures(), labelled("text"), batch_size=size)


def test_a_forward_of_one_example_is_run_one_by_one():
    with pytest.warns(UserWarning, match="fails on several examples at once.*one by one"):
        found = estimate_fisher(OneAtATime(), labelled("x"), batch_size=4)
    assert found.num_examples == 8
