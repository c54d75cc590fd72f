"""The algebra of EWCState, its penalty, its packed forms, what it refuses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from states import assert_same, explicit_sum, move, net, penalty_and_gradient, random_fisher, values
from torch import nn

from hf_ewc import EWCState, Fisher


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
