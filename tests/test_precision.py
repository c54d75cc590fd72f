"""Devices without fp64, such as Apple's: everything that is on them is computed in fp32."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ewc import EWCConfig, EWCState, EWCTrainer, estimate_fisher
from hf_ewc.precision import uniforms_on, widened, widest
from hf_ewc.tasks.divergence import divergences
from hf_ewc.training import fused, penalty
from tests.models import Examples, bert, gpt2, vit
from tests.training import arguments

CPU = torch.device("cpu")
MODELS = {"bert": bert, "gpt2": gpt2, "vit": vit}


class NoDoubles(TorchDispatchMode):
    """Refuses to make fp64 of other tensors, as such a device does."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        found = function(*given, **(named or {}))
        tensors = [each for each in tree_leaves((given, named)) if isinstance(each, torch.Tensor)]
        if any(is_double(each) for each in tree_leaves(found)) and any(
            tensor.dim() and not is_double(tensor) for tensor in tensors
        ):
            raise TypeError(f"{function}: the device has no float64")
        return found


def is_double(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


@pytest.fixture
def without_doubles(monkeypatch):
    """What a process sees whose only device has no fp64."""

    def refuse(*_, **settings):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    widest.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "ones", refuse)
        assert widest(CPU) == torch.float32
    monkeypatch.setattr(fused, "_on_host", lambda device: False)
    monkeypatch.setattr(penalty, "is_small", lambda *_: False)
    yield NoDoubles()
    widest.cache_clear()


def multi_label():
    return bert(problem_type="multi_label_classification"), {"labels": torch.tensor([1.0, 0, 1])}


def regression():
    model = bert(num_labels=1, problem_type="regression")
    return model, {"labels": torch.tensor(0.5)}


def model_and_data(kind):
    if kind in MODELS:
        return MODELS[kind](), Examples(kind, 6)
    model, label = {"multi_label": multi_label, "regression": regression}[kind]()
    return model, [{**Examples("bert", 6)[i], **label} for i in range(6)]


@pytest.mark.parametrize(
    ("kind", "fisher_type"),
    [
        ("gpt2", "sampled"),
        ("gpt2", "empirical"),
        *itertools.product(
            ["bert", "vit", "multi_label", "regression"], ["exact", "sampled", "empirical"]
        ),
    ],
)
def test_a_fisher_is_the_same_but_for_rounding(kind, fisher_type, without_doubles):
    model, data = model_and_data(kind)
    with without_doubles:
        found = estimate_fisher(model, data, fisher_type=fisher_type, batch_size=3)
    widest.cache_clear()
    right = estimate_fisher(model, data, fisher_type=fisher_type, batch_size=3)
    assert found.trace == pytest.approx(right.trace, rel=1e-5)
    assert (found.confidence or 1.0) == pytest.approx(right.confidence or 1.0, rel=1e-5)
    for name, value in right.diagonal.items():
        torch.testing.assert_close(found.diagonal[name], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_tasks_are_learnt_and_protected(mode, tmp_path, without_doubles):
    model, data = bert(), Examples("bert", 8)
    config = EWCConfig(ewc_mode=mode)
    with without_doubles:
        state = EWCState()
        for task in ("one", "two"):
            trainer = EWCTrainer(
                model=model,
                args=arguments(tmp_path / task, learning_rate=1e-2),
                train_dataset=data,
                ewc_config=config,
                ewc_state=state,
            )
            trainer.train()
            state = trainer.consolidate()
        told = state.told_lambda()
    widest.cache_clear()
    assert told == pytest.approx(state.told_lambda(), rel=1e-3)
    assert state.num_tasks == 2


def test_numbers_to_draw_with_stay_between_0_and_1(without_doubles):
    numbers = torch.tensor([0.0, 2.0**-60, 0.5, 1 - 2.0**-50], dtype=torch.float64)
    found = uniforms_on(CPU, numbers)
    assert found.dtype == torch.float32
    assert found[2] == 0.5
    assert ((found > 0) & (found < 1)).all()
    assert torch.erfinv(2 * found - 1).isfinite().all()


def test_a_divergence(without_doubles):
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    with without_doubles:
        found = divergences(before, after)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.1438410362)


def test_where_there_is_fp64_it_is_used():
    assert widest(CPU) == torch.float64
    assert widened(torch.ones(2)).dtype == torch.float64
