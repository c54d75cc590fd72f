"""Labels and outputs in the forms that models and collators give them."""

from __future__ import annotations

import itertools

import fisher_oracle as oracle
import pytest
import torch
import transformers as t
from architectures import DECODER, SMALL, build, classes, language
from fishers import Classifier, features, mean, squared_scores
from torch import nn

from hf_ewc import estimate_fisher


def empirical(model, batch):
    return estimate_fisher(model, [batch], fisher_type="empirical", fallback="error").diagonal


class Wrapped(nn.Module):
    """A module around a language model that says nothing of its arguments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs):
        return self.inner(**kwargs)


class Tagger(Wrapped):
    """Returns logits at each position and no loss."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.inner(input_ids=input_ids, attention_mask=attention_mask).logits}


class Tuples(Tagger):
    """Returns what a model does with return_dict=False."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return (outputs.logits,) if labels is None else (outputs.loss, outputs.logits)


@pytest.mark.parametrize("wrapper", [Wrapped, Tuples])
def test_the_shift_is_found_behind_a_wrapper(wrapper):
    model, batch = build("gpt2_tied", 3)
    expected = oracle.empirical(model, batch, shift=True)
    actual = empirical(wrapper(model), batch)
    oracle.assert_close({k.removeprefix("inner."): v for k, v in actual.items()}, expected)


def test_the_shift_is_found_after_a_batch_without_labels():
    model, batch = build("bert_tokens", 3)
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    actual = estimate_fisher(model, [none, batch], fisher_type="empirical")
    assert actual.num_examples == 3
    oracle.assert_close(actual.diagonal, oracle.empirical(model, batch))


def test_labels_without_a_loss_belong_to_their_positions():
    model, batch = build("bert_tokens", 3)
    actual = empirical(Tagger(model), batch)
    expected = oracle.empirical(model, batch)
    oracle.assert_close({k.removeprefix("inner."): v for k, v in actual.items()}, expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(["bert", "bert_tokens", "gpt2_tied"], [torch.int32, torch.int8]),
        ("bert", torch.uint8),  # no byte can be -100
    ],
)
def test_labels_of_any_integer_type(name, dtype):
    model, batch = build(name, 3)
    expected = empirical(model, batch)
    actual = empirical(model, {**batch, "labels": batch["labels"].to(dtype)})
    for key, value in expected.items():
        assert torch.equal(value, actual[key])


def test_virtual_tokens_of_a_prompt_have_no_labels():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), adapter).eval()
    batch = language(4)
    (name, prompt), *_ = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    expected = torch.zeros_like(prompt)
    for n in range(4):
        one = oracle.example(batch, n)
        count = (one["labels"] != -100).sum()
        expected += torch.autograd.grad(model(**one).loss * count, prompt)[0] ** 2 / 4
    actual = empirical(model, batch)
    assert list(actual) == [name]
    assert torch.allclose(actual[name], expected, rtol=1e-4)


def test_heads_that_are_not_known_are_refused():
    two_heads = t.BertForPreTraining(t.BertConfig(**SMALL))
    with pytest.raises(ValueError, match="holds next_sentence_label besides"):
        empirical(two_heads, {**language(3), "next_sentence_label": classes(3, 2)})


class Labelled(Classifier):
    """Inputs and labels whose names speak of labels."""

    def forward(self, x, labels=None, label_mask=None, label_intent=None, labels_2=None):
        x = x if label_mask is None else x * label_mask[:, None]
        x = x if labels_2 is None else x + labels_2[:, None]
        logits = super().forward(x)["logits"]
        if labels is None:
            return {"logits": logits}
        loss = torch.nn.functional.cross_entropy(logits, labels)
        if label_intent is not None:
            loss = loss + torch.nn.functional.cross_entropy(logits, label_intent)
        return {"loss": loss, "logits": logits}


def test_an_input_may_speak_of_labels():
    batch = {"x": features(), "labels": classes(6)}
    mask = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0])
    found = empirical(Labelled(3), {**batch, "label_mask": mask})
    masked = {**batch, "x": features() * mask[:, None]}
    model = Labelled(3)
    logp = model(masked["x"])["logits"].log_softmax(-1)
    expected = mean(
        squared_scores(model, [row[y] for row, y in zip(logp, classes(6), strict=True)]), 6
    )
    oracle.assert_close(found, expected)


@pytest.mark.parametrize("name", ["label_intent", "labels_2", "label_weights"])
def test_further_labels_are_refused(name):
    """What changes the loss alone, what is named as labels are, and what the forward has not."""
    batch = {"x": features(), "labels": classes(6), name: classes(6)}
    with pytest.raises(ValueError, match=f"holds {name} besides"):
        empirical(Labelled(3), batch)
