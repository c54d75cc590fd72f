"""EWCMixin under TRL's trainers, whose losses are their own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ewc import SequenceConfig, Task, run_tasks
from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCMixin
from tests.models import VOCAB, llama, random_quadratic
from tests.training import (
    LAMBDA,
    GradientRecorder,
    difference,
    expected_penalty,
    expected_pull,
    relative_error,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


class EWCSFTTrainer(EWCMixin, SFTTrainer):
    """SFTTrainer with EWC."""


class EWCDPOTrainer(EWCMixin, DPOTrainer):
    """DPOTrainer with EWC."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def texts(number: int) -> list[str]:
    source = random.Random(0)
    return [
        " ".join(f"w{source.randrange(47)}" for _ in range(source.randrange(4, 9)))
        for _ in range(number)
    ]


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 1,
}

SFT = (SFTTrainer, EWCSFTTrainer, SFTConfig, {"max_length": 16})
DPO = (DPOTrainer, EWCDPOTrainer, DPOConfig, {"max_length": 32})


def data_for(config: type) -> Dataset:
    if config is SFTConfig:
        return Dataset.from_dict({"text": texts(12)})
    answers = {"chosen": [" w1 w2"] * 12, "rejected": [" w3 w4"] * 12}
    return Dataset.from_dict({"prompt": texts(12), **answers})


def small_llama() -> Any:
    return llama(pad_token_id=0, max_position_embeddings=64, eos_token_id=1)


def run(
    trainer: type[Trainer], config: type, settings: dict[str, Any], folder: Path, **options: Any
) -> tuple[list[Any], Any]:
    recorder = GradientRecorder()
    if config is DPOConfig:
        options["ref_model"] = small_llama()
    made = trainer(
        model=small_llama(),
        args=config(output_dir=str(folder), **SETTINGS, **settings),
        train_dataset=data_for(config),
        processing_class=tokenizer(),
        callbacks=[recorder],
        **options,
    )
    made.train()
    return recorder.steps, made


@pytest.mark.parametrize("case", [SFT, DPO], ids=["SFT", "DPO"])
def test_the_penalty_is_exact_and_logged(case: Any, tmp_path: Path) -> None:
    base, ewc, config, settings = case
    without, plain = run(base, config, settings, tmp_path)
    state = EWCState(*random_quadratic(small_llama()))
    options = {"ewc_config": EWCConfig(ewc_lambda=LAMBDA), "ewc_state": state}
    with_ewc, trainer = run(ewc, config, settings, tmp_path, **options)
    assert len(with_ewc) == 2
    for one, two in zip(without, with_ewc, strict=True):
        assert relative_error(difference(two, one), expected_pull(trainer)) < 1e-5
    penalty = expected_penalty(trainer)
    logs = [entry for entry in trainer.state.log_history if "ewc_penalty" in entry]
    plain_logs = [entry for entry in plain.state.log_history if "loss" in entry]
    for ours, theirs in zip(logs, plain_logs, strict=True):
        assert ours["ewc_penalty"] == pytest.approx(penalty, rel=1e-5)
        assert ours["task_loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_sft_evaluates_consolidates_and_saves(tmp_path: Path) -> None:
    trainer = EWCSFTTrainer(
        model=small_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_length=16,
            **{**SETTINGS, "save_strategy": "epoch", "learning_rate": 1e-2},
        ),
        train_dataset=data_for(SFTConfig),
        eval_dataset=Dataset.from_dict({"text": texts(4)}),
        processing_class=tokenizer(),
        ewc_config=EWCConfig(ewc_lambda=LAMBDA, fisher_samples=8),
    )
    before = trainer.evaluate()["eval_loss"]
    state = trainer.consolidate(name="chat")
    assert state.tasks[0].num_examples == 8
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    assert EWCState.from_pretrained(tmp_path / "checkpoint-2") == state
    card = (tmp_path / "README.md").read_text()
    assert "- ewc\n" in card
    assert "| chat |" in card


CHAT_TEMPLATE = (
    "{% for message in messages %}{% generation %}{{ message['role'] }} {{ message['content'] }} "
    "{% endgeneration %}{% endfor %}"
)


def chatting() -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def conversation(said: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "w40", "content": said}, {"role": "w41", "content": answer}]


PAIRS = list(zip(texts(6), texts(12)[6:], strict=True))
RAW: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in texts(6)],
    "prompt and completion": [{"prompt": one, "completion": f" {two}"} for one, two in PAIRS],
    "chat": [{"messages": conversation(*pair)} for pair in PAIRS],
}


def sft(raw: list[dict[str, Any]], folder: Path, streams: bool = False, **options: Any) -> Any:
    data = Dataset.from_list(raw)
    return EWCSFTTrainer(
        model=small_llama(),
        args=SFTConfig(output_dir=str(folder), max_length=32, **SETTINGS, **options),
        train_dataset=data.to_iterable_dataset() if streams else data,
        processing_class=chatting(),
        ewc_config=EWCConfig(ewc_lambda=LAMBDA, fisher_type="empirical"),
    )


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("given", [Dataset.from_list, list], ids=["Dataset", "list"])
def test_raw_data_are_prepared_as_the_trainer_prepares_its_own(
    kind: str, given: Any, tmp_path: Path
) -> None:
    expected = sft(RAW[kind], tmp_path).consolidate()
    found = sft(RAW[kind][:2], tmp_path).consolidate(given(RAW[kind]))
    assert found.tasks[0].num_examples == 6
    assert relative_error(dict(found.importance), dict(expected.importance)) < 1e-5


def test_texts_in_a_list_are_prepared(tmp_path: Path) -> None:
    expected = sft(RAW["text"], tmp_path).consolidate()
    given = [one["text"] for one in RAW["text"]]
    found = sft(RAW["text"][:2], tmp_path).consolidate(given)
    assert found.tasks[0].num_examples == 6
    assert relative_error(dict(found.importance), dict(expected.importance)) < 1e-5


@pytest.mark.parametrize("given", [Dataset.from_list, list], ids=["Dataset", "list"])
def test_columns_that_the_trainer_does_not_know_are_named(given: Any, tmp_path: Path) -> None:
    body = [{"body": one["text"]} for one in RAW["text"]]
    with pytest.raises(ValueError, match=r"columns \['body'\].*'text' \(dataset_text_field\)"):
        sft(RAW["text"], tmp_path).consolidate(given(body))


def test_raw_texts_are_an_example_each_where_the_trainer_packs(tmp_path: Path) -> None:
    options = {"packing": True, "packing_strategy": "wrapped", "eval_packing": False}
    found = sft(RAW["text"], tmp_path, **options).consolidate(Dataset.from_list(RAW["text"]))
    assert found.tasks[0].num_examples == 6
    expected = sft(RAW["text"], tmp_path).consolidate()
    assert relative_error(dict(found.importance), dict(expected.importance)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*[Ff]lash")
def test_documents_of_a_packed_row_are_an_example_each(tmp_path: Path) -> None:
    packed = sft(RAW["text"], tmp_path, packing=True, packing_strategy="bfd")
    assert len(packed.train_dataset) < 6
    found = packed.consolidate()
    assert found.tasks[0].num_examples == 6
    expected = sft(RAW["text"], tmp_path).consolidate()
    assert relative_error(dict(found.importance), dict(expected.importance)) < 1e-5


@pytest.mark.parametrize(("asked", "size"), [(None, 2), (5, 5)])
def test_the_batches_of_the_fisher_are_as_large_as_the_trainers(
    asked: int | None, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(RAW["text"], tmp_path)
    trainer.ewc_config.fisher_batch_size = asked
    sizes: list[int] = []
    collator = trainer.data_collator

    def collate(examples: list[Any]) -> Any:
        sizes.append(len(examples))
        return collator(examples)

    trainer.data_collator = collate
    trainer.consolidate()
    assert max(sizes) == size


@pytest.mark.filterwarnings("ignore:.return_outputs=True:FutureWarning")
def test_the_divergence_on_raw_texts(tmp_path: Path) -> None:
    raw = Dataset.from_dict({"text": texts(8)})
    args = SFTConfig(
        str(tmp_path), max_length=16, max_steps=1, report_to="none", use_cpu=True, bf16=False
    )
    result = run_tasks(
        small_llama(),
        [Task("texts", raw, raw, metric="perplexity")],
        args,
        sequence_config=SequenceConfig(kl_examples=4),
        trainer_class=EWCSFTTrainer,
        processing_class=tokenizer(),
    )
    assert len(result.metrics) == 1
    (found,) = json.loads((tmp_path / "results.json").read_text())["divergences"]
    assert found["kl"] > 0
    assert found["labels"] > 4
