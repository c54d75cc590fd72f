"""Types, likelihoods, subsets, errors, and the model left as it was found."""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings

import datasets
import fisher_oracle as oracle
import numpy as np
import pytest
import torch
import transformers as t
from architectures import ARCHITECTURES, build, classes, tokens
from models import Examples, Unseen, bert, llama
from torch import nn

from hf_ewc import Fisher, estimate_fisher


class Classifier(nn.Module):
    """Two layers on 4 features."""

    def __init__(self, outputs: int, problem_type: str | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, outputs)
        if problem_type:
            self.config = t.PretrainedConfig(problem_type=problem_type, num_labels=outputs)

    def forward(self, x, labels=None):
        return {"logits": self.head(torch.tanh(self.hidden(x)))}


def features(examples: int = 6) -> torch.Tensor:
    return torch.randn(examples, 4, generator=torch.Generator().manual_seed(5))


def squared_scores(model, values):
    """(∂ value / ∂θ)² for each of the scalars."""
    parameters = dict(model.named_parameters())
    for value in values:
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        yield {name: g**2 for name, g in zip(parameters, gradients, strict=True)}


def mean(terms, count):
    terms = list(terms)
    return {name: sum(term[name] for term in terms) / count for name in terms[0]}


@pytest.mark.parametrize("name", ["bert", "vit", "convnext", "llama_sequence", "bert_choice"])
def test_exact_is_the_expectation_over_all_classes(name):
    model, batch = build(name)
    expected = oracle.exact(model, batch)
    fisher = estimate_fisher(model, [batch], fisher_type="exact", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)
    assert estimate_fisher(model, [batch]).fisher_type == "exact"


@pytest.mark.parametrize("name", ["bert_tokens", "gpt2_tied", "t5"])
def test_exact_over_positions(name):
    """Every labelled position of every example, in batches of uneven lengths."""
    model, batch = build(name, 3)
    expected = oracle.exact(model, batch, shift=name == "gpt2_tied")
    fisher = estimate_fisher(model, [batch], fisher_type="exact", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)


def test_two_classes_take_one_backward():
    model = Classifier(2)
    batch = {"x": features(), "labels": classes(6, 2)}
    backwards = []
    model.hidden.weight.register_hook(lambda gradient: backwards.append(1))
    fisher = estimate_fisher(model, [batch], fisher_type="exact", batch_size=6)
    terms = []
    for row in batch["x"].double():
        twin = copy.deepcopy(model).double()
        logits = twin(row[None])["logits"][0]
        p = logits.softmax(0).detach()
        value = (logits[0] - logits[1]) * math.sqrt(p[0] * p[1])
        terms += squared_scores(twin, [value])
    oracle.assert_close(fisher.diagonal, mean(terms, 6))


def test_classes_of_probability_zero_cost_no_pass():
    """Logits masked to a subset of classes: as exact as a head with those classes alone."""
    model = Classifier(6)
    mask = torch.tensor([0, 0, 1, 1, 1, 1]).bool()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, labels=None):
            logits = self.inner(x)["logits"]
            return {"logits": logits.masked_fill(mask, torch.finfo(logits.dtype).min / 2)}

    batch = {"x": features(), "labels": classes(6, 2)}
    fisher = estimate_fisher(Masked(), [batch], fisher_type="exact").diagonal
    small = Classifier(2)
    small.load_state_dict(
        {k: v[:2] if k.startswith("head") else v for k, v in model.state_dict().items()}
    )
    wanted = estimate_fisher(small, [batch], fisher_type="exact").diagonal
    for name, value in wanted.items():
        assert torch.allclose(fisher[f"inner.{name}"][: len(value)], value, rtol=1e-5)
    assert fisher["inner.head.weight"][2:].abs().sum() == 0


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_multi_label(fisher_type):
    model = Classifier(3, "multi_label_classification")
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    batch = {"x": features(), "labels": labels.float()}
    twin, terms = copy.deepcopy(model).double(), []
    for x, y in zip(batch["x"].double(), labels.double(), strict=True):
        p = twin(x[None])["logits"][0].sigmoid()
        if fisher_type == "empirical":
            value = (y * p.log() + (1 - y) * (1 - p).log()).sum()
            terms += squared_scores(twin, [value])
            continue
        for outcome in itertools.product([0.0, 1.0], repeat=3):  # all eight label vectors
            y = torch.tensor(outcome).double()
            logp = (y * p.log() + (1 - y) * (1 - p).log()).sum()
            weight = float(logp.detach().exp())
            terms += [
                {k: weight * v for k, v in term.items()} for term in squared_scores(twin, [logp])
            ]
    fisher = estimate_fisher(model, [batch], fisher_type=fisher_type)
    oracle.assert_close(fisher.diagonal, mean(terms, 6))


def test_regression_has_unit_variance():
    model = Classifier(2, "regression")
    batch = {"x": features(), "labels": torch.randn(6, 2)}
    twin = copy.deepcopy(model).double()
    exact, empirical = [], []
    for x, y in zip(batch["x"].double(), batch["labels"].double(), strict=True):
        f = twin(x[None])["logits"][0]
        exact += squared_scores(twin, list(f))
        empirical += squared_scores(twin, [-0.5 * (y - f).square().sum()])
    fisher = estimate_fisher(model, [batch], fisher_type="exact")
    oracle.assert_close(fisher.diagonal, mean(exact, 6))
    fisher = estimate_fisher(model, [batch], fisher_type="empirical")
    oracle.assert_close(fisher.diagonal, mean(empirical, 6))


def test_question_answering():
    config = t.BertConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.BertForQuestionAnswering(config)
    batch = tokens(4)
    batch["start_positions"] = torch.tensor([0, 1, 2, 99])
    batch["end_positions"] = torch.tensor([1, 2, 3, 1])
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    twin, terms = copy.deepcopy(model).double().eval(), []
    for n in range(4):
        one = {key: batch[key][n : n + 1] for key in ("input_ids", "attention_mask")}
        outputs = twin(**one)
        value = outputs.end_logits[0].log_softmax(0)[batch["end_positions"][n]]
        if n < 3:  # a start outside of the text counts nothing
            value = value + outputs.start_logits[0].log_softmax(0)[batch["start_positions"][n]]
        parameters = dict(twin.named_parameters())
        gradients = torch.autograd.grad(value, list(parameters.values()))
        terms.append({k: g**2 for k, g in zip(parameters, gradients, strict=True)})
    oracle.assert_close(fisher.diagonal, mean(terms, 4))


@pytest.mark.parametrize("name", ["bert", "gpt2_tied", "bert_tokens"])
def test_sampled_agrees_with_exact(name):
    """Within five standard errors of the mean over draws, for the sum of each parameter."""
    model, batch = build(name, 3)
    exact = estimate_fisher(model, [batch], fisher_type="exact").diagonal
    draws = 60
    singles = [
        estimate_fisher(model, [batch], fisher_type="sampled", seed=seed).diagonal
        for seed in range(draws)
    ]
    largest = max(float(value.sum()) for value in exact.values())
    for key, value in exact.items():
        sums = torch.tensor([float(single[key].sum()) for single in singles])
        error = 5 * float(sums.std()) / math.sqrt(draws) + 1e-6 * largest
        assert abs(float(sums.mean()) - float(value.sum())) <= error, key


def test_several_draws_are_the_mean_of_single_ones():
    model, batch = build("bert", 4)
    one = estimate_fisher(model, [batch], fisher_type="sampled", num_draws=1, seed=3)
    many = estimate_fisher(model, [batch], fisher_type="sampled", num_draws=400, seed=3)
    exact = estimate_fisher(model, [batch], fisher_type="exact")
    key = "classifier.weight"
    assert not torch.allclose(one.diagonal[key], exact.diagonal[key], rtol=0.02)
    total = float(exact.diagonal[key].sum())
    assert float(many.diagonal[key].sum()) == pytest.approx(total, rel=0.2)


def test_sampled_labels_depend_on_the_example_and_the_seed_alone():
    model, batch = build("llama", 6)
    examples = [{k: v[n] for k, v in batch.items()} for n in range(6)]
    runs = [
        estimate_fisher(model, examples, fisher_type="sampled", batch_size=size, seed=1)
        for size in (1, 2, 4, 6)
    ]
    other = estimate_fisher(model, examples, fisher_type="sampled", batch_size=6, seed=2)
    for run in runs[1:]:
        oracle.assert_close(run.diagonal, {k: v.double() for k, v in runs[0].diagonal.items()})
    assert not torch.allclose(
        other.diagonal["lm_head.weight"], runs[0].diagonal["lm_head.weight"], rtol=0.01
    )


def test_batched_squares_the_sum_over_a_batch():
    """B times the squared batch-mean gradient: half as many batches, other values."""
    model, batch = build("bert", 4)
    fisher = estimate_fisher(model, [batch], fisher_type="batched")
    twin = copy.deepcopy(model).double().eval()
    logp = twin(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    value = logp[range(4), batch["labels"]].mean()
    parameters = dict(twin.named_parameters())
    gradients = torch.autograd.grad(value, list(parameters.values()))
    expected = {k: 4 * g**2 for k, g in zip(parameters, gradients, strict=True)}
    oracle.assert_close(fisher.diagonal, expected)
    assert fisher.fisher_type == "batched"


def test_additive_over_shards_and_independent_of_order():
    model, batch = build("bert", 7)
    whole = estimate_fisher(model, [batch], fisher_type="empirical")
    flipped = {k: v.flip(0) for k, v in batch.items()}
    again = estimate_fisher(model, [flipped], fisher_type="empirical")
    first = estimate_fisher(model, [{k: v[:3] for k, v in batch.items()}], fisher_type="empirical")
    rest = estimate_fisher(model, [{k: v[3:] for k, v in batch.items()}], fisher_type="empirical")
    assert (first.num_examples, rest.num_examples, whole.num_examples) == (3, 4, 7)
    for key, value in whole.diagonal.items():
        combined = (3 * first.diagonal[key] + 4 * rest.diagonal[key]) / 7
        assert torch.allclose(value, combined, rtol=1e-4, atol=1e-8)
        assert torch.allclose(value, again.diagonal[key], rtol=1e-4, atol=1e-8)


def test_examples_without_a_labelled_position_are_not_counted():
    model, batch = build("gpt2_tied", 4)
    batch["labels"][1] = -100
    kept = {k: v[[0, 2, 3]] for k, v in batch.items()}
    fisher = estimate_fisher(model, [batch], fisher_type="empirical")
    assert fisher.num_examples == 3
    oracle.assert_close(fisher.diagonal, oracle.empirical(model, kept, shift=True))


def test_log_likelihood_of_the_user():
    model, batch = build("bert", 4)

    def log_likelihood(module, batch):
        logits = module(batch["input_ids"], batch["attention_mask"]).logits
        return logits.log_softmax(-1).gather(1, batch["labels"][:, None]).squeeze(1)

    mine = estimate_fisher(model, [batch], log_likelihood=log_likelihood, fallback="error")
    assert mine.fisher_type == "empirical"
    oracle.assert_close(mine.diagonal, oracle.empirical(model, batch))
    with pytest.raises(ValueError, match="log_likelihood"):
        estimate_fisher(model, [batch], log_likelihood=log_likelihood, fisher_type="exact")
    with pytest.raises(ValueError, match=r"shape \(\) for 4 examples"):
        estimate_fisher(model, [batch], log_likelihood=lambda m, b: log_likelihood(m, b).sum())


# Subsets of examples and parameters


def labelled_dataset(model_batch, repeats: int = 1) -> datasets.Dataset:
    rows = {k: v.tolist() * repeats for k, v in model_batch.items()}
    return datasets.Dataset.from_dict(rows)


def test_a_data_set_is_sampled_without_replacement():
    model, batch = build("bert", 8)
    data = labelled_dataset(batch)
    whole = estimate_fisher(model, data, fisher_type="empirical", num_samples=8, batch_size=3)
    oracle.assert_close(whole.diagonal, oracle.empirical(model, batch))
    some = estimate_fisher(model, data, fisher_type="empirical", num_samples=3, seed=1)
    subsets = [
        oracle.empirical(model, {k: v[list(rows)] for k, v in batch.items()})
        for rows in itertools.combinations(range(8), 3)
    ]
    matching = 0
    for subset in subsets:
        try:
            oracle.assert_close(some.diagonal, subset)
        except AssertionError:
            continue
        matching += 1
    assert matching == 1
    assert some.num_examples == 3


def test_stratified_draws_take_each_label_by_its_share():
    model = Classifier(2)
    seen = []

    def collate(examples):
        seen.extend(int(example["labels"]) for example in examples)
        x = torch.stack([example["x"] for example in examples])
        return {"x": x, "labels": torch.tensor([example["labels"] for example in examples])}

    data = [{"x": row, "labels": int(n >= 30)} for n, row in enumerate(features(40))]
    estimate_fisher(model, data, data_collator=collate, num_samples=8, stratified=True)
    assert sorted(seen) == [0] * 6 + [1] * 2
    with pytest.raises(ValueError, match="one class per example"):
        estimate_fisher(model, [{"x": features(1)[0]}] * 3, stratified=True)


def test_fewer_examples_than_asked_for_is_a_warning():
    model = Classifier(2)
    data = [{"x": row, "labels": 0} for row in features(5)]
    with pytest.warns(UserWarning, match="on 5 examples, fewer than the 200 asked"):
        assert estimate_fisher(model, data, num_samples=200).num_examples == 5


def test_selected_parameters_alone():
    model, batch = build("bert", 4)
    names = ["bert.encoder.layer.1.output.dense.weight", "classifier.bias"]
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", parameters=names)
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(True)
    expected = oracle.empirical(model, batch)
    assert list(fisher.diagonal) == names
    oracle.assert_close(fisher.diagonal, {name: expected[name] for name in names})


def test_frozen_parameters_are_left_out():
    model, batch = build("bert", 4)
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    expected = oracle.empirical(model, batch)
    assert not any("embeddings" in name for name in fisher.diagonal)
    oracle.assert_close(fisher.diagonal, expected)


def test_only_biases():
    model, batch = build("bert", 4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, oracle.empirical(model, batch))


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


def test_a_fisher_by_hand_is_checked():
    with pytest.raises(ValueError, match="never below 0"):
        Fisher({"w": torch.tensor([-1.0])})
    with pytest.raises(ValueError, match="not finite"):
        Fisher({"w": torch.tensor([math.nan])})
    with pytest.raises(TypeError, match="floating-point"):
        Fisher({"w": torch.tensor([1])})
    with pytest.raises(ValueError, match="at least one example"):
        Fisher({"w": torch.ones(1)}, 0)
    with pytest.raises(ValueError, match="allowed are"):
        Fisher({"w": torch.ones(1)}, 1, "other")


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


class Tokens(nn.Module):
    """A class for each position of (batch, time, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        return {"logits": self.head(x)}


def test_items_of_a_data_set_are_examples_and_those_of_a_list_may_be_batches():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(6, 5, 4, generator=generator), torch.arange(30).view(6, 5) % 3
    items = [{"x": x[n], "labels": labels[n]} for n in range(6)]
    rows = datasets.Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})
    whole = estimate_fisher(Tokens(), iter([{"x": x, "labels": labels}]))
    for data in (rows.with_format("torch"), torch.utils.data.Subset(items, range(6))):
        fisher = estimate_fisher(Tokens(), data)
        assert fisher.num_examples == 6
        oracle.assert_close(fisher.diagonal, whole.diagonal)


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


def test_large_gradients_in_fp16():
    """Sums over positions above 65504 / 1024."""
    model = Tokens()
    with torch.no_grad():
        model.head.weight.zero_()
    batch = {"x": 4 * torch.ones(2, 400, 4), "labels": torch.zeros(2, 400, dtype=torch.long)}
    expected = estimate_fisher(model, iter([batch]), fisher_type="empirical")
    half = {**batch, "x": batch["x"].half()}
    fisher = estimate_fisher(model.half(), iter([half]), fisher_type="empirical")
    assert float(expected.diagonal["head.weight"].max()) > 1000**2
    oracle.assert_close(fisher.diagonal, expected.diagonal, 0.01)


def test_a_collator_that_packs_examples_is_given_them_one_by_one():
    def packing(examples):
        return {
            "x": torch.cat([e["x"] for e in examples]).unsqueeze(0),
            "labels": torch.cat([e["labels"] for e in examples]).unsqueeze(0),
        }

    x, labels = features(12).view(3, 4, 4), classes(12, 3).view(3, 4)
    examples = [{"x": x[n], "labels": labels[n]} for n in range(3)]
    fisher = estimate_fisher(Tokens(), examples, data_collator=packing)
    assert fisher.num_examples == 3
    expected = estimate_fisher(Tokens(), iter([{"x": x, "labels": labels}]))
    oracle.assert_close(fisher.diagonal, expected.diagonal)


def test_which_parameters_are_asked_for():
    model, batch = build("gpt2_tied")
    by_alias = estimate_fisher(model, [batch], parameters=["lm_head.weight"], seed=1)
    assert list(by_alias.diagonal) == ["transformer.wte.weight"]
    with pytest.raises(TypeError, match="needed is a list of names"):
        estimate_fisher(model, [batch], parameters="lm_head.weight")
    with pytest.raises(ValueError, match="parameters is empty"):
        estimate_fisher(model, [batch], parameters=[])


def test_fishers_compare():
    fisher = Fisher({"a": torch.ones(2)}, 3)
    assert fisher == Fisher({"a": torch.ones(2)}, 3)
    assert fisher != Fisher({"a": torch.zeros(2)}, 3)
    assert fisher != Fisher({"a": torch.ones(2)}, 4)


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


def test_the_type_does_not_hang_on_an_example_without_labels():
    model, batch = build("llama")
    batch["labels"][0] = -100
    assert estimate_fisher(model, [batch]).fisher_type == "sampled"


# ---- Labels of an example ----


def test_a_classifier_has_one_label_an_example():
    assert estimate_fisher(bert(), Examples("bert", 5)).labels_per_example == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_labels_of_a_language_model_are_its_labelled_tokens(batch_size):
    examples = Examples("llama", 5)  # the first of six tokens is no label, and i % 4 more are none
    labels = [int((examples[i]["labels"][1:] != -100).sum()) for i in range(5)]
    fisher = estimate_fisher(llama(), examples, batch_size=batch_size)
    assert fisher.labels_per_example == pytest.approx(sum(labels) / 5)


def test_examples_without_a_label_do_not_count_in_the_mean():
    rows = [dict(Examples("llama", 1)[0]) for _ in range(3)]
    rows[1]["labels"] = torch.full_like(rows[1]["labels"], -100)
    fisher = estimate_fisher(llama(), rows, batch_size=3)
    assert (fisher.num_examples, fisher.labels_per_example) == (2, 5.0)
