"""How many tokens an example may have: what was asked for, and what the model takes."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("hf_ewc")

# Their positions begin behind that of the padding token, so that they take fewer than they have.
_BEGIN_BEHIND_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "xmod"),
    *("data2vec-text", "longformer", "mpnet", "ibert", "luke", "markuplm", "layoutlmv3"),
)


def longest_example(tokenizer: Any, config: Any) -> int:
    """The most tokens that model and tokenizer take, special ones included."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if config.model_type in _BEGIN_BEHIND_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    return min(int(tokenizer.model_max_length), positions if positions > 0 else 1 << 30)


def fitting_length(
    name: str, asked: int | None, tokenizer: Any, config: Any, *, texts: int = 1
) -> int:
    """The tokens of an example, special ones included: as asked for, or what the model takes.

    Args:
        name: of the setting, for what is said.
        asked: None for as many as the model takes.
        texts: of an example; each keeps a token at least.

    Raises:
        ValueError: nothing of a text would be left.
    """
    fewest = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if asked is not None and asked < max(fewest, 2):
        raise ValueError(
            f"{name} is {asked}, in which nothing of a text is left; needed are {max(fewest, 2)} "
            "tokens or more."
        )
    longest = longest_example(tokenizer, config)
    if asked is not None and asked > longest:
        logger.warning(
            "%s is %d; the model takes %d tokens, which is what examples are cut to.",
            name,
            asked,
            longest,
        )
    return longest if asked is None else min(asked, longest)
