"""`consolidate()`: what it takes, what reaches the model, and which weights it anchors at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

from hf_ewc import Fisher, estimate_fisher
from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCTrainer
from tests.models import Examples, Unused, bert
from tests.training import arguments


def trainer_of(
    folder: Path,
    kind: type[EWCTrainer] = EWCTrainer,
    model: nn.Module | None = None,
    **options: Any,
) -> EWCTrainer:
    changes = options.pop("arguments", {})
    options.setdefault("train_dataset", Examples("bert", 8))
    options.setdefault("ewc_config", EWCConfig(fisher_type="empirical"))
    return kind(model or bert(), arguments(folder, **changes), **options)


# ---- A likelihood, a Fisher ----


def squared_distance(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return -(logits - batch["labels"][:, None]).square().sum(1)


def test_a_likelihood_of_the_user(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ewc_config=EWCConfig())
    state = trainer.consolidate(log_likelihood=squared_distance)
    expected = estimate_fisher(bert(), Examples("bert", 8), log_likelihood=squared_distance)
    assert state.tasks[0].fisher_type == "empirical"
    for name, tensor in expected.diagonal.items():
        torch.testing.assert_close(state.importance[name], tensor)


def test_a_fisher_that_is_there(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, train_dataset=None)
    given = Fisher({n: torch.rand_like(p) for n, p in trainer.model.named_parameters()}, 7, "exact")
    state = trainer.consolidate(fisher=given, name="elsewhere", weight=2.0)
    assert (state.tasks[0].num_examples, state.tasks[0].fisher_type) == (7, "exact")
    for name, tensor in given.diagonal.items():
        assert torch.equal(state.importance[name], 2 * tensor)
    with pytest.raises(ValueError, match="one or the other"):
        trainer.consolidate(Examples("bert", 4), fisher=given)
    with pytest.raises(ValueError, match="one or the other"):
        trainer.consolidate(fisher=given, log_likelihood=squared_distance)
    with pytest.raises(TypeError, match="fisher is a dict"):
        trainer.consolidate(fisher=given.diagonal)


# ---- What reaches the model ----


class Strict(nn.Module):
    """A forward that takes nothing but what it names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 6)
        self.types = nn.Embedding(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        hidden = self.embedding(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)
        logits = self.head(hidden.mean(1))
        loss = {} if labels is None else {"loss": cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Weighted(EWCTrainer):
    """Takes weights of the examples out of the inputs."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight, labels = inputs.pop("sample_weight"), inputs.pop("labels")
        inputs.pop("token_type_ids", None)
        return (weight * cross_entropy(model(**inputs)["logits"], labels, reduction="none")).mean()


class Renames(EWCTrainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(inputs["tokens"])["logits"]
        return cross_entropy(logits, inputs["labels"])


class Transforms(EWCTrainer):
    """Hands on other tensors than the batch's, next to a column of its own."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"] + 0)["logits"]
        return cross_entropy(logits * inputs["sample_weight"].mean(), inputs["labels"])


ROWS = [Examples("bert", 8)[i] for i in range(8)]
COLUMNS: dict[str, list[Any]] = {
    "input_ids": [row["input_ids"].tolist() for row in ROWS],
    "labels": [int(row["labels"]) for row in ROWS],
}
EXTRA = {"sample_weight": [0.5 + i for i in range(8)]}
TYPES = {"token_type_ids": [[i % 2] * 6 for i in range(8)]}
CASES: dict[str, tuple[type[EWCTrainer], dict[str, list[Any]]]] = {
    "a weight": (Weighted, {**COLUMNS, **EXTRA}),
    "an argument of the forward that is left out": (Weighted, {**COLUMNS, **EXTRA, **TYPES}),
    "another name": (Renames, {"tokens": COLUMNS["input_ids"], "labels": COLUMNS["labels"]}),
    "other tensors": (Transforms, {**COLUMNS, **EXTRA}),
    "nobody takes it": (EWCTrainer, {**COLUMNS, **EXTRA}),
}


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_forward_gets_what_it_gets_in_training(
    case: str, as_list: bool, tmp_path: Path
) -> None:
    kind, columns = CASES[case]
    data: Any = Dataset.from_dict(columns)
    if as_list:
        data = [{k: torch.tensor(v) for k, v in row.items()} for row in data]
    options = {"train_dataset": data, "arguments": {"remove_unused_columns": False, "max_steps": 1}}
    trainer = trainer_of(tmp_path, kind, Strict(), **options)
    if kind is not EWCTrainer:
        trainer.train()  # with learning rate 0
    state = trainer.consolidate()
    expected = estimate_fisher(Strict(), Dataset.from_dict(COLUMNS), fisher_type="empirical")
    for name, tensor in expected.diagonal.items():
        torch.testing.assert_close(state.importance[name], tensor)


class Targets(Strict):
    """Takes its labels by a name of its own; one output says yes or no."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)["logits"][:, 0]
        if targets is None:
            return {"logits": logits}
        loss = binary_cross_entropy_with_logits(logits, targets.float())
        return {"loss": loss, "logits": logits}


class OwnTargets(EWCTrainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        targets = inputs.pop("targets").float()
        return binary_cross_entropy_with_logits(model(**inputs)["logits"], targets)


@pytest.mark.parametrize("kind", [EWCTrainer, OwnTargets])
def test_labels_by_the_name_that_the_trainer_is_told(
    kind: type[EWCTrainer], tmp_path: Path
) -> None:
    """Which reading is the right one is told by the loss: 0 and 1 may also be a regression's."""
    ids, targets = COLUMNS["input_ids"], [i % 2 for i in range(8)]
    options = {"label_names": ["targets"], "max_steps": 1}
    trainer = trainer_of(
        tmp_path, kind, Targets(), arguments=options,
        train_dataset=Dataset.from_dict({"input_ids": ids, "targets": targets}),
    )  # fmt: skip
    trainer.train()  # with learning rate 0
    state = trainer.consolidate()
    model = Targets().double()
    parameters = [p for name, p in model.named_parameters() if "types" not in name]
    expected = [torch.zeros_like(p) for p in parameters]
    for row, target in zip(ids, targets, strict=True):
        logit = model(torch.tensor([row]))["logits"][0]
        gradients = torch.autograd.grad(logsigmoid(logit if target else -logit), parameters)
        expected = [e + g**2 / 8 for e, g in zip(expected, gradients, strict=True)]
    found = [v for name, v in state.importance.items() if "types" not in name]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-9)


class OwnLoader(EWCTrainer):
    """Makes its batches out of columns that the model knows nothing of."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        def collate(rows: list[Any]) -> dict[str, Tensor]:
            words = torch.tensor([row["words"] for row in rows])
            return {"input_ids": words, "labels": torch.tensor([row["labels"] for row in rows])}

        return DataLoader(self.train_dataset, batch_size=2, shuffle=True, collate_fn=collate)


def test_a_data_loader_of_the_users_own(tmp_path: Path) -> None:
    data = Dataset.from_dict({"words": COLUMNS["input_ids"], "labels": COLUMNS["labels"]})
    trainer = trainer_of(tmp_path, OwnLoader, train_dataset=data)
    before = torch.get_rng_state()
    state = trainer.consolidate(data)
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.train_dataset is data
    expected = estimate_fisher(bert(), Dataset.from_dict(COLUMNS), fisher_type="empirical")
    for name, tensor in expected.diagonal.items():
        torch.testing.assert_close(state.importance[name], tensor)


# ---- Which weights ----


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free gradient descent: the model holds y while it trains, x after `eval()`."""

    def __init__(self, params: Any, lr: float = 0.5, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "training": True})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"] = p.detach().clone()

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        for group in self.param_groups:
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            for p in group["params"] if group["training"] != training else []:
                p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p]["z"]
                    x = p.lerp(z, 1 - 1 / group["beta"])
                    z.sub_(p.grad, alpha=group["lr"])
                    p.copy_(x.lerp_(z, 1 / group["k"]).lerp(z, 1 - group["beta"]))


def weights_in_evaluation(trainer: EWCTrainer) -> dict[str, Tensor]:
    """The weights that evaluation sees."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, *_: Any) -> None:
        seen.update({n: p.detach().clone() for n, p in module.named_parameters()})

    handle = trainer.model.register_forward_pre_hook(look)
    trainer.evaluate(Examples("bert", 4))
    handle.remove()
    return seen


@pytest.mark.parametrize("order", ["consolidate first", "evaluate first", "save first"])
def test_what_is_consolidated_is_tested_and_saved(order: str, tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": (ScheduleFree, {}), "arguments": {"num_train_epochs": 3}}
    trainer = trainer_of(tmp_path, **options)
    trainer.train()
    training = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    if order == "evaluate first":
        trainer.evaluate(Examples("bert", 4))
    if order == "save first":
        trainer.save_model(str(tmp_path / "saved"))
    state = trainer.consolidate()
    tested = weights_in_evaluation(trainer)
    if order != "save first":
        trainer.save_model(str(tmp_path / "saved"))
    saved = dict(
        BertForSequenceClassification.from_pretrained(tmp_path / "saved").named_parameters()
    )
    for name, anchor in state.anchor.items():
        assert torch.equal(anchor, tested[name])
        assert torch.equal(anchor, saved[name])
    assert any(not torch.equal(training[name], anchor) for name, anchor in state.anchor.items())
    assert trainer.ewc_penalty() == 0.0


def test_checkpoints_hold_the_final_weights(tmp_path: Path) -> None:
    """What is saved in training, and comes back as the best, is what was tested then."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "eval_strategy": "steps"}
    best = {"eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_of(
        tmp_path,
        optimizer_cls_and_kwargs=(ScheduleFree, {}),
        eval_dataset=Examples("bert", 8),
        arguments={**saving, **best},
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.best_metric, rel=1e-5)
    state = trainer.consolidate()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(state.anchor[name], parameter.detach())


class Averaged(EWCTrainer):
    """Tests an average of the weights, which it puts into the model for that time."""

    @contextmanager
    def average(self) -> Iterator[None]:
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.999)
        yield
        self.model.load_state_dict(own, strict=False)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.average():
            return super().evaluate(*args, **kwargs)


@pytest.mark.parametrize("kind", [EWCTrainer, Averaged])
def test_other_weights_in_evaluation_are_said(
    kind: type[EWCTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, kind, arguments={"learning_rate": 1e-2})

    def said() -> int:
        return sum("that were tested are not those" in r.getMessage() for r in caplog.records)

    trainer.train()
    trainer.evaluate(Examples("bert", 4))
    trainer.train()  # what was tested before says nothing
    trainer.consolidate()
    assert said() == 0
    for _ in range(2):
        trainer.evaluate(Examples("bert", 4))
        trainer.save_model()
    assert said() == (1 if kind is Averaged else 0)


def test_without_ewc_nothing_is_done_to_the_optimizer(tmp_path: Path) -> None:
    trainer = EWCTrainer(
        Unused(),
        arguments(tmp_path),
        train_dataset=Examples("unused", 4),
        optimizer_cls_and_kwargs=(ScheduleFree, {}),
    )
    trainer.train()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.save_model()
    assert all(torch.equal(a, p) for a, p in zip(before, trainer.model.parameters(), strict=True))
    assert not EWCState()


def test_a_state_that_lies_beside_new_weights_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer_of(tmp_path)
    first.consolidate()
    first.save_model(str(tmp_path / "saved"))
    assert "keeps the EWC state" not in caplog.text
    kept = (tmp_path / "saved" / "ewc_state.json").read_bytes()
    trainer_of(tmp_path).save_model(str(tmp_path / "saved"))
    assert "saved keeps the EWC state of an earlier model" in caplog.text
    assert (tmp_path / "saved" / "ewc_state.json").read_bytes() == kept
