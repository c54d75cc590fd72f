"""Rows in which documents are packed: each document is an example of the Fisher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    TrainingArguments,
)

from hf_ewc import estimate_fisher
from hf_ewc.config import EWCConfig
from hf_ewc.training.packed_rows import taken_apart
from hf_ewc.training.trainer import EWCTrainer
from tests.models import bert
from tests.test_trainer_trl import RAW, SETTINGS, sft, small_llama, tokenizer
from tests.training import LAMBDA, relative_error

LENGTHS = [[3, 4], [5], [2, 2, 3]]
DOCUMENTS = 6

CAUSAL = small_llama()

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning", "ignore:.*[Ff]lash"
)


def row(lengths: list[int], number: int) -> dict[str, Any]:
    tokens = [3 + (7 * number + 5 * place) % 40 for place in range(sum(lengths))]
    positions = [position for length in lengths for position in range(length)]
    return {"input_ids": tokens, "labels": tokens, "position_ids": positions}


def rows() -> list[dict[str, Any]]:
    return [row(lengths, number) for number, lengths in enumerate(LENGTHS)]


def documents() -> list[list[int]]:
    found = []
    for lengths, whole in zip(LENGTHS, rows(), strict=True):
        tokens = whole["input_ids"]
        for length in lengths:
            found.append(tokens[:length])
            tokens = tokens[length:]
    return found


def streamed(of: Dataset) -> IterableDataset:
    return of.to_iterable_dataset()


@pytest.mark.parametrize("kind", [lambda data: data, streamed], ids=["Dataset", "stream"])
def test_positions_that_begin_again_tell_documents_apart(
    kind: Callable[[Dataset], Any], tmp_path: Path
) -> None:
    model = small_llama()
    trainer = EWCTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForTokenClassification(tokenizer()),
        ewc_config=EWCConfig(ewc_lambda=LAMBDA, fisher_type="empirical", fisher_samples=DOCUMENTS),
    )
    state = trainer.consolidate(kind(Dataset.from_list(rows())))
    assert state.tasks[0].num_examples == DOCUMENTS
    labels = sum(len(tokens) - 1 for tokens in documents()) / DOCUMENTS
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for tokens in documents():
        ids = torch.tensor([tokens])
        model.zero_grad()
        (model(input_ids=ids, labels=ids).loss * (len(tokens) - 1)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad**2 / DOCUMENTS / labels
    found = dict(state.importance)
    assert relative_error(found, {name: expected[name] for name in found}) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}, {"position_ids_start": 2}],
    ids=["positions", "all that tells", "positions from 2"],
)
@pytest.mark.parametrize("size", [2, 6])
def test_batches_that_come_flattened(options: dict[str, Any], size: int) -> None:
    """One row of several documents, and positions that begin again with each."""
    model = small_llama()
    flattened = DataCollatorWithFlattening(**options)
    texts = documents()
    batches = [
        flattened([{"input_ids": tokens} for tokens in texts[start : start + size]])
        for start in range(0, DOCUMENTS, size)
    ]
    found = estimate_fisher(model, iter(batches), fisher_type="empirical")
    assert found.num_examples == DOCUMENTS
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    first = options.get("position_ids_start", 0)
    for tokens in texts:
        ids = torch.tensor([tokens])
        model.zero_grad()
        own = torch.arange(first, first + len(tokens))[None]
        loss = model(input_ids=ids, labels=ids, position_ids=own).loss
        (loss * (len(tokens) - 1)).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad**2 / DOCUMENTS
    assert relative_error(dict(found.diagonal), expected) < 1e-5


def with_positions(positions: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"input_ids": [5, 6, 7, 8], "position_ids": positions, **columns}]


@pytest.mark.parametrize(
    "whole",
    [
        with_positions([0, 1, 2, 3]),
        with_positions([2, 3, 4, 5]),
        with_positions([0, 0, 0, 1], attention_mask=[0, 0, 1, 1]),  # padding at the left
        with_positions([1, 1, 0, 1]),
        with_positions([0, 1, 0, 1], labels=1),  # two segments of a text with one label
        with_positions([[0, 1, 0, 1]] * 3),  # of images
        [{"input_ids": [5, 6, 7, 8]}],
    ],
    ids=["one", "from 2", "padded", "padded by 1", "segments", "images", "none"],
)
def test_a_row_that_is_not_packed_stays_whole(whole: list[dict[str, Any]]) -> None:
    data = Dataset.from_list(whole)
    assert taken_apart(data, CAUSAL) is data
    apart = list(taken_apart(streamed(data), CAUSAL))
    assert [one["input_ids"] for one in apart] == [one["input_ids"] for one in whole]
    counted = [0, 1, 2, 3]  # are the model's own positions
    expected = [{k: v for k, v in one.items() if v != counted} for one in whole]
    assert apart == expected


@pytest.mark.parametrize(
    "columns",
    [{}, {"seq_lengths": [2, 2]}, {"seq_lengths": 4}],
    ids=["positions", "lengths of both texts", "a length"],
)
def test_a_model_that_sees_the_whole_row_is_given_it(columns: dict[str, Any]) -> None:
    """An encoder, whose positions begin again in the second text of a pair."""
    encoder = bert()
    data = Dataset.from_list(with_positions([0, 1, 0, 1], labels=[0, 1, 0, 1], **columns))
    assert taken_apart(data, encoder) is data
    assert [*taken_apart(streamed(data), encoder)] == [*data]


def test_other_lengths_of_a_row_are_none_of_documents() -> None:
    for columns in ({"seq_lengths": 4}, {"seq_lengths": [1, 1]}):
        data = Dataset.from_list(with_positions([0, 1, 2, 3], **columns))
        assert taken_apart(data, CAUSAL) is data
        assert [one["input_ids"] for one in taken_apart(streamed(data), CAUSAL)] == [[5, 6, 7, 8]]


def test_what_is_there_for_each_token_goes_with_it() -> None:
    lengths = {"seq_lengths": [1, 3], "weights": [[1], [2], [3], [4]], "title": "ab"}
    data = Dataset.from_list(with_positions([0, 0, 1, 2], **lengths))
    apart = taken_apart(data, CAUSAL)
    for found in (
        list(taken_apart(streamed(data), CAUSAL)),
        [apart[place] for place in range(len(apart))],
    ):
        assert [one["input_ids"] for one in found] == [[5], [6, 7, 8]]
        assert [one["weights"] for one in found] == [[[1]], [[2], [3], [4]]]
        assert [one["seq_lengths"] for one in found] == [[1], [3]]
        assert {one["title"] for one in found} == {"ab"}


def test_a_stream_that_the_trainer_has_packed(tmp_path: Path) -> None:
    expected = sft(RAW["text"], tmp_path).consolidate()
    options = {"packing": True, "packing_strategy": "bfd", "max_steps": 1}
    trainer = sft(RAW["text"], tmp_path, streams=True, **options)
    trainer.ewc_config.fisher_samples = DOCUMENTS
    found = trainer.consolidate()
    assert found.tasks[0].num_examples == DOCUMENTS
    assert relative_error(dict(found.importance), dict(expected.importance)) < 1e-5


def test_rows_that_do_not_tell_are_said_to_be_an_example_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = sft(RAW["text"], tmp_path, packing=True, packing_strategy="wrapped")
    state = trainer.consolidate()
    assert state.tasks[0].num_examples == len(trainer.train_dataset)
    assert len([text for text in caplog.messages if "packed row is one example" in text]) == 1
