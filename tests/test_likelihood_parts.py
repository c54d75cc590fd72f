"""A forward that only looks at the loss runs what is new in it."""

import pytest
import torch
import transformers as t
from torch import nn
from torch.nn import functional as F

from hf_ewc import estimate_fisher
from hf_ewc.fisher.likelihood.parts import Parts


class Body(nn.Linear):
    def forward(self, x, noise=0.0):
        return super().forward(x) + noise


class Whole(nn.Module):
    def __init__(self, *, writes=False, shows_labels=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(5, 4), nn.Linear(4, 3)
        self.writes, self.shows_labels = writes, shows_labels

    def forward(self, x, labels=None):
        hidden = self.body(x, noise=0.0 if labels is None or not self.shows_labels else 1.0)
        if self.writes:
            hidden += 1.0
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
BATCH = {"x": X, "labels": torch.arange(6) % 3}


def rows_run(model, batches, **options):
    """Of the body, all in all."""
    seen = []
    forward = model.body.forward
    model.body.forward = lambda x, **other: seen.append(len(x)) or forward(x, **other)
    estimate_fisher(model, batches, fallback="error", **options)
    return sum(seen)


def test_the_first_batch_says_by_its_own_forward_what_the_outputs_mean():
    alone = 2  # examples, to prove that they were kept apart
    for number in (1, 3):
        assert rows_run(Whole(), [BATCH] * number, fisher_type="empirical") == 6 * number + alone


@pytest.mark.parametrize("option", ["writes", "shows_labels"])
def test_what_is_not_the_same_is_run(option):
    """A result that was written to, and a part that is called with something else."""
    model = Whole(**{option: True})
    found = estimate_fisher(model, [BATCH], fisher_type="empirical")
    total = torch.zeros(3, 4)
    for x, y in zip(X, BATCH["labels"], strict=True):
        one = Whole(**{option: True})
        one.shows_labels = option == "shows_labels"
        loss = one(x[None], labels=y[None])["loss"]
        total += torch.autograd.grad(loss, one.head.weight)[0].square()
    torch.testing.assert_close(found.diagonal["head.weight"], total / 6)


class WritesWithLabels(Whole):
    """Writes to what its body returned where it is given labels, which spoils the graph."""

    def forward(self, x, labels=None):
        hidden = self.body(x)
        logits = self.head(hidden)
        if labels is not None:
            hidden *= 0
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_a_forward_whose_parts_are_written_to_afterwards_is_run_again():
    found = estimate_fisher(WritesWithLabels(), [BATCH], fisher_type="empirical")
    model, total = WritesWithLabels(), torch.zeros(4, 5)
    for x, y in zip(X, BATCH["labels"], strict=True):
        loss = F.cross_entropy(model(x[None])["logits"], y[None])
        total += torch.autograd.grad(loss, model.body.weight)[0].square()
    torch.testing.assert_close(found.diagonal["body.weight"], total / 6)


def test_parts_give_back_what_they_returned_for_the_same_arguments_alone():
    model = Whole()
    parts = Parts.of(model)
    with torch.no_grad():
        with parts.noted():
            first = model(X)["logits"]
        with parts.repeated():
            assert model(X.clone())["logits"] is first
            assert model(X + 1)["logits"] is not first
            assert model.body(X, noise=1.0) is not model.body(X)
            with torch.enable_grad():
                assert model(X)["logits"].requires_grad
        assert "forward" not in vars(model.body)
        first += 1.0
        with parts.repeated():
            assert torch.equal(model(X)["logits"], model(X)["logits"])
            assert model(X)["logits"] is not first
        parts.forget()
        with parts.repeated():
            assert model(X)["logits"] is not model(X)["logits"]


def test_a_decoder_of_texts_is_run_once_on_a_few_positions():
    config = t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, use_cache=False)
    model = t.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (4, 96), generator=torch.Generator().manual_seed(0))
    seen = []
    forward = model.transformer.forward
    model.transformer.forward = lambda ids, **other: (
        seen.append(ids.numel()) or forward(ids, **other)
    )
    data = [{"input_ids": ids, "labels": ids}] * 2
    estimate_fisher(model, data, fisher_type="empirical", fallback="error")
    assert sum(seen) == 2 * 64 + 2 * 4 * 96 + 2 * 96  # two alone, to prove that they are apart
