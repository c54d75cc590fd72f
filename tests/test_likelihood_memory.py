"""Outputs as large as a vocabulary for each position: right in slices, and no copies of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ewc import estimate_fisher
from hf_ewc.fisher.likelihood import slices
from hf_ewc.fisher.likelihood.categorical import Categorical, draw_classes
from hf_ewc.fisher.likelihood.forward import Outputs
from hf_ewc.fisher.likelihood.made_up_labels import possible_classes
from hf_ewc.fisher.likelihood.observing import few_positions

CLASSES, POSITIONS = 31, 7


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "_SLICE", 2 * CLASSES)


def logits_and_labels(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, POSITIONS, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, POSITIONS), generator=generator)
    labels[0, 2:4] = -100
    labels[1] = -100
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_log_likelihood_and_its_gradient_are_cross_entropys(small_slices, dtype):
    logits, labels = logits_and_labels(dtype)
    wide = logits.detach().double().requires_grad_()
    expected = -F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
    (2.5 * expected).backward()
    actual = slices.log_likelihood(logits, labels)
    (2.5 * actual).backward()
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float(actual.detach()) == pytest.approx(
        float(expected.detach()), rel=min(tolerance, 1e-5)
    )
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


def test_classes_of_probability_0_have_no_gradient(small_slices):
    logits, labels = logits_and_labels()
    with torch.no_grad():
        logits[..., 5] = -torch.inf
        labels[labels == 5] = 4
    slices.log_likelihood(logits, labels).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[..., 5].any()


def test_draws_passes_and_possible_classes_are_those_of_the_whole(monkeypatch):
    logits, labels = logits_and_labels()
    logits = logits.detach().index_fill(-1, torch.tensor([3, 9]), -torch.inf)
    uniforms = torch.rand(POSITIONS, generator=torch.Generator().manual_seed(1))

    def found():
        return (
            draw_classes(logits[0], uniforms),
            Categorical(logits, labels).num_exact_passes,
            possible_classes(logits, -1),
        )

    whole = found()
    monkeypatch.setattr(slices, "_SLICE", 1)
    in_slices = found()
    assert torch.equal(whole[0], in_slices[0])
    assert whole[1] == in_slices[1] == POSITIONS * (CLASSES - 3)
    assert torch.equal(whole[2], in_slices[2])


def test_what_differs_in_one_slice_is_told(small_slices):
    one = torch.randn(3, POSITIONS, CLASSES, generator=torch.Generator().manual_seed(2))
    one[0, 0, 0] = -torch.inf
    assert slices.close(one, one + 1e-6 * one.nan_to_num(neginf=0))
    other = one.clone()
    other[-1, -1, -1] += 0.1
    assert not slices.close(one, other)
    other = one.clone()
    other[-1, -1, -1] = torch.inf
    assert not slices.close(one, other)
    assert not slices.close(one, one[:2])


class Largest(TorchDispatchMode):
    """Adds up by dtype what is held at most in tensors of at least this many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                if storage >= self.elements:
                    self.seen.setdefault(tensor.dtype, []).append((str(func), tuple(tensor.shape)))
        return result


def language_model(vocabulary):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


@pytest.mark.parametrize("fisher_type", ["auto", "sampled", "empirical"])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 160), (4, 160), (4, 48)])
def test_nothing_as_large_as_the_outputs_is_made_but_these_and_their_gradient(
    fisher_type, batch_size, length, monkeypatch
):
    vocabulary = 512
    monkeypatch.setattr(slices, "_SLICE", 4 * vocabulary)
    model = language_model(vocabulary)
    texts = torch.randint(vocabulary, (4, length))
    data = [{"input_ids": text, "labels": text} for text in texts]
    size = batch_size * length * vocabulary
    with Largest(size // 2 if batch_size > 1 else size) as largest:
        estimate_fisher(model, data, fisher_type=fisher_type, batch_size=batch_size)
    assert set(largest.seen) == {torch.float32}
    makers = {name for name, shape in largest.seen[torch.float32] if math.prod(shape) >= size}
    assert not makers & {"aten._log_softmax.default", "aten._softmax.default", "aten.clone.default"}


def test_scores_of_few_examples_are_compared_with_those_of_the_same():
    scores = torch.arange(12.0).reshape(3, 2, 2)
    assert Outputs(scores).of_examples([2]).logits.tolist() == [[[8.0, 9.0], [10.0, 11.0]]]


def test_exact_over_a_vocabulary_is_refused_with_the_number_of_passes():
    text = torch.arange(11)
    data = [{"input_ids": text, "labels": text}, {"input_ids": text, "labels": text}]
    with pytest.raises(ValueError, match=r"would take 5,110 backward passes.*'sampled'"):
        estimate_fisher(language_model(512), data, fisher_type="exact")
    assert estimate_fisher(language_model(512), data).fisher_type == "sampled"
    few = estimate_fisher(language_model(100), data, fisher_type="exact")  # 990 passes
    assert few.fisher_type == "exact"


def test_a_long_text_is_observed_by_a_part_that_has_labels_of_all():
    ids = torch.arange(400).reshape(2, 200)
    labels = ids.masked_fill(torch.arange(200) < 150, -100)
    part = few_positions({"input_ids": ids, "labels": labels})
    assert part["input_ids"].shape == part["labels"].shape == (2, 64)
    assert int((part["labels"] != -100).sum(1).min()) == 50
    apart = labels.clone()
    apart[0] = -100
    apart[0, :50] = 1  # no part has labels of both
    assert few_positions({"input_ids": ids, "labels": apart}) is None
    assert few_positions({"input_ids": ids, "labels": labels, "pixels": ids[:, :9]}) is None
