"""EWC on W = W₀ + s B A: the gradient that A and B get, against autograd in float64."""

import copy

import pytest
import torch
from models import MODELS
from peft import LoraConfig, get_peft_model
from test_adapters import adapted, merged

from hf_ewc import EWCState, Fisher
from hf_ewc.parameters.adapters import AdaptedWeight, weights_by_name
from hf_ewc.training.penalty import Penalty

CASES = {
    "llama": ("llama", dict(target_modules=["q_proj", "down_proj"])),
    "llama, rank-stabilized": ("llama", dict(target_modules=["v_proj"], use_rslora=True)),
    "llama, DoRA": ("llama", dict(target_modules=["q_proj"], use_dora=True)),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj"])),
    "bert": (
        "bert",
        dict(target_modules=["query", "word_embeddings"], modules_to_save=["classifier"]),
    ),
    "bert, biases": ("bert", dict(target_modules=["query"], bias="all")),
    "vit": ("vit", dict(target_modules=["q_proj", "projection"])),
}


def random_state(model, seed=0):
    """A state over all weights of a model without adapters, its anchor near them."""
    torch.manual_seed(seed)
    parameters = dict(model.named_parameters())
    importance = {name: torch.rand_like(p).detach() for name, p in parameters.items()}
    anchor = {n: (p + 0.1 * torch.randn_like(p)).detach() for n, p in parameters.items()}
    return EWCState(importance, anchor)


def by_autograd(model, state, strength):
    """λ/2 Σ F (W − W*)² and its gradients, from W₀, A and B in float64, written out here."""
    model = copy.deepcopy(model).double()
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in weights_by_name(model).items():
        value = weight.current() if isinstance(weight, AdaptedWeight) else weight
        difference = value - state.anchor[name].double()
        total = total + 0.5 * strength * (state.importance[name].double() * difference**2).sum()
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        error = (found[name].double() - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_autograd(name):
    kind, settings = CASES[name]
    model = adapted(MODELS[kind], **settings)
    state = random_state(merged(model))
    penalty = Penalty(state, model, dict.fromkeys(state.importance, 3.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    values = penalty.add_gradients(2.0)
    expected, gradients = by_autograd(model, state, 3.0)
    torch.testing.assert_close(values.sum().double(), expected, rtol=1e-5, atol=0.0)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close({n: (g - 1.0) / 2.0 for n, g in found.items()}, gradients)


@pytest.mark.parametrize("name", ["llama", "llama, DoRA", "bert"])
def test_the_differentiable_penalty_is_the_same(name):
    kind, settings = CASES[name]
    model = adapted(MODELS[kind], **settings)
    state = random_state(merged(model))
    expected, gradients = by_autograd(model, state, 1.0)
    for make in (
        lambda: Penalty(state, model, dict.fromkeys(state.importance, 1.0)).differentiable(),
        lambda: state.penalty(model),
    ):
        model.zero_grad()
        value = make()
        value.backward()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
        assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, gradients)


@pytest.mark.parametrize(("keep", "dtype"), [(0.3, "float32"), (1.0, "float16"), (0.5, "bfloat16")])
def test_packed_states_pull_as_they_read(keep, dtype):
    model = adapted(MODELS["llama"], target_modules=["q_proj"])
    state = random_state(merged(model)).pack(dtype=dtype, keep_fraction=keep)
    penalty = Penalty(state, model, dict.fromkeys(state.importance, 1.0))
    penalty.add_gradients()
    _, gradients = by_autograd(model, state, 1.0)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close(found, gradients)


def test_consolidating_anchors_at_the_merged_weights():
    model = adapted(MODELS["llama"], target_modules=["q_proj"])
    expected = dict(merged(model).named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    fisher = Fisher({name: torch.rand(expected[name].shape)})
    state = EWCState().consolidate(fisher, model)
    torch.testing.assert_close(state.anchor[name], expected[name].detach())
    assert list(state.importance) == [name]
    state.check(model)


def test_a_state_of_the_plain_model_fits_any_adapter_on_it():
    state = random_state(MODELS["llama"]())
    for settings in (dict(r=1), dict(r=4), dict(r=2, use_dora=True)):
        model = get_peft_model(
            MODELS["llama"](), LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
        )
        state.check(model)
        assert Penalty(state, model, dict.fromkeys(state.importance, 1.0)).value() > 0
