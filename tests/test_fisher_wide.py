"""Weights that are squared block by block, and norms of long examples, summed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ewc import estimate_fisher
from hf_ewc.fisher.uses.squares import add_linear_pairs

WIDTH, WORDS = 1100, 650  # 715,000 entries of a weight, the last rows of which are few


class Wide(nn.Module):
    """Classifies words by a wide layer or, `tied`, by the embedding that they come from."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WORDS, bias=False)
        nn.init.normal_(self.layer.weight, std=0.03)
        if tied:
            self.layer.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(torch.tanh(0.1 * self.embedding(ids)).cumsum(1))}


@pytest.mark.parametrize("tied", [False, True])
def test_every_row_of_a_wide_weight_is_squared(tied):
    model = Wide(tied)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (3, 6), generator=generator)
    labels = torch.randint(0, WORDS, (3, 6), generator=generator)
    found = estimate_fisher(
        model, [{"ids": ids, "labels": labels}], fisher_type="empirical"
    ).diagonal
    twin = Wide(tied).double()
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for row, label in zip(ids, labels, strict=True):
        logits = twin(row[None])["logits"][0]
        loss = F.cross_entropy(logits, label, reduction="sum")
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient**2 / 3
    for name, value in expected.items():
        rounding = 1e-6 * value.max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("shape", [(650, 1100), (1100, 650), (5, 200_000), (70, 4000), (64, 64)])
def test_blocks_of_rows_make_the_whole(shape):
    generator = torch.Generator().manual_seed(2)
    height, width = shape
    pairs = [
        (torch.randn(n, height, generator=generator), torch.randn(n, width, generator=generator))
        for n in (1, 4)
    ]
    total = torch.ones(shape)
    add_linear_pairs(total, pairs)
    for rows in (slice(0, 3), slice(height // 2, height // 2 + 3), slice(height - 3, height)):
        expected = 1 + sum((g[:, rows].double().T @ x.double()) ** 2 for g, x in pairs)
        torch.testing.assert_close(total[rows].double(), expected, rtol=1e-4, atol=1e-5)


class Normalized(nn.Module):
    """Classifies examples of 64 x 16 x 40 entries, normalized over one axis and over two."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.LayerNorm(40, bias=bias)
        self.wide = nn.LayerNorm((16, 40), bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.wide(torch.tanh(self.narrow(x)) * x)
        return {"logits": self.head(torch.tanh(hidden).sum((1, 2)) / 100)}


@pytest.mark.parametrize("without", [None, "narrow.weight", "wide.bias"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_of_long_examples(bias, without):
    model = Normalized(bias)
    x = 3 + torch.randn(5, 64, 16, 40, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 1, 1, 0])
    names = [name for name, _ in model.named_parameters() if name != without]
    found = estimate_fisher(
        model,
        [{"x": x, "labels": labels}],
        fisher_type="empirical",
        parameters=names,
        fallback="error",
    ).diagonal
    twin = Normalized(bias).double()
    expected = dict.fromkeys(names, 0.0)
    for one, label in zip(x.double(), labels, strict=True):
        value = twin(one[None])["logits"][0].log_softmax(0)[label]
        gradients = torch.autograd.grad(value, [twin.get_parameter(name) for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] = expected[name] + gradient**2 / 5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounding = 1e-6 * value.max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=rounding)
