"""EWC on W = W₀ + s B A: the gradient that A and B get, against autograd in float64."""

import copy

import pytest
import torch
from models import MODELS, Examples
from peft import LoraConfig, get_peft_model
from test_adapters import adapted, merged
from training import GradientRecorder, arguments

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import weights_by_name
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


# ---- In the Trainer ----


def lora(model, seed=0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))


def trainer_of(model, tmp_path, state=None, **changes):
    config = EWCConfig(**{"ewc_lambda": 10.0, "ewc_space": "weight", **changes})
    data = Examples("llama", 8)
    options = dict(max_steps=3, learning_rate=0.05, optim="sgd", per_device_train_batch_size=8)
    args = arguments(tmp_path, **options)
    return EWCTrainer(
        model=model, args=args, train_dataset=data, ewc_config=config, ewc_state=state
    )


def step_by_hand(model, state, batch, strength):
    """The gradients of one step, from the model's own loss and W₀ + s B A in float64."""
    model = copy.deepcopy(model).double()
    loss = model(**batch).loss
    for name, weight in weights_by_name(model).items():
        if name in state.importance:
            value = weight.current() if isinstance(weight, AdaptedWeight) else weight
            difference = value - state.anchor[name].double()
            loss = loss + 0.5 * strength * (state.importance[name] * difference**2).sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_fresh_adapter_is_held_from_the_first_step(tmp_path, caplog):
    model = lora(MODELS["llama"]())
    trainer = trainer_of(model, tmp_path)
    state = trainer.consolidate(name="pretraining")
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert list(state.importance) == names
    assert all(state.importance[name].min() > 0 for name in names)
    assert "fresh" not in caplog.text
    before = {name: weights_by_name(model)[name].current().detach() for name in names}
    torch.testing.assert_close(dict(state.anchor), before)
    trainer.train()
    assert trainer.ewc_penalty() > 0


def test_in_the_space_of_the_adapter_a_fresh_one_is_said_to_protect_nothing(tmp_path, caplog):
    trainer = trainer_of(lora(MODELS["llama"]()), tmp_path, ewc_space="adapter")
    state = trainer.consolidate()
    assert any("lora_A" in n and not state.importance[n].any() for n in state.importance)
    assert "fresh" in caplog.text
    assert "ewc_space='weight'" in caplog.text


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: lora(model, r=3),
        lambda model: lora(model, use_dora=True, target_modules=["v_proj", "q_proj"]),
        lambda model: lora(model, target_modules=["q_proj", "gate_proj", "embed_tokens"]),
        lambda model: model,
    ],
    ids=["another rank", "DoRA", "more modules", "full fine-tuning"],
)
def test_a_step_under_a_state_of_full_fine_tuning(wrapped, tmp_path):
    trainer = trainer_of(MODELS["llama"](), tmp_path / "full")
    trainer.train()
    state = trainer.consolidate()
    model = wrapped(copy.deepcopy(trainer.model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected_model = copy.deepcopy(model)
    recorder = GradientRecorder()
    other = trainer_of(model, tmp_path / "lora", state)
    other.add_callback(recorder)
    batch = other.data_collator([Examples("llama", 8)[i] for i in range(8)])
    other.train()
    expected = step_by_hand(expected_model, state, batch, 10.0)
    assert_close({name: recorder.steps[0][name] for name in expected}, expected)


def test_a_state_goes_through_a_merged_adapter_to_the_next(tmp_path):
    first = trainer_of(lora(MODELS["llama"]()), tmp_path / "1")
    first.train()
    state = first.consolidate(name="first")
    plain = first.model.merge_and_unload()
    second = trainer_of(lora(plain, seed=5, r=4), tmp_path / "2", state)
    assert second.ewc_penalty() == pytest.approx(0.0, abs=1e-9)
    second.train()
    state = second.consolidate(name="second")
    assert [task.name for task in state.tasks] == ["first", "second"]
    full = trainer_of(second.model.merge_and_unload().requires_grad_(True), tmp_path / "3", state)
    full.train()
    assert full.ewc_penalty() > 0


def test_a_second_adapter_beside_the_first_is_held(tmp_path):
    model = lora(MODELS["llama"]())
    first = trainer_of(model, tmp_path / "1")
    first.train()
    state = first.consolidate()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    second = trainer_of(model, tmp_path / "2", state)
    assert second.ewc_penalty() == pytest.approx(0.0, abs=1e-9)
    second.train()
    assert second.ewc_penalty() > 0


def test_a_state_of_another_space_is_refused_before_the_estimate(tmp_path):
    model = lora(MODELS["llama"]())
    first = trainer_of(model, tmp_path / "1", ewc_space="adapter")
    first.train()
    state = first.consolidate()
    second = trainer_of(model, tmp_path / "2", state)
    with pytest.raises(ValueError, match="Set ewc_space='adapter'"):
        second.consolidate()


def test_patterns_name_the_weights(tmp_path):
    changes = dict(ewc_target_modules=["layers.0.self_attn"], ewc_layer_lambdas={"layers.0": 3.0})
    trainer = trainer_of(lora(MODELS["llama"]()), tmp_path, **changes)
    state = trainer.consolidate()
    assert list(state.importance) == ["model.layers.0.self_attn.q_proj.weight"]
    trainer.train()


def left_an_anchor_of_zeros(tmp_path, **settings):
    """A trainer whose B has moved from where it was consolidated, which is 0."""
    model = lora(MODELS["llama"]())
    first = trainer_of(model, tmp_path / "1", ewc_space="adapter")
    state = first.consolidate()
    first.train()
    importance = {name: torch.ones_like(value) for name, value in state.anchor.items()}
    ones = EWCState(importance, dict(state.anchor))
    return trainer_of(model, tmp_path / "2", ones, ewc_space="adapter", **settings)


def test_an_anchor_of_zeros_is_not_said_to_be_far(tmp_path, caplog):
    trainer = left_an_anchor_of_zeros(tmp_path, ewc_mode="separate")
    caplog.clear()
    trainer.train()
    assert trainer.ewc_penalty() > 0
    assert "far" not in caplog.text


def test_that_training_does_not_start_from_zeros_is_said_in_words(tmp_path, caplog):
    trainer = left_an_anchor_of_zeros(tmp_path)
    caplog.clear()
    trainer.train()
    assert "is no longer at its EWC anchor, which is 0, and the penalty is" in caplog.text
    assert "inf" not in caplog.text
