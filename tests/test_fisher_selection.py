"""Which examples and parameters take part, and what counts as a label."""

from __future__ import annotations

import itertools

import datasets
import fisher_oracle as oracle
import pytest
import torch
from architectures import build, classes
from fishers import Classifier, Tokens, features
from models import Examples, bert, llama
from torch import nn

from hf_ewc import estimate_fisher

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


class Filtered(nn.Module):
    """A complex weight for each frequency."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
        self.head = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        return {"logits": self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))}


def test_complex_parameters_are_refused_and_may_be_left_out():
    model = Filtered()
    batch = {"x": features(), "labels": classes(6)}
    for names in (None, ["head.weight", "filter"]):
        with pytest.raises(ValueError, match=r"'filter' are complex \(complex64\).*real parameter"):
            estimate_fisher(model, iter(()), parameters=names)  # before anything is read
    fisher = estimate_fisher(model, [batch], parameters=["head.weight", "head.bias"])
    expected = torch.zeros(3)
    for p in model(features())["logits"].softmax(-1).detach():
        expected += p * (1 - p) / 6
    torch.testing.assert_close(fisher.diagonal["head.bias"], expected)
