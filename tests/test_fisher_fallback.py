"""What one backward does not cover is done another way, or refused."""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace

import fisher_oracle as oracle
import pytest
import torch
from architectures import build, classes
from fishers import Classifier, features, mean, squared_scores
from models import Unseen
from torch import nn

from hf_ewc import estimate_fisher

# What is not covered is said, and done another way


class Gated(nn.Module):
    """A recurrent layer: one fused operation with all its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, labels=None):
        return {"logits": self.head(self.cell(x)[0][:, -1])}


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, labels=None):
        hidden = Unseen.apply(torch.tanh(self.inner(x)))
        return {"logits": self.head(hidden).mean(0)}


@pytest.mark.parametrize(
    ("kind", "length", "reason"),
    [(Gated, 3, "in gru"), (TimeFirst, 4, "differs from single examples"), (TimeFirst, 3, "head")],
)
def test_other_architectures_fall_back_exactly(kind, length, reason):
    model = kind()
    x = torch.randn(4, length, 4, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "labels": classes(4)}
    with pytest.raises(ValueError, match=reason):
        estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    with pytest.warns(UserWarning, match=reason):
        fisher = estimate_fisher(model, [batch, batch], fisher_type="empirical")
    twin, terms = copy.deepcopy(model).double(), []
    for n in range(4):
        logp = twin(x[n : n + 1].double())["logits"][0].log_softmax(0)
        terms += squared_scores(twin, [logp[batch["labels"][n]]])
    oracle.assert_close(fisher.diagonal, mean(terms, 4))
    assert fisher.num_examples == 8


def test_one_warning_however_many_batches():
    batch = {"x": torch.randn(3, 3, 4), "labels": classes(3)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate_fisher(Gated(), [batch] * 4, fisher_type="empirical")
    assert len([w for w in caught if "one-backward" in str(w.message)]) == 1


# Errors


def test_errors_say_what_was_seen_and_what_to_do():
    model = Classifier(3)
    good = {"x": features(4), "labels": classes(4)}
    with pytest.raises(ValueError, match="empty"):
        estimate_fisher(model, [])
    with pytest.raises(ValueError, match="no labels"):
        estimate_fisher(model, iter([{"x": features(4)}]))
    with pytest.raises(ValueError, match="No usable examples"):
        estimate_fisher(model, iter([]))
    with pytest.raises(ValueError, match="fisher_type is 'exakt'"):
        estimate_fisher(model, [good], fisher_type="exakt")
    with pytest.raises(ValueError, match="no parameters 'heads'"):
        estimate_fisher(model, [good], parameters=["heads"])
    with pytest.raises(ValueError, match="num_samples is 0"):
        estimate_fisher(model, [good], num_samples=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        estimate_fisher(model, [good], batch_size=0)
    with pytest.raises(TypeError, match="data is a dict"):
        estimate_fisher(model, good)
    with pytest.raises(TypeError, match="needed is a dict"):
        estimate_fisher(model, iter([features(4)]))
    with pytest.raises(ValueError, match="regression or several labels"):
        estimate_fisher(model, [{"x": features(4), "labels": torch.rand(4, 3)}])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        estimate_fisher(model, [good])


def test_all_labels_ignored():
    model, batch = build("gpt2_tied", 2)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="labelled position"):
        estimate_fisher(model, [batch])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_likelihoods_and_gradients(value):
    model = Classifier(3)
    batch = {"x": features(4), "labels": classes(4)}
    with torch.no_grad():
        model.hidden.bias[0] = value if math.isnan(value) else 0.0
        model.head.weight[0, 0] = value
    with pytest.raises(ValueError, match="examples"):
        estimate_fisher(model, [batch], fisher_type="empirical")

    def rooted(module, batch):  # finite, with an infinite gradient
        return module(batch["x"])["logits"].sub(module(batch["x"])["logits"]).abs().sqrt().sum(1)

    with pytest.raises(ValueError, match="not finite"):
        estimate_fisher(Classifier(3), [batch], log_likelihood=rooted)


class TimeFirstTokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, labels=None):
        hidden = Unseen.apply(torch.tanh(self.inner(x)))
        return {"logits": self.head(hidden).transpose(0, 1).contiguous()}


def positions_scores(model, batch):
    model, terms = copy.deepcopy(model).double(), []
    for n, labels in enumerate(batch["labels"]):
        kept = labels != -100
        if kept.any():
            logp = model(batch["x"][n : n + 1].double())["logits"][0].log_softmax(-1)
            terms += squared_scores(model, [logp[kept].gather(1, labels[kept][:, None]).sum()])
    return mean(terms, len(terms))


def test_examples_without_labels_prove_nothing():
    batch = {
        "x": torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1)),
        "labels": torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(2)),
    }
    batch["labels"][:3] = -100
    model = TimeFirstTokens()
    with pytest.warns(UserWarning, match="one by one"):
        fisher = estimate_fisher(model, iter([batch]), fisher_type="empirical")
    assert fisher.num_examples == 3
    oracle.assert_close(fisher.diagonal, positions_scores(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_examples_are_proved_apart_in_half_precision(dtype):
    model = TimeFirstTokens().to(dtype)
    batch = {
        "x": torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype),
        "labels": torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(2)),
    }
    with pytest.warns(UserWarning, match="one by one"):
        fisher = estimate_fisher(model, iter([batch]), fisher_type="empirical")
    oracle.assert_close(fisher.diagonal, positions_scores(model, batch), 0.05)


class Shifted(Classifier):
    """Takes something that all examples share."""

    def forward(self, x, shift=None, labels=None):
        return super().forward(x + shift)


@pytest.mark.parametrize("share", [torch.ones(1, 4), torch.tensor(1.0)])
def test_an_input_may_be_shared_by_the_batch(share):
    batch = {"x": features(), "labels": classes(6, 3)}
    expected = estimate_fisher(Classifier(3), [{**batch, "x": features() + 1.0}])
    for data in ([{**batch, "shift": share}], iter([{**batch, "shift": share}])):
        fisher = estimate_fisher(Shifted(3), data, fallback="error")
        assert fisher.num_examples == 6
        oracle.assert_close(fisher.diagonal, expected.diagonal)


class Rounded(nn.Module):
    """Rounds otherwise alone than among others, as kernels of half precision do."""

    def __init__(self, outputs, rounding):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.rounding = nn.Linear(6, outputs), rounding
        self.level = 5.0  # beside which it is rounding
        self.config = SimpleNamespace(problem_type=None, num_labels=outputs)
        with torch.no_grad():
            self.head.weight.mul_(0.01)
            self.head.bias.zero_()

    def forward(self, x, labels=None):
        logits = self.head(x) + self.level
        wave = torch.arange(logits.shape[-1]).cos()
        return {"logits": logits + self.rounding * wave * (len(x) == 1)}


def tokens(outputs):
    """Of a label at each of 16 positions."""
    x = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(1))
    return {"x": x, "labels": torch.arange(64).view(4, 16) % outputs}


@pytest.mark.parametrize(
    ("fisher_type", "outputs", "rounding"), [("sampled", 20_000, 0.3), ("exact", 40, 0.1)]
)
def test_rounding_decides_no_label_otherwise_for_an_example_alone(fisher_type, outputs, rounding):
    """A drawn label flips at the least difference, and the order of classes that are as likely."""
    model = Rounded(outputs, rounding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate_fisher(model, [tokens(outputs)], fisher_type=fisher_type, fallback="error")


class Looked(nn.Module):
    """An embedding whose gradient holds the looked up rows alone, and maybe a recurrent layer."""

    def __init__(self, recurrent):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4, sparse=True)
        self.cell = nn.GRU(4, 4, batch_first=True) if recurrent else None
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids, labels=None):
        hidden = self.words(input_ids)
        hidden = hidden if self.cell is None else self.cell(hidden)[0]
        return {"logits": self.head(torch.tanh(hidden).sum(1))}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_sparse_gradients(recurrent, hooked):
    """Hooks that wait for a gradient, as layer-wise optimizers have them, are not called."""
    model = Looked(recurrent)
    if hooked:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: 1 / 0)
    batch = {"input_ids": torch.arange(18).reshape(6, 3) % 10, "labels": classes(6)}
    with warnings.catch_warnings():
        if recurrent:
            warnings.simplefilter("ignore")
        fisher = estimate_fisher(model, [batch], fisher_type="empirical")
    twin = copy.deepcopy(model).double()
    for parameter in twin.parameters():
        parameter._post_accumulate_grad_hooks = None
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    scores = [twin(ids[None])["logits"][0].log_softmax(0)[label] for ids, label in rows]
    oracle.assert_close(fisher.diagonal, mean(dense_scores(twin, scores), 6))


def dense_scores(model, values):
    for value in values:
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        yield {n: g.to_dense() ** 2 for n, g in zip(parameters, gradients, strict=True)}


class Ragged(nn.Module):
    """Sequences of different lengths in one nested tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, labels=None):
        nested = torch.nested.as_nested_tensor(list(x), layout=torch.jagged)
        hidden = torch.tanh(self.inner(nested)).unbind()
        return {"logits": self.head(torch.stack([row.sum(0) for row in hidden]))}


def test_nested_tensors_are_run_one_by_one():
    model = Ragged()
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=r"inner.weight \(in linear\).*one by one"):
        fisher = estimate_fisher(model, [{"x": x, "labels": classes(6)}], fisher_type="empirical")
    hidden = torch.tanh(model.inner(x)).sum(1)
    logp = model.head(hidden).log_softmax(-1)
    scores = [row[label] for row, label in zip(logp, classes(6), strict=True)]
    oracle.assert_close(fisher.diagonal, mean(squared_scores(model, scores), 6))


class Scripted(nn.Module):
    """A part in TorchScript, whose operations nobody sees."""

    def __init__(self, script):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.inner = torch.jit.script(inner) if script else torch.jit.trace(inner, features())
        self.head = nn.Linear(5, 3)

    def forward(self, x, labels=None):
        return {"logits": self.head(self.inner(x))}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [True, False])
def test_a_part_in_torchscript_is_run_one_by_one(script):
    model, x = Scripted(script), features()
    with pytest.warns(UserWarning, match=r"inner.0.weight.*one by one"):
        fisher = estimate_fisher(model, [{"x": x, "labels": classes(6)}], fisher_type="empirical")
    logp = model(x)["logits"].log_softmax(-1)
    scores = [row[label] for row, label in zip(logp, classes(6), strict=True)]
    oracle.assert_close(fisher.diagonal, mean(squared_scores(model, scores), 6))
