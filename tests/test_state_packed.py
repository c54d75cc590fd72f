"""Packed states: half precision, the largest share, and what the penalty makes of them."""

from __future__ import annotations

import pytest
import torch
from states import assert_same, explicit_sum, move, net, penalty_and_gradient, random_fisher, values
from torch import nn

from hf_ewc import EWCState, Fisher

# Packed forms


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_importance_and_loses_nothing_to_underflow(dtype):
    model = net(torch.float32)
    importance = {n: torch.rand(p.shape).pow(8) * 1e-9 for n, p in model.named_parameters()}
    importance["0.weight"][0] = torch.tensor([0.0, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e30])
    state = EWCState(importance, values(model))
    packed = state.pack(dtype)
    size = sum(value.numel() for value in importance.values())
    assert state.nbytes == 8 * size
    assert packed.nbytes == 6 * size
    for name, value in importance.items():
        held = packed.importance[name]
        assert held.dtype == torch.float32
        assert torch.equal(held > 0, value > 0)
        limit = value.max() * (1e-6 if dtype == "float16" else 1e-30)
        near = value > limit
        rtol = 2**-11 if dtype == "float16" else 2**-8
        torch.testing.assert_close(held[near], value[near], rtol=rtol * 1.01, atol=0)
        assert torch.equal(packed.anchor[name], state.anchor[name])


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_barely_changes_the_penalty(dtype, error):
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0), model)
    move(model, 0)
    assert state.pack(dtype).penalty(model).item() == pytest.approx(
        state.penalty(model).item(), rel=error
    )


def test_packing_twice_in_one_dtype_changes_nothing():
    model = net()
    packed = EWCState().consolidate(random_fisher(model, 0), model).pack("float16", 0.3)
    assert packed.pack("float16").importance == packed.importance
    assert packed.pack("float16", 1.0) == packed


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_share_is_kept_over_all_parameters(fraction, dtype):
    model = net(torch.float32)
    state = EWCState().consolidate(random_fisher(model, 0), model)
    packed = state.pack(dtype, fraction)
    flat = torch.cat([value.flatten() for value in state.importance.values()])
    keep = min(-int(-fraction * flat.numel() // 1), int((flat > 0).sum()))
    limit = flat.sort(descending=True).values[keep - 1]
    kept = 0
    for name, value in state.importance.items():
        expected = torch.where(value >= limit, value, 0.0)
        kept += int((expected > 0).sum())
        torch.testing.assert_close(packed.importance[name], expected, rtol=2**-8, atol=0)
        where = expected > 0
        assert torch.equal(packed.anchor[name][where], state.anchor[name][where])
    assert kept == keep
    assert packed.nbytes <= state.pack(dtype).nbytes


def test_a_sparse_state_takes_ten_or_twelve_bytes_an_entry():
    model = nn.Linear(100, 100)
    fisher = Fisher({name: torch.rand(p.shape) for name, p in model.named_parameters()})
    state = EWCState().consolidate(fisher, model)
    assert state.nbytes == 10_100 * 8
    assert state.pack(keep_fraction=0.1).nbytes == 1010 * 12
    assert state.pack("bfloat16", 0.1).nbytes == 1010 * 10


def test_equal_importances_are_kept_up_to_the_share():
    zeros = {"a": torch.zeros(6), "b": torch.zeros(4)}
    state = EWCState({name: value + 1 for name, value in zeros.items()}, zeros)
    packed = state.pack(keep_fraction=0.3)
    assert sum(int((value > 0).sum()) for value in packed.importance.values()) == 3
    assert bool((packed.importance["b"] == 0).all())


def test_sparse_penalty_and_gradient_are_those_of_the_kept_entries():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0), model)
    packed = state.pack(keep_fraction=0.2)
    assert packed.packed("0.weight")[0].indices is not None
    anchor = values(model)
    move(model, 0)
    kept = [(1.0, dict(packed.importance.items()), anchor)]
    assert_same(penalty_and_gradient(packed, model), explicit_sum(kept, model), 1e-6)


def test_consolidating_goes_on_from_a_packed_state():
    model = net()
    first = EWCState().consolidate(random_fisher(model, 0), model, mode="separate")
    first = first.pack(keep_fraction=0.2)
    terms = [(1.0, dict(first.importance.items()), values(model))]
    move(model, 0)
    second = random_fisher(model, 1)
    state = first.consolidate(second, model, mode="separate")
    terms.append((1.0, dict(second.diagonal), values(model)))
    move(model, 1)
    assert_same(penalty_and_gradient(state, model), explicit_sum(terms, model))


def test_packing_refuses_other_values():
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        EWCState().pack("int8")
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        EWCState().pack(keep_fraction=0.0)
    assert not EWCState().pack("float16", 0.5)
