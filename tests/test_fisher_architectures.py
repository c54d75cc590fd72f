"""Every trainable parameter of many architectures against a float64 batch-of-one loop."""

from __future__ import annotations

import copy

import fisher_oracle as oracle
import pytest
import torch
from architectures import ARCHITECTURES, build

from hf_ewc import estimate_fisher

# Position t predicts label t + 1 in these, written down by hand.
SHIFTED = {
    "gpt2_tied", "opt", "llama", "llama_tied", "qwen", "gemma", "phi", "mixtral",
    "mixtral_eager", "gpt_oss", "llama_lora", "llama_dora", "gpt_neox", "falcon", "mamba",
    "deepseek", "jetmoe",
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_a_loop_over_single_examples(name):
    """In one batch and in batches of two with a short last one, by the fast way alone."""
    model, batch = build(name)
    expected = oracle.empirical(model, batch, shift=name in SHIFTED)
    examples = [oracle.example(batch, n) for n in range(5)]
    split = [
        {key: torch.cat([one[key] for one in examples[start : start + 2]]) for key in batch}
        for start in (0, 2, 4)
    ]
    for batches in ([batch], split):
        fisher = estimate_fisher(model, batches, fisher_type="empirical", fallback="error")
        assert fisher.num_examples == 5
        oracle.assert_close(fisher.diagonal, expected)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2_tied", "gemma", "t5", "albert", "swin"])
@pytest.mark.parametrize("examples", [2, 3, 7, 8])
def test_any_batch_size(name, examples):
    """Sizes that divide lengths, heads or windows must not be taken for the batch axis."""
    model, batch = build(name, examples)
    expected = oracle.empirical(model, batch, shift=name in SHIFTED)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)


@pytest.mark.parametrize("name", ["bert", "llama_tied", "vit", "t5"])
def test_eager_attention(name):
    model, batch = build(name)
    model.set_attn_implementation("eager")
    expected = oracle.empirical(model, batch, shift=name in SHIFTED)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, expected)


CHECKPOINTED = ["bert", "vit", "gpt2_tied", "llama", "gemma", "mixtral", "t5", "bart", "llama_lora"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant):
    """Checkpointing stays on in the estimate, and the reentrant kind is switched."""
    model, batch = build(name)
    expected = oracle.empirical(model, batch, shift=name in SHIFTED)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs = _count_layer_runs(model)
    fisher = estimate_fisher(
        model, [batch], fisher_type="empirical", fallback="error", batch_size=5
    )
    oracle.assert_close(fisher.diagonal, expected)
    assert runs["inside"] > runs["outside"] > 0  # forwards without a backward recompute nothing
    assert model.training


def _count_layer_runs(model):
    """How often a checkpointed layer was called, and how often what is inside it ran."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    runs = {"outside": 0, "inside": 0}

    def count(key):
        def hook(*_):
            runs[key] += 1

        return hook

    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.register_forward_pre_hook(count("outside"))
    linear = next(m for m in layer.modules() if m.__class__.__name__ in ("Linear", "Conv1D"))
    linear.register_forward_pre_hook(count("inside"))
    return runs


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_train_mode_without_dropout_is_the_same(name):
    model, batch = build(name)
    before = estimate_fisher(model, [batch], fisher_type="empirical").diagonal
    model.train()
    after = estimate_fisher(model, [batch], fisher_type="empirical").diagonal
    for key, value in before.items():
        assert torch.equal(value, after[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_half_precision(name, dtype):
    """Right to the precision of the model: squares are summed in fp32."""
    model, batch = build(name, 8)
    model = model.to(dtype)
    expected = oracle.empirical(copy.deepcopy(model).double(), batch, shift=name in SHIFTED)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    fisher = estimate_fisher(model, [cast], fisher_type="empirical", fallback="error")
    for key, value in fisher.diagonal.items():
        assert value.dtype == torch.float32
        wanted = expected[key].sum()
        if wanted > 1e-6 * max(v.sum() for v in expected.values()):
            assert float((value.sum() - wanted).abs() / wanted) < 0.1, key


def test_small_squares_do_not_underflow_in_half_precision():
    """fp16 holds nothing below 6e-8: the square of a gradient of 1e-4 would be 0."""
    model = torch.nn.Linear(4, 2).half()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    batch = {"input": torch.full((6, 4), 1e-4).half(), "labels": torch.tensor([0, 1] * 3)}
    diagonal = estimate_fisher(model, [batch], fisher_type="exact").diagonal
    x = float(torch.tensor(1e-4).half())
    assert diagonal["weight"] == pytest.approx(0.25 * x**2, rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_under_autocast(name):
    model, batch = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    expected = oracle.empirical(model, batch, shift=name in SHIFTED)
    for key, value in fast.diagonal.items():
        wanted = expected[key].sum()
        if wanted > 1e-4 * max(v.sum() for v in expected.values()):
            assert float((value.sum() - wanted).abs() / wanted) < 0.15, key
