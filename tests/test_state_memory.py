"""Smaller forms of a state, what consolidating takes, and what a state can be turned into."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher
from hf_ewc.state import quadratic
from hf_ewc.state.consolidation import Settings
from hf_ewc.training.fused import Piece, value_and_gradient
from hf_ewc.training.penalty import Penalty
from tests.models import Examples, bert
from tests.training import arguments


def wide_fisher(model: nn.Module, seed: int) -> Fisher:
    """Importances over twenty orders of magnitude, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = {}
    for name, parameter in model.named_parameters():
        exponent = torch.randn(parameter.shape, generator=generator) * 4
        alive = torch.rand(parameter.shape, generator=generator) > 0.1
        diagonal[name] = torch.exp(exponent) * 1e-6 * alive
    return Fisher(diagonal, 10)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 48), nn.Linear(48, 37), nn.Linear(37, 5))


def moved(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# Eight bits


def test_eight_bits_are_off_by_a_sixteenth_of_each_value_in_its_block():
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model)
    packed = state.pack("float8")
    for name, exact in state.importance.items():
        held = packed.importance[name]
        assert torch.equal(held > 0, exact > 0)
        size = packed.packed(name)[0]
        if size.exponents is None:  # rows of 37: bf16
            torch.testing.assert_close(held, exact, rtol=2**-8, atol=0)
            continue
        shared = exact.numel() // size.exponents.numel()
        assert shared in (128, 16)
        largest = (
            exact.view(-1, shared).amax(1, keepdim=True).expand(-1, shared).reshape(held.shape)
        )
        normal = exact >= largest * 2**-13  # below are the subnormal numbers
        torch.testing.assert_close(held[normal], exact[normal], rtol=2**-4, atol=0)
        assert bool(((held - exact).abs() <= largest * 2**-15)[~normal].all())
    assert packed.pack("float8") == packed
    assert packed.pack("float32").importance == dict(packed.importance.items())


def test_eight_bits_take_a_byte_and_a_block_s_exponent():
    model = nn.Linear(1024, 512, bias=False)
    state = EWCState().consolidate(wide_fisher(model, 0), model)
    size = 1024 * 512
    assert state.pack("float8").nbytes == 5 * size + size // 128


@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 128), (7,), (32,), (3, 0), (16, 3, 4, 4), (1, 130)]
)
def test_tensors_of_all_shapes_in_eight_bits(tmp_path, shape):
    torch.manual_seed(0)
    value = torch.rand(shape) + 1e-3
    state = EWCState({"a": value}, {"a": torch.zeros(shape)}).pack("float8")
    torch.testing.assert_close(state.importance["a"], value, rtol=2**-4, atol=1e-6)
    state.save_pretrained(tmp_path)
    assert EWCState.from_pretrained(tmp_path) == state
    assert state.importance["a"].shape == shape


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-20, 1.0, 3e38])
def test_eight_bits_of_any_size(value):
    state = EWCState({"a": torch.full((128,), value)}, {"a": torch.zeros(128)}).pack("float8")
    assert bool((state.importance["a"] > 0).all())
    if value > 1e-36:
        torch.testing.assert_close(
            state.importance["a"], torch.full((128,), value), rtol=0.07, atol=0
        )


def test_the_penalty_reads_eight_bits_as_they_are():
    model = net()
    packed = EWCState().consolidate(wide_fisher(model, 0), model).pack("float8")
    dense = EWCState(dict(packed.importance), dict(packed.anchor))
    moved(model, 1)
    strengths = dict.fromkeys(packed.importance, 2.0)
    gradients = []
    for state in (packed, dense):
        model.zero_grad()
        penalty = Penalty(state, model, strengths)
        values = penalty.add_gradients()
        assert penalty.differentiable().item() == pytest.approx(values.sum().item(), rel=1e-5)
        assert state.penalty(model).item() == pytest.approx(values.sum().item() / 2, rel=1e-5)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    eight = [term for term in Penalty(packed, model, strengths).terms if term.exponents is not None]
    assert {term.importance.dtype for term in eight} == {torch.float8_e4m3fn}


def test_eight_bits_are_cut_into_blocks_with_their_exponents(monkeypatch):
    from hf_ewc.training import fused

    monkeypatch.setattr(fused, "CACHE_BLOCK", 256)
    packed = EWCState({"a": torch.rand(8, 160)}, {"a": torch.rand(8, 160)}).pack("float8")
    importance, anchor = packed.packed("a")
    theta, gradient = torch.rand(1280), torch.zeros(1280)
    assert importance.exponents is not None
    piece = Piece(
        theta,
        importance.values.flatten(),
        anchor.values.flatten(),
        gradient,
        exponents=importance.exponents.flatten(),
    )
    value = value_and_gradient([piece])
    expected = packed.importance["a"].flatten() * (theta - packed.anchor["a"].flatten())
    torch.testing.assert_close(gradient, expected)
    distance = theta - packed.anchor["a"].flatten()
    assert value.item() == pytest.approx(0.5 * (expected * distance).sum().item(), rel=1e-5)


def test_the_gradient_in_eight_bits_points_the_same_way():
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model)
    moved(model, 1)
    directions = []
    for each in (state, state.pack("float8")):
        model.zero_grad()
        each.penalty(model).backward()
        directions.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, eight = directions
    assert torch.nn.functional.cosine_similarity(exact, eight, dim=0) > 0.999
    assert eight.norm() / exact.norm() == pytest.approx(1.0, abs=2**-4)


# What consolidating takes


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16"}, {"dtype": "float8"}, {"keep_fraction": 0.2}, {"device": "cpu"}],
)
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_packing_as_tensors_are_made_is_packing_at_the_end(options, mode):
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model, mode=mode)
    moved(model, 0)
    fisher = wide_fisher(model, 1)
    at_once = state.consolidate(fisher, model, mode=mode, gamma=0.9, weight=2.0, **options)
    options.pop("device", None)
    at_the_end = state.consolidate(fisher, model, mode=mode, gamma=0.9, weight=2.0).pack(**options)
    assert at_once.importance == at_the_end.importance
    assert at_once.anchor == at_the_end.anchor


class Watched:
    """How many tensors of former values are there as each new one is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tensors: Iterator[Tensor]) -> None:
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        self.alive: list[int] = []
        original = quadratic.combined

        def combined(*arguments):
            self.alive.append(sum(tensor() is not None for tensor in self.tensors))
            return original(*arguments)

        monkeypatch.setattr("hf_ewc.state.consolidation.combined", combined)


@pytest.mark.parametrize("mode", ["online", "separate"])
@pytest.mark.parametrize("held_by_others", [False, True])
def test_former_tensors_go_one_by_one(monkeypatch, mode, held_by_others):
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model, mode=mode)
    fisher = wide_fisher(model, 1)
    expected = state.consolidate(fisher, model, mode=mode)
    kept = (state, fisher) if held_by_others else ()
    tensors = [p.values for name in state.importance for p in state.packed(name)]
    watched = Watched(monkeypatch, [*tensors, *fisher.diagonal.values()])
    del tensors
    finish = state.begin_consolidation(fisher, model, Settings(mode), "new")
    del state, fisher
    gc.collect()
    assert finish().importance == expected.importance
    if held_by_others:
        assert watched.alive == [18] * 6
        assert kept[0].num_tasks == 1
    else:
        assert watched.alive == [18, 15, 12, 9, 6, 3]


def test_the_trainer_lets_go_of_the_former_state(monkeypatch, tmp_path):
    trainer = EWCTrainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=Examples("bert", 4),
        ewc_config=EWCConfig(fisher_samples=4),
    )
    trainer.consolidate()
    trainer.ewc_penalty()  # which holds tensors of the state, too
    state = trainer.ewc_state
    watched = Watched(monkeypatch, [state.packed(name)[0].values for name in state.importance])
    count = len(state.importance)
    del state
    gc.collect()
    trainer.consolidate(name="b")
    assert watched.alive == list(range(count, 0, -1))
    assert trainer.ewc_state.num_tasks == 2


@pytest.mark.parametrize("bad", ["anchor", "importance"])
def test_a_consolidation_that_is_refused_costs_the_trainer_nothing(monkeypatch, tmp_path, bad):
    trainer = EWCTrainer(
        model=bert(),
        args=arguments(tmp_path),
        train_dataset=Examples("bert", 4),
        ewc_config=EWCConfig(fisher_samples=4),
    )
    state = trainer.consolidate()
    fisher = {name: torch.ones_like(value) for name, value in state.importance.items()}
    if bad == "importance":
        fisher = {name: value * 3e38 for name, value in fisher.items()}
    monkeypatch.setattr("hf_ewc.training.trainer.fisher_of", lambda *_, **__: Fisher(fisher))
    if bad == "anchor":
        with torch.no_grad():
            trainer.model.classifier.bias[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        trainer.consolidate(weight=3.0)
    assert trainer.ewc_state is state


def test_offloaded_states_are_on_the_cpu_from_their_making_on(monkeypatch, tmp_path):
    seen = []
    original = EWCState.begin_consolidation

    def begin(self, fisher, parameters, settings, name=None):
        seen.append(settings)
        return original(self, fisher, parameters, settings, name)

    monkeypatch.setattr(EWCState, "begin_consolidation", begin)
    for offload in (False, True):
        config = EWCConfig(fisher_samples=4, ewc_offload=offload, ewc_state_dtype="float8")
        data = Examples("bert", 4)
        trainer = EWCTrainer(
            model=bert(), args=arguments(tmp_path), train_dataset=data, ewc_config=config
        )
        trainer.consolidate()
        trainer.train()
    assert [settings.device for settings in seen] == [None, "cpu"]


# Merging


def merged_by_hand(terms, name: str) -> tuple[Tensor, Tensor]:
    numerator = sum(w * f[name].double() * t[name].double() for w, f, t in terms)
    return numerator, sum(w * f[name].double() for w, f, _ in terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_merging_is_the_average_that_the_fishers_weigh(dtype, gamma):
    model, state, terms = net().to(dtype), EWCState(), []
    for task in range(4):
        moved(model, task)
        fisher, weight = wide_fisher(model, task), 1.0 + task
        state = state.consolidate(fisher, model, mode="separate", weight=weight, gamma=gamma)
        theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        terms = [(gamma * w, f, t) for w, f, t in terms]
        terms.append((weight, dict(fisher.diagonal), theta))
    other = net(7).to(dtype)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    assert state.merge(other) is other
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
    for name, parameter in other.named_parameters():
        numerator, denominator = merged_by_hand(terms, name)
        needed = denominator > 0
        expected = (numerator / denominator)[needed]
        got = parameter.detach().double()[needed]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * 0.1)
        assert torch.equal(parameter[~needed], before[name][~needed])
    assert state.penalty(other).item() <= state.penalty(model).item()
    if dtype != torch.bfloat16:
        assert state.penalty(other).item() == pytest.approx(state.offset, rel=1e-4)


def test_merging_an_online_state_loads_the_newest_weights():
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model)
    moved(model, 1)
    state = state.consolidate(wide_fisher(model, 1), model)
    other = state.merge(net(3))
    for name, parameter in other.named_parameters():
        needed = state.importance[name] > 0
        assert torch.equal(parameter[needed], model.get_parameter(name)[needed])


@pytest.mark.parametrize("packing", [{"keep_fraction": 0.1}, {"dtype": "float8"}])
def test_merging_from_a_packed_state(packing):
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model, mode="separate").pack(**packing)
    other = state.merge(net(3))
    fresh = net(3)
    for name, parameter in other.named_parameters():
        needed = state.importance[name] > 0
        assert torch.equal(parameter[needed], state.anchor[name][needed])
        assert torch.equal(parameter[~needed], fresh.get_parameter(name)[~needed])


def test_merging_into_another_model_is_refused():
    model = net()
    state = EWCState().consolidate(wide_fisher(model, 0), model)
    with pytest.raises(ValueError, match="does not fit"):
        state.merge(nn.Linear(3, 3))
    plain = bert()
    weights = {n: p.detach() for n, p in plain.named_parameters() if "query.weight" in n}
    state = EWCState({n: torch.ones_like(w) for n, w in weights.items()}, weights)
    adapted = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="Merge into the model without adapters"):
        state.merge(adapted)
