"""The life of the state around training: consolidated, saved, resumed, killed, refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import checkpoints
from hf_ewc.training.trainer import EWCSeq2SeqTrainer, EWCTrainer
from tests.models import MODELS, Examples, bert, random_quadratic
from tests.processes import launch
from tests.training import arguments, consolidating, ewc_trainer

# ---- Consolidating ----


def test_consolidate_before_any_training(tmp_path: Path) -> None:
    trainer = consolidating(tmp_path, Examples("bert", 12))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state = trainer.consolidate(name="pretraining", weight=2.0)
    assert state is trainer.ewc_state
    assert state.num_tasks == 1
    assert state.tasks[0].name == "pretraining"
    assert state.tasks[0].weight == 2.0
    assert state.tasks[0].num_examples == 12
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert torch.equal(state.anchor[name], parameter.detach())
    assert trainer.ewc_penalty() == 0.0
    trainer.train()
    assert any("ewc_penalty" in entry for entry in trainer.state.log_history)


def test_consolidate_takes_any_kind_of_data(tmp_path: Path) -> None:
    """A map-style data set, a datasets.Dataset with a column too many, an iterable one."""
    examples = [Examples("bert", 8)[i] for i in range(8)]
    columns = {
        "input_ids": [e["input_ids"].tolist() for e in examples],
        "labels": [e["labels"].item() for e in examples],
        "comment": ["not for the model"] * 8,
    }

    class Stream(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Any:
            return iter(examples)

    states = []
    for data in (Examples("bert", 8), Dataset.from_dict(columns), Stream()):
        trainer = consolidating(tmp_path)
        trainer.ewc_config.fisher_samples = 8
        states.append(trainer.consolidate(data))
    for state in states[1:]:
        assert state.tasks[0].num_examples == 8
        for name, tensor in states[0].importance.items():
            torch.testing.assert_close(state.importance[name], tensor)


def test_consolidate_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no train_dataset"):
        consolidating(tmp_path).consolidate()


def test_the_configuration_decides_what_is_consolidated(tmp_path: Path) -> None:
    trainer = consolidating(tmp_path, Examples("bert", 6))
    trainer.ewc_config = EWCConfig(
        ewc_target_modules=["query", "classifier"],
        ewc_exclude_modules=["classifier"],
        ewc_state_dtype="bfloat16",
        fisher_samples=4,
    )
    state = trainer.consolidate()
    assert all(".query." in name for name in state.importance)
    assert len(state.importance) == 4
    assert state.tasks[0].num_examples == 4
    assert state.packed(next(iter(state.importance)))[0].values.dtype == torch.bfloat16


def test_two_tasks_in_a_row(tmp_path: Path) -> None:
    trainer = consolidating(tmp_path, Examples("bert", 6))
    trainer.args.learning_rate = 1e-2
    first = trainer.consolidate(name="a")
    trainer.train()
    assert trainer.ewc_penalty() > 0
    second = trainer.consolidate(name="b")
    assert [task.name for task in second.tasks] == ["a", "b"]
    assert first.num_tasks == 1
    assert trainer.ewc_penalty() == 0.0  # online: the anchor has moved


def test_a_state_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    state = EWCState(*random_quadratic(MODELS["llama"]()))
    with pytest.raises(ValueError, match="does not fit"):
        ewc_trainer("bert", arguments(tmp_path), 4, ewc_state=state)


def test_seq2seq(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=8, d_ff=16, num_layers=1, num_heads=2, d_kv=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip
    {**arguments(tmp_path).to_dict(), "output_dir": str(tmp_path)}
    trainer = EWCSeq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            **arguments(tmp_path).to_dict() | {"output_dir": str(tmp_path)}
        ),
        train_dataset=[{"input_ids": torch.arange(1, 7), "labels": torch.arange(2, 6)}] * 4,
        ewc_state=EWCState(*random_quadratic(model)),
    )
    trainer.train()
    assert trainer.ewc_penalty() > 0


# ---- Saving and loading ----


def test_a_state_is_given_as_a_value_or_a_folder(tmp_path: Path) -> None:
    state = EWCState(*random_quadratic(bert()))
    state.save_pretrained(tmp_path / "state")
    for source in (state, tmp_path / "state", str(tmp_path / "state")):
        trainer = ewc_trainer("bert", arguments(tmp_path), 4, ewc_state=source)
        assert trainer.ewc_state == state


def test_save_model_saves_the_state(tmp_path: Path) -> None:
    trainer = ewc_trainer("bert", arguments(tmp_path / "out"), 4)
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in ("out", "elsewhere"):
        assert EWCState.from_pretrained(tmp_path / folder) == trainer.ewc_state
        type(trainer.model).from_pretrained(tmp_path / folder)


def run_with_checkpoints(folder: Path, **changes: Any) -> EWCTrainer:
    args = arguments(
        folder,
        **{
            "learning_rate": 1e-2,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 1,
            **changes,
        },
    )
    return ewc_trainer("bert", args, 8, eval_dataset=Examples("bert", 6))


def test_checkpoints_share_one_file(tmp_path: Path) -> None:
    trainer = run_with_checkpoints(tmp_path, save_total_limit=2)
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-5", "checkpoint-6"]
    assert len(list(tmp_path.rglob("ewc_state-*.safetensors"))) == 1
    for folder in folders:
        assert EWCState.from_pretrained(folder) == trainer.ewc_state


def test_load_best_model_at_end(tmp_path: Path) -> None:
    trainer = run_with_checkpoints(
        tmp_path,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    state = trainer.ewc_state
    trainer.train()
    assert trainer.ewc_state == state
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert EWCState.from_pretrained(best) == state
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_resuming_goes_on_bit_for_bit(explicit: bool, tmp_path: Path) -> None:
    whole = run_with_checkpoints(tmp_path / "whole", save_strategy="no")
    whole.train()
    run_with_checkpoints(tmp_path / "cut", max_steps=6, save_steps=4).train()
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    for later in tmp_path.glob("cut/checkpoint-[56]"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    args = arguments(tmp_path / "cut", learning_rate=1e-2, max_steps=6)
    resumed = ewc_trainer("bert", args, 8, ewc_state=None)
    resumed.train(resume_from_checkpoint=str(checkpoint) if explicit else True)
    assert resumed.ewc_state == whole.ewc_state
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_state_of_the_checkpoint_comes_back_after_consolidating(tmp_path: Path) -> None:
    """The output folder then holds the newer state; checkpoints still mean the older one."""
    trainer = run_with_checkpoints(tmp_path)
    before = trainer.ewc_state
    trainer.train()
    after = trainer.consolidate()
    trainer.save_model()
    assert EWCState.from_pretrained(tmp_path) == after
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.ewc_state == before


def test_a_checkpoint_with_a_state_is_not_resumed_without_ewc(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, max_steps=1).train()
    plain = EWCTrainer(model=bert(), args=arguments(tmp_path), train_dataset=Examples("bert", 4))
    for resume in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match="Pass the ewc_config"):
            plain.train(resume_from_checkpoint=resume)


def test_a_given_checkpoint_that_is_cut_off(tmp_path: Path) -> None:
    trainer = run_with_checkpoints(tmp_path, max_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_')
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_of_a_checkpoint_that_is_cut_off(tmp_path: Path, name: str, share: float) -> None:
    """As by a copy that broke off: the one before it is gone on from, and ends the same."""
    whole = run_with_checkpoints(tmp_path, max_steps=3)
    whole.train()
    file = tmp_path / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    resumed = run_with_checkpoints(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match=f"not a whole checkpoint: {name}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed.train(resume_from_checkpoint=True)
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_that_is_written_over_is_not_whole_until_it_is_done(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, max_steps=2).train()
    whole, older = tmp_path / "checkpoint-2", tmp_path / "checkpoint-1"
    assert checkpoints.checkpoint_to_resume(True, tmp_path) == str(whole)
    state = EWCState.from_pretrained(whole)
    checkpoints.store(state, whole, in_checkpoint=True, write=True)
    assert checkpoints.checkpoint_to_resume(True, tmp_path) == str(older)


def test_a_first_task_leaves_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    """Its checkpoints have no state; those that lay there before had one."""
    run_with_checkpoints(tmp_path, max_steps=2).train()
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    first = ewc_trainer("bert", args, 4, ewc_state=None)
    written: list[bool] = []
    original = first._save_optimizer_and_scheduler

    def looking(folder: str) -> None:
        written.append(checkpoints.is_complete(Path(folder)))
        original(folder)

    first._save_optimizer_and_scheduler = looking
    first.train()
    assert written == [False, False]
    again = ewc_trainer("bert", args, 4, ewc_state=None)
    again.train(resume_from_checkpoint=True)
    assert not again.ewc_state
    plain = EWCTrainer(model=bert(), args=args, train_dataset=Examples("bert", 4))
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_with_another_state_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_checkpoints(tmp_path, max_steps=1).train()
    other = consolidating(tmp_path, Examples("bert", 4))
    state = other.consolidate(name="newer")
    args = arguments(tmp_path, max_steps=1)
    ewc_trainer("bert", args, 4, ewc_state=state).train(resume_from_checkpoint=True)
    assert "of 'newer'" in caplog.text


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint-7', which is no folder here"):
        run_with_checkpoints(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_going_on_from_files_is_going_on_in_memory(tmp_path: Path) -> None:
    """Task A, consolidated and saved; task B from what was saved, and from what is in memory."""
    first = consolidating(tmp_path, Examples("bert", 12))
    first.args.learning_rate = 1e-2
    first.train()
    state = first.consolidate(name="a")
    first.save_model(str(tmp_path / "a"))
    loaded = type(first.model).from_pretrained(tmp_path / "a")
    final = []
    for model, given in ((first.model, state), (loaded, tmp_path / "a")):
        trainer = EWCTrainer(
            model=model,
            args=arguments(tmp_path / "b", learning_rate=1e-2, gradient_accumulation_steps=2),
            train_dataset=Examples("bert", 8),
            ewc_config=EWCConfig(ewc_lambda=50.0),
            ewc_state=given,
        )
        trainer.train()
        final.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


# ---- Killed processes ----


def start(folder: Path, *options: str) -> int:
    code, output = launch("tests.life", str(folder), *options)
    assert code in (0, -signal.SIGKILL), output
    return code


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder) == 0
    return load_file(folder / "final.safetensors")


@pytest.mark.parametrize(
    "where",
    [
        "step",
        "between files of the state",
        "before the reference",
        "after the model",
        "after the optimizer",
        "in the trainer state",
        "first checkpoint",
    ],
)
def test_a_killed_run_is_resumed_to_the_same_weights(
    where: str, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    assert start(tmp_path, "--kill", where) == -signal.SIGKILL
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        if (folder / "ewc_state.json").exists():
            EWCState.from_pretrained(folder)  # whole, or not there
    has_checkpoint = any(tmp_path.glob("checkpoint-*"))
    assert start(tmp_path, *(["--resume"] if has_checkpoint else [])) == 0
    final = load_file(tmp_path / "final.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in undisturbed.items())
