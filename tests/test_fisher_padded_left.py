"""Texts with padding before them: what counts of one does not depend on the others of its batch.

The oracle: each text alone, without padding, in float64.
"""

from __future__ import annotations

import warnings

import fisher_oracle as oracle
import pytest
import torch
import transformers as t

from hf_ewc import estimate_fisher

SIZES = [3, 7, 5, 7, 2, 6]


def texts():
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(1, 30, (size,), generator=generator)} for size in SIZES]


def padded(left, positions=False):
    """A collator for rows of tokens; 0 and −100 where there is none."""

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids = row["input_ids"]
            missing = longest - len(ids)
            sides = (missing, 0) if left else (0, missing)
            pad = torch.nn.functional.pad
            batch["input_ids"].append(pad(ids, sides))
            batch["labels"].append(pad(ids, sides, value=-100))
            batch["attention_mask"].append(pad(torch.ones_like(ids), sides))
        batch = {name: torch.stack(values) for name, values in batch.items()}
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    return collate


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = t.LlamaConfig(**sizes, vocab_size=30, intermediate_size=12, pad_token_id=0)
    return t.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = t.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=30, n_positions=16, **off)
    return t.GPT2LMHeadModel(config)


def alone(model):
    """(1/N) Σ_n (∂ log p)² of texts without padding."""
    found = [padded(left=False)([row]) for row in texts()]
    parts = [oracle.empirical(model, batch, shift=True) for batch in found]
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("make", "left", "positions"),
    [
        *((llama, left, positions) for left in (True, False) for positions in (True, False)),
        (gpt2, False, True),
        (gpt2, False, False),
        (gpt2, True, True),  # without positions they count from the padding: see below
    ],
)
def test_each_text_is_as_alone(make, positions, left, batch_size):
    model = make().eval()
    options = {"fisher_type": "empirical", "batch_size": batch_size, "fallback": "error"}
    found = estimate_fisher(model, texts(), data_collator=padded(left, positions), **options)
    assert found.labels_per_example == pytest.approx(sum(SIZES) / len(SIZES) - 1)
    oracle.assert_close(found.diagonal, alone(model), relative=1e-4)


def test_positions_that_count_from_the_padding_are_said():
    with pytest.warns(UserWarning, match="other logits for a text with padding before it"):
        estimate_fisher(gpt2(), texts(), data_collator=padded(left=True), batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_fisher(gpt2(), texts(), data_collator=padded(left=True), batch_size=1)
        estimate_fisher(gpt2(), texts()[1:2] * 4, data_collator=padded(left=True), batch_size=2)


def test_texts_that_come_padded_are_as_they_come():
    """What is predicted from padding counts as in their loss, whatever the size of the batches."""
    rows = [dict(zip(padded(left=True)(texts()), row, strict=True)) for row in zip(
        *padded(left=True)(texts()).values(), strict=True)]  # fmt: skip
    model = llama().eval()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected = oracle.empirical(model, batch, shift=True)
    for given in (rows, [batch]):
        for batch_size in (1, 3):
            found = estimate_fisher(model, given, fisher_type="empirical", batch_size=batch_size)
            oracle.assert_close(found.diagonal, expected, relative=1e-4)
