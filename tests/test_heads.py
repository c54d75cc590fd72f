"""The class mask: what is outside a task's classes has probability and gradient exactly 0."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ewc.tasks.class_mask import MASKED, ClassMask, classification_heads

SIZES = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
TEXT = {
    **SIZES,
    "vocab_size": 20,
    "num_labels": 5,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}


def vit(num_labels=5):
    sizes = dict(image_size=4, patch_size=2, num_channels=1, num_labels=num_labels)
    return ViTForImageClassification(ViTConfig(**SIZES, **sizes))


def bert(**options):
    return BertForSequenceClassification(BertConfig(**{**TEXT, **options}))


def images():
    return {"pixel_values": torch.randn(3, 1, 4, 4), "labels": torch.tensor([1, 3, 1])}


def text():
    return {"input_ids": torch.randint(1, 20, (3, 6)), "labels": torch.tensor([1, 3, 1])}


MODELS = {
    "vit": (vit, images),
    "bert": (bert, text),
    "bert as wide as its labels": (lambda: bert(num_labels=8), text),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)), text),
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT)), text),
    "lora": (
        lambda: get_peft_model(
            bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
        ),
        text,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_masked_model_is_the_softmax_over_its_classes(name):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, batch = build().eval(), inputs()
    free = model(**batch).logits
    with ClassMask(model) as mask, mask.only([1, 3]):
        output = model(**batch)
        output.loss.backward()
    # The oracle: a softmax over the two logits alone.
    expected = nn.functional.cross_entropy(free[:, [1, 3]], torch.tensor([0, 1, 0]))
    torch.testing.assert_close(output.loss, expected)
    probabilities = output.logits.softmax(-1)
    outside = [c for c in range(free.shape[-1]) if c not in (1, 3)]
    assert (probabilities[:, outside] == 0).all()
    heads = [h for h in classification_heads(model) if h.weight.grad is not None]
    assert heads
    for head in heads:
        assert (head.weight.grad[outside] == 0).all()
        assert (head.weight.grad[[1, 3]] != 0).any()
    # And nothing of it stays.
    torch.testing.assert_close(model(**batch).logits, free, rtol=0, atol=0)


def test_the_fisher_is_that_of_a_head_with_the_tasks_classes_alone():
    torch.manual_seed(0)
    model, batch = vit().eval(), images()
    with ClassMask(model) as mask, mask.only([1, 3]):
        found = enumerated_fisher(model, batch)
    small = vit(num_labels=2).eval()
    weights = model.state_dict()
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][[1, 3]]
    small.load_state_dict(weights)
    expected = enumerated_fisher(small, batch)
    for name, value in expected.items():
        own = found[name][[1, 3]] if name.startswith("classifier") else found[name]
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-9)
    assert (found["classifier.weight"][[0, 2, 4]] == 0).all()


def enumerated_fisher(model, batch):
    """Σ_n Σ_y p(y|x_n) (∂ log p(y|x_n)/∂θ)² by a loop over examples and labels."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in batch["pixel_values"]:
        log_p = model(pixel_values=example[None]).logits.log_softmax(-1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, model.parameters(), retain_graph=True)
            for square, gradient in zip(total.values(), gradients, strict=True):
                square += value.exp().detach() * gradient**2
    return total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mask_is_exact_in_every_dtype(dtype):
    logits = torch.tensor([3.0, MASKED, -2.0], dtype=dtype, requires_grad=True)
    probabilities = logits.softmax(0)
    assert probabilities[1] == 0
    logits.log_softmax(0)[0].backward()
    assert logits.grad[1] == 0
    assert torch.isfinite(logits.log_softmax(0)).all()
    assert torch.tensor(MASKED, dtype=dtype).sigmoid() == 0


def test_a_compiled_model_sees_the_mask_change():
    torch.manual_seed(0)
    model, batch = vit().eval(), images()
    with ClassMask(model) as mask:
        compiled = torch.compile(model, backend="eager")
        for classes in ([0, 1], [2, 3, 4], None):
            with mask.only(classes):
                logits = compiled(pixel_values=batch["pixel_values"]).logits
                shown = (logits != MASKED).all(0).nonzero().flatten().tolist()
            assert shown == (classes or [0, 1, 2, 3, 4])


def test_plain_modules_and_bad_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with ClassMask(model) as mask:
        with mask.only([2]):
            assert model(torch.randn(2, 4)).argmax(-1).tolist() == [2, 2]
        with pytest.raises(ValueError, match="numbered from 0"), mask.only([3]):
            pass
        with pytest.raises(ValueError, match="at least one"), mask.only([]):
            pass
        with pytest.raises(ValueError, match="each once"), mask.only([1, 1]):
            pass
    with pytest.raises(ValueError, match="no linear head"):
        ClassMask(nn.Conv1d(1, 1, 1))
