"""The Fisher on 1, 2 and 3 real processes (gloo, on the CPU): replicas, FSDP2 and DeepSpeed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_ewc import EWCState, estimate_fisher
from tests.fisher_processes import CASES, fisher_of
from tests.models import Examples, bert, llama
from tests.processes import launch, torchrun

SHARDED = [("shards", 2), ("partitions", 2)]


def launched(action: str, folder: Path, processes: int) -> tuple[int, str]:
    return launch(*torchrun(processes), "-m", "tests.fisher_processes", action, str(folder))


def result_of(action: str, folder: Path, processes: int) -> dict[str, Any]:
    code, output = launched(action, folder, processes)
    assert code == 0, output[-6000:]
    return read_result(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a launch of "shards" or "partitions", made once for each."""

    @functools.cache
    def begin(action: str, processes: int) -> Path:
        folder: Path = tmp_path_factory.mktemp(f"{action}_{processes}")
        result_of(action, folder, processes)
        return folder

    return begin


def read_result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@functools.cache
def on_one_process(case: str) -> tuple[dict[str, Tensor], int, float]:
    fisher = fisher_of(case)
    assert fisher.confidence is not None
    return dict(fisher.diagonal), fisher.num_examples, fisher.confidence


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over the parameters of ‖actual − expected‖ / ‖expected‖."""
    assert actual.keys() == expected.keys()
    floor = 1e-9 * max(value.norm() for value in expected.values())
    return max(
        ((actual[name] - value).norm() / value.norm().clamp_min(floor)).item()
        for name, value in expected.items()
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_replicas_share_the_examples(processes: int, tmp_path: Path) -> None:
    result = result_of("replicas", tmp_path, processes)
    for case in CASES:
        expected, count, sure = on_one_process(case)
        assert result["counts"][case] == count, case
        assert result["confidence"][case] == pytest.approx(sure, rel=1e-5), case
        assert relative_error(load_file(tmp_path / f"{case}.safetensors"), expected) < 1e-6, case
    everything = estimate_fisher(bert(), Examples("bert", 11)).diagonal
    for path in tmp_path.glob("source_*.safetensors"):
        assert relative_error(load_file(path), dict(everything)) < 1e-6, path.name
    assert all("prepared by Accelerate" in text for text in result["prepared"])
    assert result["broken"][1] == "OSError: the disk is gone"
    assert "process 1 met OSError: the disk is gone" in result["broken"][0]
    assert result["warned"] == [1] + [0] * (processes - 1)
    assert result["memory"][1].startswith(
        "OutOfMemoryError: One example of the Fisher does not fit"
    )
    assert "process 1 met OutOfMemoryError: One example" in result["memory"][0]


@pytest.mark.parametrize(("action", "processes"), [*SHARDED, ("shards", 3)])
def test_shards_add_up_to_the_same(
    action: str, processes: int, sharded: Callable[[str, int], Path]
) -> None:
    folder = sharded(action, processes)
    result = read_result(folder)
    for case in CASES:
        expected, count, sure = on_one_process(case)
        assert result["counts"][case] == count, case
        assert result["confidence"][case] == pytest.approx(sure, rel=1e-5), case
        assert relative_error(load_file(folder / f"{case}.safetensors"), expected) < 1e-5, case
        assert result["shards"][case] < 1.1 / processes + 0.05, case
        assert result["held"][case] < 0.8, case
    assert result["broken"][1] == "OSError: the disk is gone"
    assert "process 1 met OSError: the disk is gone" in result["broken"][0]


@pytest.mark.parametrize(("action", "processes"), SHARDED)
def test_a_state_of_shards_is_read_on_one_process_and_back(
    action: str, processes: int, sharded: Callable[[str, int], Path]
) -> None:
    result = read_result(sharded(action, processes))
    state = EWCState.from_pretrained(sharded(action, processes) / "state")
    expected = EWCState()
    fisher, model = fisher_of("exact"), bert()
    expected = expected.consolidate(fisher, model, mode="separate")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    expected = expected.consolidate(fisher, model, mode="separate")
    assert relative_error(dict(state.importance), dict(expected.importance)) < 1e-5
    assert relative_error(dict(state.anchor), dict(expected.anchor)) < 1e-5
    penalty = expected.penalty(model).item()
    assert result["penalty"] == pytest.approx([penalty, penalty], rel=1e-5)
    assert result["sharded"]


@pytest.mark.parametrize("action", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_trainer_consolidates(action: str, tmp_path: Path) -> None:
    result = result_of(action, tmp_path, 2)
    expected = estimate_fisher(llama(), Examples("llama", 9), seed=0)
    state = EWCState.from_pretrained(tmp_path)
    assert result["processes"] == 2
    assert result["counts"] == [9, 9]
    assert result["penalty"] == 0
    per_label = 2 / expected.labels_per_example
    twice = {name: per_label * value for name, value in expected.diagonal.items()}
    assert relative_error(dict(state.importance), twice) < 1e-5
    theta = {name: p.detach() for name, p in llama().named_parameters()}
    assert relative_error(dict(state.anchor), theta) < 1e-6


def test_a_process_that_dies_ends_the_launch(tmp_path: Path) -> None:
    assert launched("die", tmp_path, 2)[0] != 0


@pytest.mark.parametrize("action", ["full", "full_partitions"])
def test_a_process_out_of_memory_among_shards_ends_the_launch(action: str, tmp_path: Path) -> None:
    code, output = launched(action, tmp_path, 2)
    assert code != 0
    assert "OutOfMemoryError: Of parameters in shards, a batch of 4 examples does not fit" in output
    assert "fisher_batch_size" in output
