"""Tasks in a row whose first trainer adds the adapter: TRL's `peft_config`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hf_ewc import EWCConfig, SequenceConfig, Task, run_tasks
from tests.test_trainer_trl import SETTINGS, EWCSFTTrainer, small_llama, texts, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning"),  # TRL's evaluation
]
STEPS = 3


class Killed(RuntimeError):
    """As the end of a process would be."""


class Kill(TrainerCallback):
    """Ends training of one task, by its folder, after so many steps."""

    def __init__(self, task: str, step: int) -> None:
        self.task, self.step = task, step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task in args.output_dir and state.global_step == self.step:
            raise Killed


class Watch(TrainerCallback):
    """Notes Σ|B| as each task begins and ends."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.begun.append(size_of_b(options["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.ended.append(size_of_b(options["model"]))


def size_of_b(model: Any) -> float:
    named = model.named_parameters()
    return float(sum(p.detach().abs().sum() for name, p in named if "lora_B" in name))


def adapter() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 8})


def tasks() -> list[Task]:
    parts = [Dataset.from_dict({"text": texts(24)[start : start + 8]}) for start in (0, 8, 16)]
    return [Task(f"part {k}", part, part, metric="perplexity") for k, part in enumerate(parts)]


def run(folder: Path, trainer: Any = EWCSFTTrainer, seed: int = 5, **options: Any) -> Any:
    set_seed(seed)  # of what a user does before: it has no part in the adapter
    base = small_llama().requires_grad_(not options.pop("frozen", False))
    options.setdefault("peft_config", adapter())
    ewc = EWCConfig(ewc_lambda=1.0, ewc_space="weight", fisher_type="empirical")
    settings = {
        **SETTINGS,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return run_tasks(
        base,
        tasks(),
        SFTConfig(output_dir=str(folder), max_length=options.pop("max_length", 16), **settings),
        ewc if trainer is EWCSFTTrainer else None,
        trainer_class=trainer,
        processing_class=tokenizer(),
        **options,
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Watch]:
    watch = Watch()
    return run(tmp_path_factory.mktemp("whole"), callbacks=[watch]), watch


@pytest.mark.parametrize("trainer", [EWCSFTTrainer, SFTTrainer])
def test_all_tasks_train_one_adapter(trainer: Any, whole: Any, tmp_path: Path) -> None:
    if trainer is EWCSFTTrainer:
        result, watch = whole
    else:
        watch = Watch()
        result = run(tmp_path, trainer, callbacks=[watch])
    assert isinstance(result.model, PeftModel)
    assert list(result.model.peft_config) == ["default"]
    assert watch.begun == [0.0, *watch.ended[:-1]]
    assert size_of_b(result.model) == watch.ended[-1] > 0
    names = [name for name, _ in result.model.named_parameters() if "lora_A" in name]
    assert len(names) == len(set(names)) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_alpha": 64}, r"given\.peft_config\.lora_alpha: 8 there, 64 now"),
        ({"target_modules": ["q_proj"]}, r"given\.peft_config\.target_modules"),
        ({"use_rslora": True}, r"given\.peft_config\.use_rslora"),
        ({"alpha_pattern": {}}, r"given\.peft_config\.alpha_pattern"),
        (None, r"own_args\.max_length: 16 there, 8 now"),
    ],
)
def test_another_adapter_makes_another_run(
    changes: dict[str, Any] | None, named: str, whole: Any
) -> None:
    result, _ = whole
    folder = result.output_dir
    options = {} if changes else {"max_length": 8}
    other = replace(adapter(), **(changes or {}))
    with pytest.raises(ValueError, match=rf"(?s)other settings.*{named}"):
        run(folder, peft_config=other, **options)


def test_an_adapter_on_a_model_that_is_frozen(tmp_path: Path) -> None:
    """As one that is prepared for training in few bits: the trainer adds what is trained."""
    result = run(tmp_path, frozen=True)
    assert result.matrix.num_learnt == 3


def test_the_state_is_of_the_weights_without_an_adapter(whole: Any) -> None:
    result, _ = whole
    assert [task.name for task in result.state.tasks] == ["part 0", "part 1", "part 2"]
    assert "model.layers.0.self_attn.q_proj.weight" in result.state.importance


@pytest.mark.parametrize(
    ("task", "step"), [("part-0", 1), ("part-1", 2), ("part-2", 1)], ids=["first", "second", "last"]
)
def test_a_run_that_was_killed_ends_with_the_same_weights(
    task: str, step: int, whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[Kill(task, step)])
    again = run(tmp_path, seed=6)
    expected = weights(whole[0].model)
    found = weights(again.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.matrix.scores == pytest.approx(whole[0].matrix.scores, nan_ok=True)


def test_a_run_that_is_done_gives_the_adapter_back(whole: Any) -> None:
    result, _ = whole
    again = run(Path(result.output_dir), seed=7)
    expected, found = weights(result.model), weights(again.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_configuration_stays_the_users(tmp_path: Path) -> None:
    given = adapter()
    before = json.dumps(given.to_dict(), default=str)
    run(tmp_path, peft_config=given)
    assert json.dumps(given.to_dict(), default=str) == before


def test_joint_training_begins_at_the_fresh_adapter(tmp_path: Path) -> None:
    watch = Watch()
    joint = SequenceConfig(joint_training=True)
    run(tmp_path, SFTTrainer, sequence_config=joint, callbacks=[watch])
    assert watch.begun == [0.0, 0.0, 0.0]
    assert min(watch.ended) > 0
