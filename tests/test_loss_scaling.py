"""Whether a loss ignores `num_items_in_batch` is found out under the conditions of training.

The oracle: accumulating four batches of 2 gives the gradient of one batch of 8.
"""

from __future__ import annotations

import copy
import logging
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding

from hf_ewc.config import EWCConfig
from hf_ewc.training.loss_scaling import IGNORES, INCONCLUSIVE, UNKNOWN, USES, judged
from hf_ewc.training.trainer import EWCTrainer
from tests.models import VOCAB, Examples, bert
from tests.training import GradientRecorder, arguments, in_order, relative_error


class Mean(EWCTrainer):
    """A mean over the batch, as most people write their own loss; `noise` is near 1.

    Its calls are counted in the class: what is in the trainer is put back after a question.
    """

    calls = 0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        type(self).calls += 1
        logits = model(input_ids=inputs["input_ids"])["logits"]
        return cross_entropy(logits, inputs["labels"]) * self.noise()

    def noise(self) -> Any:
        return 1.0


class TorchNoise(Mean):
    def noise(self) -> Any:
        return 1.0 + 0.05 * torch.randn(())


class NumpyNoise(Mean):
    def noise(self) -> Any:
        return 1.0 + 0.05 * np.random.randn()  # noqa: NPY002


class PythonNoise(Mean):
    def noise(self) -> Any:
        return random.gauss(1.0, 0.05)


class OwnGenerators(Mean):
    """Generators that no global seed reaches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.torchs = torch.Generator().manual_seed(0)
        self.numpys = np.random.default_rng(0)
        self.pythons = random.Random(0)

    def noise(self) -> Any:
        own = 0.03 * torch.randn((), generator=self.torchs)
        return 1.0 + own + 0.03 * self.numpys.normal() + self.pythons.gauss(0.0, 0.03)


class Drifting(Mean):
    """Another loss at each call, whatever is random."""

    def noise(self) -> Any:
        return 1.0 + 0.02 * (self.calls % 2)


class InnerGradient(Mean):
    """A penalty on the gradient by the inputs, which needs a graph."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        logits = model(inputs_embeds=embedded)["logits"]
        losses = cross_entropy(logits, inputs["labels"], reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), embedded, create_graph=True)
        return losses.mean() + slope.square().sum(-1).mean()


class WantsBatchEncoding(Mean):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(inputs, BatchEncoding)
        return super().compute_loss(model, inputs)


class ChangesInputs(Mean):
    """Takes the labels out, and marks tokens in place."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        inputs["input_ids"].add_(1).remainder_(VOCAB)
        return cross_entropy(model(**inputs)["logits"], labels)


class OnlyInTraining(Mean):
    """A head whose loss exists in training mode alone."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs)
        return loss if model.training else loss * float("nan")


KINDS = [
    Mean, TorchNoise, NumpyNoise, PythonNoise, OwnGenerators, Drifting, InnerGradient,
    WantsBatchEncoding, ChangesInputs, OnlyInTraining,
]  # fmt: skip


def encoded(rows: list[dict[str, Tensor]]) -> BatchEncoding:
    return BatchEncoding({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def trained(
    kind: type[Mean], folder: Path, size: int, accumulation: int, **changes: Any
) -> tuple[dict[str, Tensor], EWCTrainer]:
    kind.calls, recorder = 0, GradientRecorder()
    args = arguments(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **changes,
    )
    trainer = kind(
        model=bert(attn_implementation="eager"),
        args=args,
        train_dataset=Examples("bert", 8),
        data_collator=encoded,
        ewc_config=EWCConfig(),
        callbacks=[recorder],
    )
    in_order(trainer).train()
    return recorder.steps[0], trainer


@pytest.mark.parametrize("kind", KINDS)
def test_four_batches_are_one(kind: type[EWCTrainer], tmp_path: Path) -> None:
    whole, _ = trained(kind, tmp_path, 8, 1)
    parts, _ = trained(kind, tmp_path, 2, 4)
    assert relative_error(parts, whole) < 0.2  # four times as much would be 3


def test_random_numbers_go_on_as_if_nothing_was(tmp_path: Path) -> None:
    """With the question answered beforehand, training draws the same noise."""

    class Noisy(OwnGenerators):
        def noise(self) -> Any:
            return super().noise() + 0.05 * torch.randn(()) + random.gauss(0.0, 0.01)

    class Answered(Noisy):
        loss_is_scaled_for_ga = False

    expected, answered = trained(Answered, tmp_path, 2, 4)
    found, asked = trained(Noisy, tmp_path, 2, 4)
    assert (answered.calls, asked.calls) == (4, 4 + 3)
    assert relative_error(found, expected) < 1e-6


def test_what_a_loss_logs_is_logged_once_for_each_batch(tmp_path: Path) -> None:
    class Logs(Mean):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(*args, **kwargs)
            self.log({"own": loss.item()})
            return loss

    _, trainer = trained(Logs, tmp_path, 2, 4)
    assert trainer.calls == 4 + 3
    assert len([entry for entry in trainer.state.log_history if "own" in entry]) == 4
    assert "log" not in vars(trainer)


def test_one_batch_a_step_needs_no_question(tmp_path: Path) -> None:
    _, trainer = trained(Mean, tmp_path, 4, 1)
    assert trainer.calls == 2


def test_an_exception_means_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Once(Mean):
        """Refuses another number of items than a window has."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            if kwargs["num_items_in_batch"] != 4:
                raise KeyError("queue")
            return super().compute_loss(*args, **kwargs)

    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        _, trainer = trained(Once, tmp_path, 2, 2)
    assert trainer.calls == 4 + 2  # the third of the question is refused
    said = [r.getMessage() for r in caplog.records if "could not be found out" in r.getMessage()]
    assert len(said) == 1
    assert "KeyError: 'queue'" in said[0]
    assert trainer.model_accepts_loss_kwargs is True


@pytest.mark.parametrize(
    ("losses", "answer"),
    [
        ((2.0, 2.0, 2.0), IGNORES),
        ((2.0, 2.0, 1.0), USES),
        ((2.0, 2.0, 1.9), USES),  # a part of the loss is divided
        ((2.0, 2.1, 1.98), IGNORES),
        ((2.0, 2.1, 1.04), USES),
        ((2.0, 2.9, 1.7), UNKNOWN),
        ((0.0, 0.0, 0.0), INCONCLUSIVE),
        ((2.0, float("nan"), 2.0), INCONCLUSIVE),
    ],
)
def test_judged(losses: tuple[float, float, float], answer: int) -> None:
    assert judged(*losses) == answer


def test_buffers_are_left_alone(tmp_path: Path) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.head = nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            logits = self.head(self.norm(input_ids.float()))
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    trainer = EWCTrainer(
        model=Normalized(),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=Examples("bert", 8),
        ewc_config=EWCConfig(),
    )
    trainer.train()
    assert trainer.model.norm.num_batches_tracked == 4
    assert trainer.model_accepts_loss_kwargs is False


def test_what_a_loss_keeps_in_the_trainer_is_as_if_it_was_not_asked(tmp_path: Path) -> None:
    class Taught(Mean):
        """Learns from an average of its weights as well, and counts."""

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if not hasattr(self, "teacher"):
                self.teacher, self.queue, self.seen = copy.deepcopy(model), deque(), {"n": [0]}
            self.seen["n"][0] += 1
            self.queue.append(float(inputs["input_ids"].sum()))
            with torch.no_grad():
                for old, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    old.mul_(0.5).add_(new, alpha=0.5).add_(0.01)
            return super().compute_loss(model, inputs, *args, **kwargs)

    _, trainer = trained(Taught, tmp_path, 2, 2)
    before = copy.deepcopy(trainer.teacher.state_dict())
    trainer.consolidate()
    assert trainer.model_accepts_loss_kwargs is False
    assert (trainer.seen, len(trainer.queue)) == ({"n": [4]}, 4)  # once for each batch
    for name, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, before[name])
