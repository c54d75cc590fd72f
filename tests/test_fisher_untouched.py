"""The estimate leaves the model as it was, with checkpointing or without."""

from __future__ import annotations

import random
from types import SimpleNamespace

import fisher_oracle as oracle
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build, classes
from fishers import Classifier, features
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ewc import estimate_fisher

# The model is left as it was found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_left_as_it_was_found(name):
    model, batch = build(name)
    with torch.no_grad():
        model(**batch)  # some models install hooks of their own in their first forward
    model.train()
    next(iter(model.children())).eval()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 7.0)
    kept = first.grad
    frozen = list(model.parameters())[1]
    frozen.requires_grad_(False)
    before = snapshot(model)
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    random_before = torch.get_rng_state(), random.getstate()
    estimate_fisher(model, [batch], fisher_type="sampled")
    assert snapshot(model) == before
    assert first.grad is kept
    assert torch.equal(torch.get_rng_state(), random_before[0])
    assert random.getstate() == random_before[1]
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002


def snapshot(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(v), v.tolist(), v.requires_grad) for name, v in tensors.items()},
        "grads": {n: None if p.grad is None else p.grad.tolist()
                  for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(module._forward_hooks), len(module._forward_pre_hooks),
                   len(module._backward_hooks), "forward" in vars(module)]
            for name, module in model.named_modules()
        },
        "parameter hooks": {
            n: (len(p._backward_hooks or {}), len(p._post_accumulate_grad_hooks or {}))
            for n, p in model.named_parameters()
        },
        "cache": getattr(model.config, "use_cache", None),
    }  # fmt: skip


def test_restored_after_an_error():
    model, batch = build("resnet")
    model.train()
    before = snapshot(model)
    broken = {**batch, "labels": torch.full((5,), 9)}
    with pytest.raises(ValueError, match="outside the 3 classes"):
        estimate_fisher(model, [broken])
    assert snapshot(model) == before


class Checkpointed(Classifier):
    def forward(self, x, labels=None):
        def inner(value):
            return torch.tanh(self.hidden(value))

        hidden = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        return {"logits": self.head(hidden)}


def test_a_checkpoint_of_the_models_own():
    batch = {"x": features(), "labels": classes(6, 3)}
    with pytest.warns(UserWarning, match="one by one"):
        fisher = estimate_fisher(Checkpointed(3), [batch])
    oracle.assert_close(fisher.diagonal, estimate_fisher(Classifier(3), [batch]).diagonal)


def test_a_parameter_with_gaps_in_memory():
    batch, model, plain = {"x": features(), "labels": classes(6, 3)}, Classifier(3), Classifier(3)
    wide = torch.zeros(5, 10)
    wide[:, 3:7] = model.hidden.weight.detach()
    model.hidden.weight = nn.Parameter(wide[:, 3:7])
    fisher = estimate_fisher(model, [batch], fallback="error")
    oracle.assert_close(fisher.diagonal, estimate_fisher(plain, [batch]).diagonal)


class Remembering(Classifier):
    """Notes things in a forward, as dynamic position embeddings and classification heads do."""

    def __init__(self):
        super().__init__(3, "single_label_classification")
        self.longest = 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x, labels=None):
        self.longest, self.later = 7, True
        self.config.problem_type = "noted"
        self.config.problem_type = "single_label_classification"
        self.config.noted = True
        self.count.data += 1
        return super().forward(x)


def test_what_a_forward_notes_is_forgotten():
    model = Remembering()
    estimate_fisher(model, [{"x": features(), "labels": classes(6, 3)}])
    assert model.longest == 0
    assert model.count == 0
    assert not hasattr(model, "later")
    assert not hasattr(model.config, "noted")


def test_gradient_checkpointing_with_several_passes():
    model, batch = build("bert")
    assert model.config.num_labels > 2
    expected = oracle.exact(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    fisher = estimate_fisher(model.train(), [batch], fisher_type="exact", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)


def test_checkpoint_wrappers_of_torch():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, batch = build("bert")
    expected = oracle.exact(model, batch)
    for i, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[i] = checkpoint_wrapper(layer)
    fisher = estimate_fisher(model, [batch], fisher_type="exact", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)


class Renormalized(nn.Module):
    """Embeddings that write to their weights in the forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4, max_norm=0.5)
        self.bag = nn.EmbeddingBag(10, 4, max_norm=0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, labels=None):
        return SimpleNamespace(
            logits=self.head(self.words(input_ids).mean(1) + self.bag(input_ids))
        )


class Named(Renormalized):
    def forward(self, input_ids, labels=None):
        return {"logits": super().forward(input_ids).logits}


@pytest.mark.filterwarnings("ignore:The one-backward Fisher is not exact")
@pytest.mark.parametrize("error", [False, True])
def test_weights_that_a_forward_writes_to_are_put_back(error):
    model = Named()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    labels = torch.full((6,), 9) if error else classes(6)
    batch = {"input_ids": torch.arange(18).reshape(6, 3) % 10, "labels": labels}
    if error:
        with pytest.raises(ValueError, match="outside the 3 classes"):
            estimate_fisher(model, [batch])
    else:
        fisher = estimate_fisher(model, [batch])
        twin = Renormalized()
        twin.config = None
        oracle.assert_close(fisher.diagonal, oracle.exact(twin, batch))
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_adapters_of_an_embedding_that_writes_to_its_weight_are_put_back():
    config = LoraConfig(r=2, target_modules=["words"], init_lora_weights=False)
    model = get_peft_model(Named(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.arange(18).reshape(6, 3) % 10, "labels": classes(6)}
    with pytest.warns(UserWarning, match="one by one"):
        estimate_fisher(model, [batch])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_what_was_compiled_in_place_runs_uncompiled_and_stays_compiled():
    """Compiled, what intercepts the operations would be compiled again for each of them."""
    batch = {"x": features(3), "labels": torch.tensor([0, 1, 1])}
    model, calls = Classifier(2), []
    call = calls.append
    model._compiled_call_impl = call
    found = estimate_fisher(model, [batch]).diagonal
    assert calls == []
    assert model._compiled_call_impl is call
    model._compiled_call_impl = None
    for name, expected in estimate_fisher(model, [batch]).diagonal.items():
        assert torch.equal(found[name], expected)
