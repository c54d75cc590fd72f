"""Types, likelihoods, subsets, errors, and the model left as it was found."""

from __future__ import annotations

import copy
import itertools
import math

import fisher_oracle as oracle
import pytest
import torch
import transformers as t
from architectures import build, classes, tokens
from fishers import Classifier, Tokens, features, mean, squared_scores
from torch import nn

from hf_ewc import Fisher, estimate_fisher


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


def test_fishers_compare():
    fisher = Fisher({"a": torch.ones(2)}, 3)
    assert fisher == Fisher({"a": torch.ones(2)}, 3)
    assert fisher != Fisher({"a": torch.zeros(2)}, 3)
    assert fisher != Fisher({"a": torch.ones(2)}, 4)


def test_the_type_does_not_hang_on_an_example_without_labels():
    model, batch = build("llama")
    batch["labels"][0] = -100
    assert estimate_fisher(model, [batch]).fisher_type == "sampled"
