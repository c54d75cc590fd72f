"""How many tokens an example may have, in the recipes and on the command line."""

import pytest
from test_lm_recipe import made_tokenizer
from transformers import BertConfig, BertTokenizerFast, LlamaConfig, RobertaConfig, T5Config

from hf_ewc.cli.lengths import fitting_length

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
BERT = BertConfig(max_position_embeddings=32)


def tokenizer(longest=None):
    options = {} if longest is None else {"model_max_length": longest}
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(SPECIAL)}, **options)


@pytest.mark.parametrize(
    ("asked", "given", "config", "expected"),
    [
        (16, tokenizer(), BERT, 16),
        (32, tokenizer(), BERT, 32),
        (128, tokenizer(), BERT, 32),
        (None, tokenizer(), BERT, 32),
        (128, tokenizer(24), BERT, 24),
        (None, tokenizer(24), BERT, 24),
        (128, tokenizer(), RobertaConfig(max_position_embeddings=34, pad_token_id=1), 32),
        (128, tokenizer(), LlamaConfig(max_position_embeddings=64), 64),
        (128, tokenizer(), T5Config(), 128),  # positions of any distance
    ],
)
def test_what_the_model_takes(asked, given, config, expected, caplog):
    assert fitting_length("max_length", asked, given, config) == expected
    is_told = asked is not None and asked > expected
    assert [f"max_length is {asked}; the model takes {expected}" in m for m in caplog.messages] == [
        True
    ] * is_told


@pytest.mark.parametrize(
    ("asked", "given", "texts", "needed"),
    [
        (2, tokenizer(), 1, 3),  # [CLS] and [SEP] alone
        (4, tokenizer(), 2, 5),
        (0, tokenizer(), 1, 3),
        (-3, tokenizer(), 1, 3),
        (1, made_tokenizer(), 1, 2),  # of one token alone there is nothing to foretell
    ],
)
def test_lengths_that_leave_nothing_of_a_text(asked, given, texts, needed):
    with pytest.raises(ValueError, match=f"max_length is {asked}, .*; needed are {needed} tokens"):
        fitting_length("max_length", asked, given, BERT, texts=texts)
    assert fitting_length("max_length", needed, given, BERT, texts=texts) == needed
