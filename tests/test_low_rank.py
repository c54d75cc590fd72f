"""The penalty on W = W₀ + Σ s L R against autograd through that sum, in float64."""

import itertools

import pytest
import torch

from hf_ewc.training import low_rank
from hf_ewc.training.low_rank import AdaptedPiece, Product, adapted_value_and_gradient

ROWS, COLUMNS = 7, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(low_rank, "CACHE_ELEMENTS", 2 * COLUMNS)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def problem(ranks=(2, 3)):
    torch.manual_seed(0)
    base, anchor, importance = random(ROWS, COLUMNS), random(ROWS, COLUMNS), random(ROWS, COLUMNS)
    factors = [(random(ROWS, r), random(r, COLUMNS), 0.5 + r) for r in ranks]
    return base, anchor, importance.abs(), factors


def by_autograd(base, anchor, importance, factors, strength=1.0):
    leaves = [
        base.clone().requires_grad_(),
        *(t.clone().requires_grad_() for f in factors for t in f[:2]),
    ]
    weight = leaves[0]
    for i, (*_, scale) in enumerate(factors):
        weight = weight + scale * leaves[1 + 2 * i] @ leaves[2 + 2 * i]
    value = 0.5 * strength * (importance * (weight - anchor) ** 2).sum()
    return value, torch.autograd.grad(value, leaves)


def products(factors):
    return [Product(a, b, s, torch.zeros_like(a), torch.zeros_like(b)) for a, b, s in factors]


def test_value_and_gradients_are_those_of_autograd():
    base, anchor, importance, factors = problem()
    made = products(factors)
    base_gradient = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    piece = AdaptedPiece(
        base.view(-1),
        importance.view(-1) / 4,
        anchor.view(-1),
        made,
        COLUMNS,
        base_gradient=base_gradient,
        strength=3.0,
        scale=4.0,
    )
    value = adapted_value_and_gradient(piece, gradient_scale=2.0)
    expected, gradients = by_autograd(base, anchor, importance, factors, strength=3.0)
    torch.testing.assert_close(value, expected.detach())
    found = [base_gradient.view(ROWS, COLUMNS)]
    found += [g for p in made for g in (p.left_gradient, p.right_gradient)]
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, 2.0 * other)


@pytest.mark.parametrize("cuts", [(0, 11, 23, 35), (0, 5, 35), (0, 1, 2, 34, 35)])
def test_parts_of_the_flat_weight_add_up_to_the_whole(cuts):
    base, anchor, importance, factors = problem()
    whole, parts = products(factors), products(factors)
    expected = adapted_value_and_gradient(
        AdaptedPiece(base.view(-1), importance.view(-1), anchor.view(-1), whole, COLUMNS)
    )
    value = sum(
        adapted_value_and_gradient(
            AdaptedPiece(
                base.view(-1)[start:stop],
                importance.view(-1)[start:stop],
                anchor.view(-1)[start:stop],
                parts,
                COLUMNS,
                start,
            )
        )
        for start, stop in itertools.pairwise(cuts)
    )
    torch.testing.assert_close(value, expected)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.left_gradient, other.left_gradient)
        torch.testing.assert_close(one.right_gradient, other.right_gradient)


def test_kept_entries_alone_pull():
    base, anchor, importance, factors = problem()
    index = torch.tensor([0, 3, 4, 9, 17, 33])
    kept = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    kept[index] = importance.view(-1)[index]
    made = products(factors)
    piece = AdaptedPiece(
        base.view(-1), kept[index], anchor.view(-1)[index], made, COLUMNS, index=index
    )
    value = adapted_value_and_gradient(piece)
    expected, gradients = by_autograd(base, anchor, kept.view(ROWS, COLUMNS), factors)
    torch.testing.assert_close(value, expected.detach())
    found = [g for p in made for g in (p.left_gradient, p.right_gradient)]
    for one, other in zip(found, gradients[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_operands_are_computed_in_fp32():
    base, anchor, importance, factors = problem((2,))
    wide = [t.bfloat16() for t in (base, anchor, importance)]
    left, right, scale = factors[0]
    made = [
        Product(left.float(), right.float(), scale, torch.zeros(ROWS, 2), torch.zeros(2, COLUMNS))
    ]
    b, c, f = (t.view(-1) for t in wide)
    value = adapted_value_and_gradient(AdaptedPiece(b, f, c, made, COLUMNS))
    exact = [t.double() for t in wide]
    expected, gradients = by_autograd(exact[0], exact[1], exact[2], factors)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(made[0].left_gradient.double(), gradients[1], rtol=1e-5, atol=1e-5)


def test_what_is_not_trained_gets_no_gradient():
    base, anchor, importance, factors = problem((2,))
    left, right, scale = factors[0]
    made = [Product(left, right, scale, None, torch.zeros_like(right))]
    piece = AdaptedPiece(base.view(-1), importance.view(-1), anchor.view(-1), made, COLUMNS)
    adapted_value_and_gradient(piece)
    _, gradients = by_autograd(base, anchor, importance, factors)
    torch.testing.assert_close(made[0].right_gradient, gradients[2])
