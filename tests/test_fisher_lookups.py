"""Large tables, whose gradient of one example is kept as the rows that were looked up."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ewc import estimate_fisher
from hf_ewc.fisher.engine.lookups import RowsOnly

WORDS, WIDTH = 70_000, 16  # 1.1 million entries


class Words(nn.Module):
    """Classifies words looked up in a large table: twice, `tied` to the scores, or `recurrent`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=3)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True) if "recurrent" in kind else None
        self.head = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.table(ids)
        if "twice" in self.kind:
            hidden = hidden * F.embedding(ids.flip(1), self.table.weight, padding_idx=3)
        if self.cell is not None:
            hidden = self.cell(hidden)[0]
        scores = self.head(torch.tanh(hidden).sum(1))
        if "tied" in self.kind:
            scores = scores + F.linear(hidden.mean(1), self.table.weight[:3])
        return {"logits": scores}


def batch() -> dict[str, Tensor]:
    """Words that come more than once, the padding and the last one of the table among them."""
    ids = torch.tensor([[5, 9, 5, 3], [0, 69_999, 7, 7], [2, 2, 2, 3], [9, 1, 40_000, 5]])
    return {"ids": ids, "labels": torch.tensor([0, 2, 1, 1])}


def loop(model: Words) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ log p(y_n | x_n))², one example at a time in float64, written out."""
    twin = copy.deepcopy(model).double()
    parameters = dict(twin.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for ids, label in zip(*batch().values(), strict=True):
        value = twin(ids[None])["logits"][0].log_softmax(0)[label]
        gradients = torch.autograd.grad(value, list(parameters.values()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient**2 / 4
    return totals


KINDS = ["once", "twice", "tied", "recurrent", "recurrent, twice", "recurrent, tied"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_were_looked_up_are_squared_as_if_written_out(kind):
    model = Words(kind)
    with warnings.catch_warnings():
        if "recurrent" in kind:  # which one backward does not cover
            warnings.simplefilter("ignore")
        found = estimate_fisher(model, [batch()], fisher_type="empirical").diagonal
    for name, value in loop(model).items():
        rounding = 1e-6 * value.max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=rounding)


def test_a_hook_of_the_users_sees_a_gradient_written_out():
    model, seen = Words("recurrent"), []
    model.table.weight.register_hook(lambda gradient: seen.append(gradient.layout))
    with pytest.warns(UserWarning, match="one by one"):
        found = estimate_fisher(model, [batch()], fisher_type="empirical").diagonal
    assert set(seen) == {torch.strided}
    torch.testing.assert_close(found["table.weight"].double(), loop(model)["table.weight"])


def gradient_of(model: Words, ids: Tensor, **options: bool) -> Tensor:
    with RowsOnly(model.parameters()):
        hidden = F.embedding(ids, model.table.weight, **options)
    (gradient,) = torch.autograd.grad(hidden.sum(), [model.table.weight])
    return gradient


def test_what_cannot_be_kept_as_rows_or_gains_nothing_is_written_out():
    model, ids = Words("once"), torch.tensor([[1, 1, 5]])
    assert gradient_of(model, ids).layout == torch.sparse_coo
    by_frequency = gradient_of(model, ids, scale_grad_by_freq=True)
    assert by_frequency.layout == torch.strided
    assert by_frequency[1, 0] == 1.0
    many = torch.arange(WORDS // 4)
    assert gradient_of(model, many).layout == torch.strided
