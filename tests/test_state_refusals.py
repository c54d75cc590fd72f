"""What is refused when a state is made or goes on."""

from __future__ import annotations

import pytest
import torch
from states import net, random_fisher
from torch import nn

from hf_ewc import EWCState, Fisher

# What is refused


def test_names_that_become_one_are_refused():
    with pytest.raises(ValueError, match="holds 'a' twice"):
        EWCState({"a": torch.ones(2), "_orig_mod.a": torch.ones(2)}, ONE)


def test_parameters_without_names_are_refused():
    model = net()
    with pytest.raises(TypeError, match="pairs of name and tensor"):
        EWCState().consolidate(random_fisher(model, 0), list(model.parameters()))


ONE = {"a": torch.ones(2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": {"a": torch.tensor([1.0, -1e-6])}, "anchor": ONE}, "nowhere below 0"),
        ({"importance": {"a": torch.tensor([1.0, torch.nan])}, "anchor": ONE}, "not finite"),
        ({"importance": {"a": torch.tensor([1.0, torch.inf])}, "anchor": ONE}, "not finite"),
        ({"importance": ONE, "anchor": {"a": torch.tensor([1.0, torch.nan])}}, "not finite"),
        ({"importance": ONE, "anchor": {"a": torch.tensor([1.0, -torch.inf])}}, "not finite"),
        ({"importance": ONE}, "a: has an importance, no anchor"),
        ({"anchor": ONE}, "a: has an anchor, no importance"),
        ({"importance": ONE, "anchor": {"a": torch.ones(3)}}, r"is \[2\], the anchor \[3\]"),
        ({"importance": ONE, "anchor": ONE, "offsets": {"b": 1.0}}, "b: has an offset"),
        ({"importance": ONE, "anchor": ONE, "offsets": {"a": -1.0}}, "at least 0"),
        ({"importance": ONE, "anchor": ONE, "offsets": {"a": float("nan")}}, "at least 0"),
        ({"metadata": {"x": {1, 2}}}, "JSON"),
        ({"metadata": {"x": float("nan")}}, "JSON"),
    ],
)
def test_bad_states_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EWCState(**arguments)


def test_complex_parameters_are_refused_by_name():
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="a: the parameter is complex; a state holds real ones"):
        EWCState().consolidate(Fisher(ONE), model)


def test_other_than_floating_tensors_are_refused():
    for bad in (torch.ones(2, dtype=torch.int64), [1.0, 2.0]):
        with pytest.raises(TypeError, match="floating-point tensor"):
            EWCState({"a": bad}, ONE)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "'online', 'separate'"),
        ({"gamma": 1.01}, "of at least 0 and at most 1"),
        ({"gamma": -0.1}, "of at least 0 and at most 1"),
        ({"gamma": float("nan")}, "of at least 0 and at most 1"),
        ({"weight": -1.0}, "at least 0"),
        ({"weight": float("inf")}, "finite"),
        ({"weight": float("nan")}, "finite"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        EWCState().consolidate(random_fisher(model, 0), model, **arguments)


def test_parameters_that_do_not_fit_are_all_named():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0, ("0.weight", "0.bias")), model)
    other = nn.Sequential(nn.Linear(8, 5))
    fisher = Fisher({"0.weight": torch.ones(5, 8), "extra": torch.ones(1)})
    with pytest.raises(ValueError, match="extra: in the Fisher") as error:
        state.consolidate(fisher, other)
    assert "0.weight: [5, 7] in the state, [5, 8] among the parameters" in str(error.value)
    with pytest.raises(ValueError, match=r"0\.bias: in the state, not among the parameters"):
        state.consolidate(Fisher({"0.weight": torch.ones(5, 7)}), {"0.weight": model[0].weight})
    with pytest.raises(ValueError, match=r"0\.weight"):
        state.penalty(other)
    with pytest.raises(ValueError, match="The state of Sequential does not fit Linear"):
        state.check(nn.Linear(1, 1))


def test_other_things_than_a_fisher_are_refused():
    with pytest.raises(TypeError, match="must be a Fisher, got dict"):
        EWCState().consolidate({}, net())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters"):
        EWCState().consolidate(Fisher({}), net())


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_parameters_that_are_not_finite_are_refused(mode):
    model = net()
    fisher = random_fisher(model, 0)
    state = EWCState().consolidate(fisher, model, mode=mode)
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"2\.bias: the anchor has values that are not finite"):
        state.consolidate(fisher, model, mode=mode)


def test_an_importance_that_overflows_is_refused():
    model = net()
    fisher = Fisher({"2.bias": torch.full((3,), 3e38)})
    with pytest.raises(ValueError, match="not finite"):
        EWCState().consolidate(fisher, model, weight=10.0)


def test_parameters_in_parts_are_refused_where_their_values_count():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0), model)
    fisher = random_fisher(model, 1)
    shape, model[0].weight.data = model[0].weight.shape, torch.empty(0, dtype=torch.float64)
    model[0].weight.ds_shape = shape
    state.check(model)
    with pytest.raises(ValueError, match="ZeRO-3; gather it first"):
        state.penalty(model)
    with pytest.raises(ValueError, match="ZeRO-3; gather it first"):
        state.consolidate(fisher, model)
