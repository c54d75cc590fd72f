"""The algebra of EWCState, its penalty, its packed forms, what it refuses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from models import bert
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ewc import EWCState, Fisher
from hf_ewc.parameters.names import parameters_by_name

Named = dict[str, Tensor]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def random_fisher(model: nn.Module, seed: int, names: tuple[str, ...] = ()) -> Fisher:
    generator = torch.Generator().manual_seed(seed)
    diagonal = {}
    for name, parameter in model.named_parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 3
        value = spread.exp() * (torch.rand(parameter.shape, generator=generator) > 0.2)
        if not names or name in names:
            diagonal[name] = value
    return Fisher(diagonal, num_examples=10 + seed, fisher_type="exact")


def move(model: nn.Module, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            whole = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            whole.add_(size * noise.to(parameter.dtype))


def values(model: nn.Module) -> Named:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def explicit_sum(terms: list[tuple[float, Named, Named]], model: nn.Module) -> tuple[float, Named]:
    """½ Σ_k w_k Σ F_k (θ − θ*_k)² in float64, task by task, and its gradient."""
    theta = {name: value.double().requires_grad_() for name, value in values(model).items()}
    total = torch.zeros((), dtype=torch.float64)
    for weight, fisher, anchor in terms:
        for name, importance in fisher.items():
            distance = theta[name] - anchor[name].double()
            total = total + 0.5 * weight * (importance.double() * distance**2).sum()
    gradients = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
    pairs = zip(theta, gradients, strict=True)
    return total.item(), {n: torch.zeros_like(theta[n]) if g is None else g for n, g in pairs}


def penalty_and_gradient(state: EWCState, model: nn.Module) -> tuple[float, Named]:
    model.zero_grad()
    penalty = state.penalty(model)
    penalty.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return penalty.item(), gradients


def assert_same(
    got: tuple[float, Named], expected: tuple[float, Named], rtol: float = 1e-5
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=rtol)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[1][name].double(), gradient, rtol=rtol, atol=rtol * scale)


def test_the_empty_state():
    state, model = EWCState(), net()
    assert not state
    assert state.num_tasks == 0
    assert state.offset == 0.0
    assert state.nbytes == 0
    assert dict(state.importance) == {}
    assert state.penalty(model).item() == 0.0
    state.check(model)
    assert state == EWCState()


def test_it_is_immutable():
    with pytest.raises(FrozenInstanceError):
        EWCState().tasks = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        EWCState().importance["a"] = torch.ones(1)  # type: ignore[index]


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_one_task_is_half_the_square(mode):
    model = net()
    fisher = random_fisher(model, 1)
    anchor = values(model)
    state = EWCState().consolidate(fisher, model, mode=mode, weight=3.0)
    assert state.penalty(model).item() == 0.0
    move(model, 1)
    expected = explicit_sum([(3.0, dict(fisher.diagonal), anchor)], model)
    assert_same(penalty_and_gradient(state, model), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_separate_over_ten_tasks_is_the_sum_of_ten_penalties(dtype):
    model = net(dtype)
    state, terms = EWCState(), []
    one = EWCState().consolidate(random_fisher(model, 0), model, mode="separate")
    for task in range(10):
        move(model, task)
        fisher, weight = random_fisher(model, task), 0.5 + task
        state = state.consolidate(fisher, model, mode="separate", weight=weight)
        terms.append((weight, dict(fisher.diagonal), values(model)))
    assert_same(
        (state.penalty(model).item(), penalty_and_gradient(state, model)[1]),
        explicit_sum(terms, model),
    )
    move(model, 99)
    assert_same(penalty_and_gradient(state, model), explicit_sum(terms, model))
    assert state.num_tasks == 10
    assert state.nbytes == one.nbytes


def test_separate_is_stable_for_near_tasks_far_from_zero():
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e4)
    state, terms = EWCState(), []
    for task in range(10):
        move(model, task, 1e-3)
        fisher = random_fisher(model, task)
        state = state.consolidate(fisher, model, mode="separate")
        terms.append((1.0, dict(fisher.diagonal), values(model)))
    assert_same(penalty_and_gradient(state, model), explicit_sum(terms, model))


def test_separate_with_decay_weighs_earlier_tasks_less():
    model, gamma = net(), 0.7
    state, terms = EWCState(), []
    for task in range(4):
        move(model, task)
        fisher = random_fisher(model, task)
        state = state.consolidate(fisher, model, mode="separate", gamma=gamma)
        terms.append((gamma ** (3 - task), dict(fisher.diagonal), values(model)))
    move(model, 9)
    assert_same(penalty_and_gradient(state, model), explicit_sum(terms, model))


def test_separate_without_memory_is_the_last_task():
    model = net()
    first = EWCState().consolidate(random_fisher(model, 0), model, mode="separate")
    move(model, 0)
    state = first.consolidate(random_fisher(model, 1), model, mode="separate", gamma=0.0)
    alone = EWCState().consolidate(random_fisher(model, 1), model, mode="separate")
    assert state.offset == 0.0
    for name in alone.importance:
        assert torch.equal(state.importance[name], alone.importance[name])
        assert torch.equal(state.anchor[name], alone.anchor[name])


def test_online_accumulates_and_moves_the_anchor():
    model = net()
    first, second = random_fisher(model, 0), random_fisher(model, 1)
    state = EWCState().consolidate(first, model)
    move(model, 0)
    anchor = values(model)
    state = state.consolidate(second, model, gamma=0.5, weight=2.0)
    assert state.offset == 0.0
    for name, value in anchor.items():
        expected = 0.5 * first.diagonal[name] + 2 * second.diagonal[name]
        torch.testing.assert_close(state.importance[name], expected)
        assert torch.equal(state.anchor[name], value)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_a_parameter_that_the_fisher_lacks_takes_part_with_zero(mode):
    model = net()
    old = EWCState().consolidate(random_fisher(model, 0), model, mode=mode)
    before = values(model)
    move(model, 0)
    state = old.consolidate(random_fisher(model, 1, ("2.weight",)), model, mode=mode, gamma=0.5)
    assert list(state.importance) == list(old.importance)
    assert torch.equal(state.importance["0.weight"], 0.5 * old.importance["0.weight"])
    where = old.importance["0.weight"] > 0
    kept = before if mode == "separate" else values(model)
    assert torch.equal(state.anchor["0.weight"][where], kept["0.weight"][where])
    assert torch.equal(state.anchor["0.weight"][~where], values(model)["0.weight"][~where])


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_a_new_parameter_joins_without_disturbing_the_others(mode):
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0, ("0.weight",)), model, mode=mode)
    state = state.consolidate(random_fisher(model, 1, ("2.bias",)), model, mode=mode)
    assert list(state.importance) == ["0.weight", "2.bias"]
    assert torch.equal(state.importance["2.bias"], random_fisher(model, 1).diagonal["2.bias"])


def test_parameters_may_be_a_model_a_mapping_or_pairs():
    model = net()
    fisher = random_fisher(model, 0)
    states = [
        EWCState().consolidate(fisher, given)
        for given in (model, values(model), model.named_parameters(), nn.DataParallel(model))
    ]
    for state in states[1:]:
        assert state.importance == states[0].importance
        assert state.anchor == states[0].anchor


def test_later_training_does_not_change_the_state():
    model = net(torch.float32)
    fisher = random_fisher(model, 0)
    importance = {name: value.clone() for name, value in fisher.diagonal.items()}
    by_hand = EWCState(importance=importance, anchor=values(model))
    for state in (EWCState().consolidate(fisher, model), by_hand):
        before = copy.deepcopy(state)
        move(model, 0)
        for value in (*fisher.diagonal.values(), *importance.values()):
            value.mul_(2)
        assert state == before


def test_names_lose_what_wrappers_put_in():
    state = EWCState({"_orig_mod.a.weight": torch.ones(2)}, {"a.weight": torch.ones(2)})
    assert list(state.importance) == ["a.weight"]


def test_a_state_by_hand():
    model = net(torch.float32)
    state = EWCState(
        importance={"2.bias": torch.tensor([1.0, 2.0, 0.0])},
        anchor={"2.bias": model[2].bias.detach() - torch.tensor([1.0, 0.5, 7.0])},
        offsets={"2.bias": 0.25},
    )
    assert state.penalty(model).item() == pytest.approx(0.5 * (1.0 + 2.0 * 0.25) + 0.25)
    assert state.offset == 0.25
    assert state
    assert state.num_tasks == 0


def test_records_of_tasks():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 2), model, weight=2)
    state = state.consolidate(random_fisher(model, 3), model, name="digits")
    assert [task.name for task in state.tasks] == ["task_1", "digits"]
    assert [task.num_examples for task in state.tasks] == [12, 13]
    assert [task.weight for task in state.tasks] == [2.0, 1.0]
    assert state.tasks[0].fisher_type == "exact"
    assert state.tasks[0].date.endswith("+00:00")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_penalty_is_in_fp32_or_better(dtype):
    model = net(dtype)
    state = EWCState().consolidate(random_fisher(model, 0), model)
    assert state.packed("0.weight")[1].values.dtype == dtype
    terms = [(1.0, dict(random_fisher(model, 0).diagonal), values(model))]
    move(model, 0)
    penalty = state.penalty(model)
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert penalty.item() == pytest.approx(explicit_sum(terms, model)[0], rel=1e-5)
    assert_same(penalty_and_gradient(state, model), explicit_sum(terms, model), rtol)


def test_separate_in_half_precision_keeps_an_fp32_anchor():
    model = net(torch.bfloat16)
    state = EWCState().consolidate(random_fisher(model, 0), model, mode="separate")
    move(model, 0)
    state = state.consolidate(random_fisher(model, 1), model, mode="separate")
    assert state.packed("0.weight")[1].values.dtype == torch.float32


def test_frozen_parameters_count_in_the_value():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0), model)
    move(model, 0)
    expected = state.penalty(model).item()
    model[0].requires_grad_(False)
    penalty = state.penalty(model)
    penalty.backward()
    assert penalty.item() == expected
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


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
    with pytest.raises(ValueError, match="above 0, at most 1"):
        EWCState().pack(keep_fraction=0.0)
    assert not EWCState().pack("float16", 0.5)


# Rows that were added


@pytest.mark.parametrize("packing", [{}, {"dtype": "float16"}, {"keep_fraction": 0.3}])
def test_new_rows_are_admitted_unprotected(packing):
    model, grown = nn.Linear(6, 3), nn.Linear(6, 5)
    state = EWCState().consolidate(random_fisher(model, 0), model).pack(**packing)
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = model.weight + 0.1, model.bias + 0.1
        model.weight.add_(0.1)
        model.bias.add_(0.1)
    with pytest.raises(ValueError, match="grow_rows"):
        state.penalty(grown)
    wider = state.grow_rows(grown, ["weight", "bias"])
    wider.check(grown)
    assert wider.penalty(grown).item() == pytest.approx(state.penalty(model).item())
    assert bool((wider.importance["weight"][3:] == 0).all())
    assert wider.importance["weight"].shape == (5, 6)
    again = wider.consolidate(random_fisher(grown, 1), grown, mode="separate")
    assert bool((again.importance["weight"][3:] > 0).any())


def test_growing_refuses_what_is_not_more_rows():
    state = EWCState().consolidate(random_fisher(nn.Linear(6, 3), 0), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="only the number of rows"):
        state.grow_rows(nn.Linear(7, 3), ["weight"])
    with pytest.raises(ValueError, match="only the number of rows"):
        state.grow_rows(nn.Linear(6, 2), ["weight"])
    with pytest.raises(ValueError, match="'scale' is not a parameter of the state"):
        state.grow_rows(nn.Linear(6, 4), ["scale"])
    with pytest.raises(ValueError, match="'weight' is not a parameter of Sequential"):
        state.grow_rows(net(), ["weight"])


def test_what_was_replaced_is_given_up():
    body, old, new = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(3, 2)
    before = nn.Sequential(OrderedDict(body=body, head=old))
    after = nn.Sequential(OrderedDict(body=body, head=new))
    state = EWCState().consolidate(random_fisher(before, 0), before, mode="separate")
    move(before, 0)
    state = state.consolidate(random_fisher(before, 1), before, mode="separate")
    with pytest.raises(ValueError, match=r"state.without"):
        state.check(after)
    left = state.without(["head"])
    left.check(after)
    assert set(left.importance) == set(left.anchor) == {"body.weight", "body.bias"}
    assert left.offset == pytest.approx(sum(state.offsets[n] for n in left.importance))
    assert left.tasks == state.tasks
    with pytest.raises(
        ValueError, match="without: the suffix 'haed' matches no parameter of the s"
    ):
        state.without(["haed"])
    again = left.consolidate(random_fisher(after, 2), after)
    assert "head.weight" in again.importance


def test_a_task_that_alone_counts_is_anchored_at_its_own_parameters():
    far = {"a": torch.tensor([1e6, 1.0])}
    state = EWCState().consolidate(Fisher({"a": torch.tensor([1.0, 0.0])}), far, mode="separate")
    near = {"a": torch.tensor([1e-3, 2.0])}
    ones = Fisher({"a": torch.ones(2)})
    state = state.consolidate(ones, near, mode="separate", gamma=0.0)
    assert torch.equal(state.anchor["a"], near["a"])


def test_the_maps_compare_with_dicts():
    assert EWCState().importance == {}
    state = EWCState({"a": torch.ones(2)}, {"a": torch.zeros(2)})
    assert state.importance == {"a": torch.ones(2)}
    assert state.anchor != {"a": torch.ones(2)}
    assert state.anchor != {"b": torch.zeros(2)}


def test_the_penalty_of_no_task_has_a_gradient_of_nothing():
    model = net()
    EWCState().penalty(model).backward()
    assert all(p.grad is None for p in model.parameters())


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


def test_other_than_floating_tensors_are_refused():
    for bad in (torch.ones(2, dtype=torch.int64), [1.0, 2.0]):
        with pytest.raises(TypeError, match="floating-point tensor"):
            EWCState({"a": bad}, ONE)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "'online', 'separate'"),
        ({"gamma": 1.01}, "from 0 to 1"),
        ({"gamma": -0.1}, "from 0 to 1"),
        ({"gamma": float("nan")}, "from 0 to 1"),
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


# Adapters


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def trainable(model: nn.Module) -> Fisher:
    named = parameters_by_name(model, trainable_only=True)
    return Fisher({name: torch.ones(p.shape) for name, p in named.items()})


def test_an_adapter_goes_on_in_any_precision_of_its_base():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    recorded = state.metadata["fingerprint"]
    assert recorded["adapters"] == {"default": "LORA scaled by 1"}
    assert recorded["model"] == "BertForSequenceClassification"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    state.check(model)
    state.consolidate(trainable(model), model).check(model.to(torch.bfloat16))


def test_an_adapter_goes_on_on_a_base_in_fp16():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    state.check(lora(bert()).to(torch.float16))


def test_another_scaling_of_an_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with pytest.raises(ValueError, match=r"LORA scaled by \S+ at consolidation, LORA scaled by"):
        state.check(model)


def test_an_adapter_named_like_a_module_hides_no_base():
    from peft import LoraConfig, get_peft_model

    def adapted():
        return get_peft_model(bert(), LoraConfig(target_modules=["query"]), adapter_name="encoder")

    model = adapted()
    state = EWCState().consolidate(trainable(model), model)
    state.check(adapted())
    with torch.no_grad():
        model.get_parameter("base_model.model.bert.encoder.layer.0.output.dense.bias").add_(1.0)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)


def test_a_merged_and_wrapped_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    wrapped = lora(model.merge_and_unload())
    assert trainable(wrapped).diagonal.keys() == state.importance.keys()
    with pytest.raises(ValueError, match="merged and the model wrapped anew"):
        state.check(wrapped)
    with pytest.raises(ValueError, match="merged and the model wrapped anew"):
        state.consolidate(trainable(wrapped), wrapped)


def test_another_kind_of_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    print_ = {**state.metadata["fingerprint"], "adapters": {"default": "LOHA"}}
    with pytest.raises(ValueError, match="'default': LOHA at consolidation, LORA scaled by 1 now"):
        replace(state, metadata={"fingerprint": print_}).check(model)


def test_base_parameters_that_are_trained_are_not_compared():
    model = lora(bert())
    names = ["base_model.model.classifier.bias"]
    model.get_parameter(names[0]).requires_grad_(True)
    fisher = trainable(model)
    adapter = Fisher({n: v for n, v in fisher.diagonal.items() if n not in names})
    state = EWCState().consolidate(adapter, model)
    assert state.metadata["fingerprint"]["free"] == names
    with torch.no_grad():
        model.get_parameter(names[0]).add_(1.0)
    state.check(model)
    with torch.no_grad():
        model.get_parameter("base_model.model.classifier.weight").add_(1.0)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)


def test_a_base_that_is_not_here_is_not_compared():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    weight = model.get_parameter("base_model.model.classifier.weight")
    shape, weight.data = weight.shape, torch.empty(0)
    weight.ds_shape = shape  # as DeepSpeed ZeRO-3 leaves it
    state.check(model)
    assert EWCState().consolidate(trainable(model), model).metadata["fingerprint"]["base"] is None


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


def test_sharded_parameters(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    file = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    try:
        plain = net(torch.float32)
        model = net(torch.float32)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        fishers = [random_fisher(plain, seed) for seed in range(2)]
        first = EWCState().consolidate(fishers[0], plain, mode="separate")
        sharded = EWCState().consolidate(fishers[0], model, mode="separate")
        for each in (plain, model):
            move(each, 0)
        expected = first.consolidate(fishers[1], plain, mode="separate")
        for start in (first, sharded):
            state = start.consolidate(fishers[1], model, mode="separate")
            state.save_pretrained(tmp_path / "state")
            assert EWCState.from_pretrained(tmp_path / "state").importance == expected.importance
            got = state.penalty(model)
            got.backward()
            assert got.item() == pytest.approx(expected.penalty(plain).item())
        assert state.pack("bfloat16").nbytes < state.nbytes
        with pytest.raises(ValueError, match="save and load the state first"):
            state.pack(keep_fraction=0.5)
    finally:
        torch.distributed.destroy_process_group()


def test_another_state_is_not_equal():
    model = net()
    state = EWCState().consolidate(random_fisher(model, 0), model)
    assert state == replace(state)
    assert state != replace(state, tasks=())
    assert state != replace(state, anchor={n: v + 1 for n, v in state.anchor.items()})
    assert state.to("cpu") == state


# ---- The unit ----


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_importances_are_per_label(mode):
    theta = {"w": torch.tensor([1.0, 2.0])}
    one = Fisher({"w": torch.tensor([6.0, 3.0])}, 5, "sampled", labels_per_example=3.0)
    two = Fisher({"w": torch.tensor([4.0, 8.0])}, 5, "exact")
    state = EWCState().consolidate(one, theta, mode=mode)
    assert state.importance["w"].tolist() == [2.0, 1.0]
    state = state.consolidate(two, theta, mode=mode, weight=0.5)
    assert state.importance["w"].tolist() == [4.0, 5.0]
    assert [task.labels_per_example for task in state.tasks] == [3.0, 1.0]
    assert state.metadata["unit"] == "label"


def test_a_language_model_of_twice_the_length_is_held_as_strongly():
    """Sequences put together from two of the same have F of twice the size and the same loss."""
    torch.manual_seed(0)
    weight = torch.randn(4, requires_grad=True)
    x = torch.randn(6, 4)
    scores = [torch.autograd.grad(weight @ row, weight)[0] for row in x]
    single = sum(score**2 for score in scores) / 6
    pairs = sum(a**2 + b**2 for a, b in zip(scores[::2], scores[1::2], strict=True)) / 3
    states = [
        EWCState().consolidate(Fisher({"w": f}, labels_per_example=t), {"w": weight.detach()})
        for f, t in ((single, 1.0), (pairs, 2.0))
    ]
    torch.testing.assert_close(states[0].importance["w"], states[1].importance["w"])
