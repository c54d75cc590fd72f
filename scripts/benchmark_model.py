"""The model that the benchmarks of training and of several processes measure."""

from __future__ import annotations

from transformers import BertConfig, BertForSequenceClassification, set_seed

VOCABULARY = 30522


def make_model() -> BertForSequenceClassification:
    """BERT of 22.7 million parameters with random weights, the same each time."""
    set_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    return BertForSequenceClassification(config)
