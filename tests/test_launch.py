"""Launches of real processes: those that come up whole, those that do not, and what they save."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers.trainer_optimizer import LayerWiseDummyOptimizer

from hf_ewc.config import EWCConfig
from hf_ewc.processes import check_launch
from hf_ewc.state import ewc_state
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import checkpoints
from hf_ewc.training.trainer import EWCTrainer
from tests.models import Examples, bert, random_quadratic
from tests.processes import ACCELERATE, ROOT, launch, torchrun
from tests.training import arguments, ewc_trainer

RECIPES = ROOT / "recipes" / "accelerate"
NAMES = ["cpu_2", "ddp", "fsdp2", "zero2", "zero3"]


# ---- The configurations in recipes/accelerate ----


@pytest.mark.parametrize("name", NAMES)
def test_each_configuration_opens_with_its_command(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    command = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(
        rf"# accelerate launch --config_file recipes/accelerate/{name}\.yaml "
        r"recipes/digits_vit\.py( --use_cpu)?",
        command,
    )
    config = load_config_from_file(str(path))  # unknown keys are errors
    assert config.num_processes == 2
    assert config.main_process_port == 0


def test_the_command_of_cpu_2(tmp_path: Path) -> None:
    command = (RECIPES / "cpu_2.yaml").read_text(encoding="utf-8").splitlines()[0].split()[3:]
    short = ["--num_seeds", "1", "--max_steps", "2", "--fisher_samples", "8"]
    code, output = launch(ACCELERATE, *command, *short, "--output_dir", str(tmp_path), fresh=True)
    assert code == 0, output[-6000:]
    assert output.count("Mean ± standard error, seeds 42") == 1  # one process reports
    runs = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert runs


KINDS = {"cpu_2": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(scope="module")
def in_a_row(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What became of two tasks under a configuration, launched once for each."""

    @functools.cache
    def learn(name: str) -> dict[str, Any]:
        folder: Path = tmp_path_factory.mktemp(name)
        config = ["--config_file", str(RECIPES / f"{name}.yaml")]
        code, output = launch(ACCELERATE, *config, "-m", "tests.launched", "tasks", str(folder))
        assert code == 0, output[-6000:]
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result

    return learn


@pytest.mark.parametrize("name", KINDS)
def test_tasks_in_a_row(name: str, in_a_row: Callable[[str], dict[str, Any]]) -> None:
    """One task after another in one launch, and in two, whatever the model's shards are."""
    result = in_a_row(name)
    assert result["processes"] == 2
    assert result["kind"] == KINDS[name]
    assert result["same"] is result["same_scores"] is True
    assert result["tasks"] == ["a", "b"]
    assert result["losses"] == pytest.approx(in_a_row("cpu_2")["losses"], rel=1e-4)


def test_the_divergence_is_over_the_examples_of_all_processes(
    in_a_row: Callable[[str], dict[str, Any]],
) -> None:
    result = in_a_row("cpu_2")
    assert [found["labels"] for found in result["divergences"]] == [7, 7]
    measured = [found["kl"] for found in result["divergences"]]
    assert measured == pytest.approx(result["by_hand"], rel=1e-3)
    assert in_a_row("fsdp2")["divergences"] is None


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_resumed_runs_equal_undisturbed_ones(name: str, kind: str, tmp_path: Path) -> None:
    """And state and model are written once, whole, while all processes save and load them."""
    config = ["--config_file", str(RECIPES / f"{name}.yaml")]
    if name == "fsdp2":
        config += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]
    code, output = launch(ACCELERATE, *config, "-m", "tests.launched", "resume", str(tmp_path))
    assert code == 0, output[-6000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["processes"] == 2
    assert result["kind"] == kind
    assert result["sharded"] is (name in ("fsdp2", "zero3"))
    assert result["steps"] == [6, 6]
    assert result["same"] is result["moved"] is result["state_is_back"] is True
    assert result["saved_is_trained"] is True
    assert result["penalties"][0] == result["penalties"][1] > 0
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        assert len(list(folder.rglob("ewc_state-*.safetensors"))) == 1
        assert not list(folder.rglob(".ewc_state-*"))
        assert {path.name for path in folder.glob("checkpoint-*")} == {
            "checkpoint-4",
            "checkpoint-6",
        }
    state = EWCState(*random_quadratic(bert()))
    for folder in (tmp_path / "state", tmp_path / "cut", tmp_path / "cut" / "checkpoint-6"):
        assert EWCState.from_pretrained(folder) == state


def test_a_sharded_checkpoint_resumes(tmp_path: Path) -> None:
    """FSDP2 with one file per process in place of whole ones."""
    content = yaml.safe_load((RECIPES / "fsdp2.yaml").read_text(encoding="utf-8"))
    content["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "BertLayer"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    config = ["--config_file", str(tmp_path / "config.yaml")]
    code, output = launch(ACCELERATE, *config, "-m", "tests.launched", "resume", str(tmp_path))
    assert code == 0, output[-6000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["sharded"] is result["same"] is result["state_is_back"] is True


def test_a_model_that_transformers_sharded(tmp_path: Path) -> None:
    """The Trainer refuses to resume those; model and state are saved."""
    code, output = launch(*torchrun(2), "-m", "tests.launched", "sharded", str(tmp_path))
    assert code == 0, output[-6000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result == {"processes": 2, "state_is_back": True, "saved_is_trained": True}


# ---- Processes that are missing ----


MULTI_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}


def begin(options: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """A launcher of one process starts a new interpreter, and passes its environment on to it."""
    command = [ACCELERATE, *options, "-m", "tests.launched", "begin", str(folder)]
    return launch(*command, fresh=True, **environment)


@pytest.mark.parametrize("how", ["--cpu", "MULTI_CPU"])
def test_one_process_where_two_were_asked_for(how: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MULTI_CPU), encoding="utf-8")
    options = ["--config_file", str(tmp_path / "config.yaml")]
    if how == "--cpu":
        options = ["--cpu", "--num_processes", "2"]
    code, output = begin(options, tmp_path)
    assert code != 0
    assert "asked for more than one process, but it started one" in output
    assert "--multi_gpu --num_processes N" in output
    assert not (tmp_path / "processes").exists()


def test_two_processes_that_are_not_connected(tmp_path: Path) -> None:
    options = ["--config_file", str(RECIPES / "ddp.yaml")]
    code, output = launch(ACCELERATE, *options, "-m", "tests.launched", "alone", str(tmp_path))
    assert code != 0
    assert "2 processes were launched, but only 1 would train here" in output
    assert "use_cpu=True" in output
    assert not (tmp_path / "processes").exists()


def test_one_process_in_a_shell_that_says_where_several_would_meet(tmp_path: Path) -> None:
    """As on a cluster, where one process was asked for all the same."""
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    meeting_point = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    code, output = begin(options, tmp_path, **meeting_point)
    assert code == 0, output[-6000:]
    assert (tmp_path / "processes").read_text() == "1"


def test_the_sizes_that_launchers_and_mpi_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    check_launch(1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    check_launch(3)
    with pytest.raises(ValueError, match="3 processes were launched"):
        check_launch(1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch(1)


def test_a_plain_trainer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    _ = args.device
    monkeypatch.setenv("WORLD_SIZE", "2")
    EWCTrainer(model=bert(), args=args, train_dataset=Examples("bert", 4))
    with pytest.raises(ValueError, match="2 processes were launched"):
        ewc_trainer("bert", args, 4)


def test_a_process_that_dies_ends_the_launch(tmp_path: Path) -> None:
    begin = time.monotonic()
    command = [*torchrun(2), "-m", "tests.launched", "die", str(tmp_path)]
    code, output = launch(*command, fresh=True, timeout=300)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output
    assert time.monotonic() - begin < 90
    # What was saved until then is whole, or not there.
    for folder in tmp_path.glob("checkpoint-*"):
        if checkpoints.is_complete(folder):
            assert EWCState.from_pretrained(folder)


# ---- What several processes share ----


def test_processes_that_would_resume_different_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoints.check_same_everywhere("run/checkpoint-2")
    monkeypatch.setattr(checkpoints, "gather_object", lambda names: [*names, "checkpoint-4"])
    checkpoints.check_same_everywhere("/elsewhere/run/checkpoint-4")
    with pytest.raises(ValueError, match=r"\['checkpoint-2', 'checkpoint-4'\]"):
        checkpoints.check_same_everywhere("run/checkpoint-2")


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = EWCState(*random_quadratic(bert()))
    monkeypatch.setattr(ewc_state, "is_main", lambda: False)
    state.save_pretrained(tmp_path / "others")
    assert not (tmp_path / "others").exists()
    assert state.push_to_hub("me/digits") is None  # without a word to the Hub
    state.save_pretrained(tmp_path / "own", is_main_process=True)
    assert EWCState.from_pretrained(tmp_path / "own") == state


# ---- Refusals ----


def test_fsdp_version_1(tmp_path: Path) -> None:
    """With Accelerate's own plugin, which TrainingArguments makes only where there is a GPU."""

    class Flattening(EWCTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(fsdp_version=1, sync_module_states=False)
            self.accelerator.state.fsdp_plugin = plugin

    def build(config: EWCConfig | None) -> EWCTrainer:
        data = Examples("bert", 4)
        return Flattening(
            model=bert(), args=arguments(tmp_path), train_dataset=data, ewc_config=config
        )

    with pytest.raises(ValueError, match=r"use FSDP2 \(fsdp_config=\{'version': 2\}"):
        build(EWCConfig())
    plain = build(None)
    with pytest.raises(ValueError, match="use FSDP2"):
        plain.ewc_state = EWCState(*random_quadratic(bert()))


@pytest.mark.parametrize("optim", ["galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"])
def test_further_layerwise_optimizers(optim: str, tmp_path: Path) -> None:
    alternative = optim.replace("_layerwise", "")
    with pytest.raises(ValueError, match=f"use optim='{alternative}'"):
        ewc_trainer("bert", arguments(tmp_path, optim=optim, optim_target_modules=["query"]), 4)


class AdaLomo(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [AdaLomo, LayerWiseDummyOptimizer])
@pytest.mark.parametrize("as_class", [True, False])
def test_optimizers_given_as_a_class_or_an_object(
    kind: Any, as_class: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.1})}
    if not as_class:
        options = {"optimizers": (kind([torch.nn.Parameter(torch.ones(1))]), None)}
    with pytest.raises(ValueError, match=f"The optimizer '?{kind.__name__}'? "):
        ewc_trainer("bert", arguments(tmp_path), 4, **options)
