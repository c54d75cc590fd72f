"""The script that counts the architectures: its loop, and what it calls which."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import coverage
import coverage_models as models

from hf_ewc import Fisher, estimate_fisher


@pytest.mark.parametrize(
    ("pair", "status"),
    [
        (("bert", "TOKEN_CLASSIFICATION"), "fast"),
        (("mobilebert", "MULTIPLE_CHOICE"), "fast"),  # by rounding 1.8e-4 off in float32
        (("prophetnet", "CAUSAL_LM"), "refused"),
        (("clip", "ZERO_SHOT_IMAGE_CLASSIFICATION"), "refused"),
        (("dinat", "IMAGE_CLASSIFICATION"), "not built"),
    ],
)
def test_a_pair_is_what_it_is(pair, status):
    assert pair in models.pairs()
    assert coverage.examine(*pair)["status"] == status


@pytest.mark.parametrize("factor", [2, 1.0005])
def test_a_wrong_answer_is_called_wrong(factor, monkeypatch):
    def more(*args, **options):
        found = estimate_fisher(*args, **options)
        return Fisher({name: factor * value for name, value in found.diagonal.items()})

    monkeypatch.setattr("hf_ewc.estimate_fisher", more)
    assert coverage.examine("bert", "TOKEN_CLASSIFICATION")["status"] == "wrong"


def test_the_loss_says_how_many_labels_it_is_a_mean_over():
    logits = torch.randn(1, 5, 3, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 2, 1, -100]])
    mean = torch.nn.functional.cross_entropy(logits[0], labels[0])
    assert coverage.number_of_labels({"loss": mean, "logits": logits}, {"labels": labels}) == 3
    shifted = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    assert coverage.number_of_labels({"loss": shifted, "logits": logits}, {"labels": labels}) == 2
    assert (
        coverage.number_of_labels({"loss": 2 * mean, "logits": logits}, {"labels": labels}) is None
    )


def test_every_result_is_written_where_many_come_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(
        coverage.Worker, "examine", lambda self, pair: {"status": "fast", "why": ""}
    )
    pairs = [(f"type {i}", "HEAD") for i in range(200)]
    coverage.run(pairs, tmp_path / "coverage.json", processes=8, seconds=1.0)
    written = json.loads((tmp_path / "coverage.json").read_text())
    assert written["counts"]["fast"] == len(written["pairs"]) == 200
