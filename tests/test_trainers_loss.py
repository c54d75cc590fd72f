"""What outputs mean where the trainer learns with another loss than the model's.

The oracle: log p of each example by itself in float64, as the trainer's loss has it.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import T5Config, T5ForConditionalGeneration

from hf_ewc import EWCConfig, EWCTrainer, estimate_fisher
from tests.models import VOCAB, bert
from tests.training import arguments


def rows(kind: str, size: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(size):
        ids = torch.randint(1, VOCAB, (5,), generator=generator)
        label = {"text": ids.clone(), "yes": torch.tensor(float(i % 2)), "one": torch.tensor(i % 3)}
        found.append({"input_ids": ids, "labels": label[kind]})
    return found


class Words(nn.Module):
    """Scores at each position, or one set of them, and no loss."""

    def __init__(self, outputs: int, sequence: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 6)
        self.head = nn.Linear(6, outputs)
        self.sequence = sequence

    def forward(self, input_ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = torch.tanh(scale * self.embedding(input_ids))
        return {"logits": self.head(hidden.cumsum(1) if self.sequence else hidden.mean(1))}


def empirical(model: nn.Module, data: list[dict[str, Tensor]], log_p: Any) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ log p_n)², a sum over the labels of an example."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in data:
        model.zero_grad()
        log_p(model, {name: value[None] for name, value in row.items()}).backward()
        for name, p in model.named_parameters():
            total[name] += 0 if p.grad is None else p.grad.square() / len(data)
    return total


def learner(model: nn.Module, data: Any, tmp_path: Any, loss: Any = None, **options: Any) -> Any:
    class Learner(EWCTrainer):
        if loss is not None:

            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
            ) -> Any:
                found, outputs = loss(model, inputs)
                return (found, outputs) if return_outputs else found

    return Learner(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, max_steps=1),
        train_dataset=data,
        ewc_config=EWCConfig(fisher_type="empirical"),
        **options,
    )


def check(trainer: Any, expected: dict[str, Tensor], labels: int = 1) -> None:
    importance = trainer.consolidate().importance
    for name, value in expected.items():
        found = importance[name].double() * labels
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-9)


def yes_no(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs["logits"].view(-1), labels.float())


def log_p_yes_no(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logit = model(input_ids=row["input_ids"])["logits"].view(())
    return F.logsigmoid(logit if row["labels"] > 0 else -logit)


@pytest.mark.parametrize("by", ["compute_loss_func", "compute_loss"])
def test_one_logit_that_the_model_takes_for_a_regression(by: str, tmp_path: Any) -> None:
    model, data = bert(num_labels=1), rows("yes")

    def loss(model: nn.Module, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        return yes_no(outputs, inputs["labels"]), outputs

    options = {"compute_loss_func": yes_no} if by == "compute_loss_func" else {"loss": loss}
    check(learner(model, data, tmp_path, **options), empirical(model, data, log_p_yes_no))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_shift_that_only_the_trainer_knows(shift: int, tmp_path: Any) -> None:
    model, data = Words(VOCAB, sequence=True), rows("text")

    def loss(model: nn.Module, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        scores = outputs["logits"][:, : 5 - shift].flatten(0, 1)
        return F.cross_entropy(scores, inputs["labels"][:, shift:].flatten()), outputs

    def log_p(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        scores = model(row["input_ids"])["logits"][0, : 5 - shift]
        return -F.cross_entropy(scores, row["labels"][0, shift:], reduction="sum")

    check(learner(model, data, tmp_path, loss), empirical(model, data, log_p), 5 - shift)


def classes(model: nn.Module, inputs: Any, **options: Any) -> Any:
    outputs = model(input_ids=inputs["input_ids"], **options)
    return F.cross_entropy(outputs["logits"], inputs["labels"]), outputs


def log_p_classes(model: nn.Module, row: dict[str, Tensor], **options: Any) -> Tensor:
    return -F.cross_entropy(model(row["input_ids"], **options)["logits"], row["labels"])


@pytest.mark.parametrize("unlabelled_first", [True, False])
def test_a_further_forward_on_unlabelled_examples(unlabelled_first: bool, tmp_path: Any) -> None:
    model, data = Words(3), rows("one")
    data = [{**row, "others": (row["input_ids"] + 7) % VOCAB} for row in data]

    def loss(model: nn.Module, inputs: Any) -> Any:
        forwards = [lambda: classes(model, inputs), lambda: model(input_ids=inputs["others"])]
        results = [forward() for forward in forwards[:: -1 if unlabelled_first else 1]]
        (found, outputs), other = results[:: -1 if unlabelled_first else 1]
        return found + 0.5 * other["logits"].logsumexp(-1).mean(), outputs

    check(learner(model, data, tmp_path, loss), empirical(model, data, log_p_classes))


def test_an_option_that_the_trainer_gives_to_the_forward(tmp_path: Any) -> None:
    model, data = Words(3), rows("one")
    trainer = learner(model, data, tmp_path, lambda m, inputs: classes(m, inputs, scale=3.0))
    check(trainer, empirical(model, data, lambda m, row: log_p_classes(m, row, scale=3.0)))


def head_outside(model: nn.Module, inputs: Any) -> Any:
    return F.cross_entropy(model(input_ids=inputs["input_ids"])["logits"] * 2, inputs["labels"]), {}


def one_against_the_others(model: nn.Module, inputs: Any) -> Any:
    logits = model(input_ids=inputs["input_ids"])["logits"]
    targets = F.one_hot(inputs["labels"], 3).float()
    return F.binary_cross_entropy_with_logits(logits, targets), {}


def other_inputs(model: nn.Module, inputs: Any) -> Any:
    return classes(model, {**inputs, "input_ids": (inputs["input_ids"] + 1) % VOCAB})


@pytest.mark.parametrize("loss", [head_outside, one_against_the_others, other_inputs])
def test_a_loss_that_is_no_likelihood_of_the_outputs_is_said(
    loss: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        learner(Words(3), rows("one"), tmp_path, loss).consolidate()
    said = [r.getMessage() for r in caplog.records if "own loss" in r.getMessage()]
    assert len(said) == 1
    assert "log_likelihood= a function" in said[0]


def test_nothing_is_said_where_the_loss_is_the_models(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_ewc"):
        learner(Words(3), rows("one"), tmp_path, classes).consolidate()
    assert not caplog.records


def test_without_a_loss_a_shift_of_texts_is_not_guessed() -> None:
    model, data = Words(VOCAB, sequence=True), rows("text")
    with pytest.raises(ValueError, match="labels are the input_ids themselves"):
        estimate_fisher(model, data, fisher_type="empirical")

    def log_p(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        scores = model(row["input_ids"])["logits"][0]
        return -F.cross_entropy(scores, row["labels"][0], reduction="sum")

    shifted = [
        {**row, "labels": torch.cat([row["labels"][1:], torch.tensor([-100])])} for row in data
    ]
    found = estimate_fisher(model, shifted, fisher_type="empirical")
    for name, value in empirical(model, shifted, log_p).items():
        torch.testing.assert_close(found.diagonal[name].double(), value, rtol=1e-4, atol=1e-9)


# What a trainer does elsewhere than in its compute_loss


class Stream(IterableDataset[dict[str, Tensor]]):
    def __init__(self, data: list[dict[str, Tensor]]) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def test_a_stream_is_looked_at_too(tmp_path: Any) -> None:
    model, data = bert(num_labels=1), rows("yes")
    trainer = learner(model, Stream(data), tmp_path, compute_loss_func=yes_no)
    trainer.ewc_config.fisher_samples = len(data)
    check(trainer, empirical(model, data, log_p_yes_no))


def test_a_loss_put_into_the_trainer_itself(tmp_path: Any) -> None:
    model, data = bert(num_labels=1), rows("yes")
    trainer = learner(model, data, tmp_path)

    def loss(model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        found = yes_no(outputs, inputs["labels"])
        return (found, outputs) if return_outputs else found

    trainer.compute_loss = loss
    check(trainer, empirical(model, data, log_p_yes_no))


def adversarial(model: Any, inputs: Any) -> Any:
    """Fails without gradients."""
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    outputs = model(inputs_embeds=embedded)
    loss = yes_no(outputs, inputs["labels"])
    (gradient,) = torch.autograd.grad(loss, embedded, retain_graph=True)
    further = model(inputs_embeds=embedded + 0.5 * gradient / gradient.norm())
    return loss + yes_no(further, inputs["labels"]), outputs


def of_a_run(model: Any, inputs: Any) -> Any:
    raise AttributeError("no average before train()")


@pytest.mark.parametrize(
    ("loss", "said"),
    [(adversarial, "is not −log p of"), (of_a_run, "cannot be looked at outside of training")],
)
def test_a_loss_that_cannot_be_compared_is_said(
    loss: Any, said: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    learner(bert(num_labels=1), rows("yes"), tmp_path, loss).consolidate()
    assert len([message for message in caplog.messages if said in message]) == 1


def test_padding_left_out_by_the_trainers_loss_is_said(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first examples have none."""
    data = rows("text", 12)
    for number, row in enumerate(data):
        row["labels"] = (row["input_ids"] + 1) % VOCAB
        row["input_ids"][3 if number >= 8 else 5 :] = 0

    def loss(model: nn.Module, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        there = inputs["input_ids"] != 0
        return F.cross_entropy(outputs["logits"][there], inputs["labels"][there]), outputs

    learner(Words(VOCAB, sequence=True), data, tmp_path, loss).consolidate()
    assert any("is not −log p of" in message for message in caplog.messages)


@pytest.mark.parametrize("classes", [3, 100])
def test_classes_that_the_trainers_loss_masks_are_said(
    classes: int, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{**row, "labels": row["labels"].clamp(max=1)} for row in rows("one")]

    def loss(model: nn.Module, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        hidden = torch.tensor([0.0, 0.0, *[-math.inf] * (classes - 2)])
        return F.cross_entropy(outputs["logits"] + hidden, inputs["labels"]), outputs

    learner(bert(num_labels=classes), data, tmp_path, loss).consolidate()
    assert any("is not −log p of" in message for message in caplog.messages)


@pytest.mark.parametrize("begin", [0, 7], ids=["as the model", "with a language token"])
def test_a_decoder_that_the_trainer_begins(
    begin: int, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = dict(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0)
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    ids = torch.randint(2, 20, (8, 5))
    data = [{"input_ids": row, "labels": row[:4]} for row in ids]

    def loss(model: nn.Module, inputs: Any) -> Any:
        labels = inputs["labels"]
        shifted = torch.cat([torch.full_like(labels[:, :1], begin), labels[:, :-1]], 1)
        outputs = model(input_ids=inputs["input_ids"], decoder_input_ids=shifted)
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()), outputs

    learner(model, data, tmp_path, loss).consolidate()
    assert any("is not −log p of" in message for message in caplog.messages) == (begin != 0)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.inner(x)))
        return {"logits": logits} | ({} if labels is None else {"loss": self.loss(logits, labels)})

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


def features() -> list[dict[str, Tensor]]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    return [{"x": one, "labels": torch.tensor(n % 3)} for n, one in enumerate(x)]


def doubled(inputs: Any) -> Any:
    return {**inputs, "x": 2 * inputs["x"]}


class Prepares(EWCTrainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return doubled(super()._prepare_inputs(inputs))


class Changes(EWCTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(model, doubled(inputs), *args, **kwargs)


class Computes(EWCTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = model(**doubled(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class Twice(EWCTrainer):
    """As an adversarial step: on the same inputs."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        super().training_step(model, inputs, *args, **kwargs)
        return super().training_step(model, inputs, *args, **kwargs)


class Loads(EWCTrainer):
    def get_train_dataloader(self) -> Any:
        return map(doubled, super().get_train_dataloader())


def trainer_of(kind: Any, tmp_path: Any) -> Any:
    return kind(
        model=Plain(),
        args=arguments(tmp_path, remove_unused_columns=False, max_steps=1),
        train_dataset=features(),
        ewc_config=EWCConfig(fisher_type="empirical"),
    )


def test_what_a_trainer_prepares_reaches_the_model(tmp_path: Any) -> None:
    trainer = trainer_of(Prepares, tmp_path)
    data = [{**row, "x": 2 * row["x"]} for row in features()]

    def log_p(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        return -F.cross_entropy(model(row["x"].double())["logits"], row["labels"])

    check(trainer, empirical(trainer.model, data, log_p))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Changes, "changes the inputs of the model"),
        (Computes, "computes its loss by itself"),
        (Twice, None),
        (EWCTrainer, None),
    ],
)
def test_a_step_that_the_fisher_does_not_follow_is_said(
    kind: Any, said: str | None, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(kind, tmp_path)
    trainer.train()
    trainer.consolidate()
    found = [message for message in caplog.messages if "training_step of" in message]
    assert len(found) == (said is not None)
    assert all(str(said) in message for message in found)


def test_a_loader_that_the_fisher_does_not_follow_is_said(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(Loads, tmp_path).consolidate()
    assert any("training loader of Loads is its own" in message for message in caplog.messages)


class TwoTasks(Words):
    """A second head, which the trainer's own loss takes for one of the tasks, or for all."""

    def __init__(self) -> None:
        super().__init__(3)
        self.other = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = torch.tanh(scale * self.embedding(input_ids)).mean(1)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_a_loss_of_another_head_for_later_examples(tmp_path: Any, caplog: Any) -> None:
    """Data in the order of their tasks show the first one's in front."""
    data = [{**row, "task": torch.tensor(n // 6)} for n, row in enumerate(rows("one", 12))]

    def loss(model: Any, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        chosen = inputs["task"].bool().unsqueeze(-1)
        scores = torch.where(chosen, model.other(outputs["hidden"]), outputs["logits"])
        return F.cross_entropy(scores, inputs["labels"]), outputs

    with caplog.at_level(logging.WARNING):
        learner(TwoTasks(), data, tmp_path, loss).consolidate()
    assert "is not −log p of what TwoTasks returns" in caplog.text


def test_a_further_head_in_the_trainers_loss(tmp_path: Any, caplog: Any) -> None:
    data = [{**row, "mood": torch.tensor(n // 2 % 3)} for n, row in enumerate(rows("one"))]

    def loss(model: Any, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        further = F.cross_entropy(model.other(outputs["hidden"]), inputs["mood"])
        return F.cross_entropy(outputs["logits"], inputs["labels"]) + further, outputs

    with caplog.at_level(logging.WARNING):
        learner(TwoTasks(), data, tmp_path, loss).consolidate()
    assert "a further term beside −log p of the labels, and takes mood" in caplog.text


def test_a_column_that_the_loss_takes_out_is_no_further_head(tmp_path: Any, caplog: Any) -> None:
    data = [{**row, "place": torch.tensor(n)} for n, row in enumerate(rows("one"))]

    def loss(model: Any, inputs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        return F.cross_entropy(outputs["logits"], inputs["labels"]), outputs

    with caplog.at_level(logging.WARNING):
        learner(TwoTasks(), data, tmp_path, loss).consolidate()
    assert not caplog.text
