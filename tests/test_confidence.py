"""How sure a model is of the Fisher's examples, against loops over examples in float64."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from architectures import SMALL, tokens
from fishers import Classifier, features
from stored import RECORD
from test_fisher_fallback import Gated
from test_tasks import arguments, two_tasks, vit
from transformers import BertConfig, BertForQuestionAnswering, set_seed

from hf_ewc import EWCConfig, EWCState, Fisher, estimate_fisher, run_tasks
from hf_ewc.cli.main import main
from hf_ewc.state.records import TaskRecord
from hf_ewc.tasks.fishers import fisher_table
from tests.models import Examples, bert, llama


def sharp(model, scale=100.0):
    """With a head that is far from indifferent."""
    head = model.get_output_embeddings() or model.classifier
    with torch.no_grad():
        head.weight.mul_(scale)
    return model


def by_loop(model, examples, shift=False):
    """The mean over all labels of the largest probability."""
    twin, found = copy.deepcopy(model).double().eval(), []
    for example in examples:
        ids, labels = example["input_ids"][None], example["labels"].reshape(1, -1)
        logits = twin(input_ids=ids).logits
        logits = logits[:, :-1] if shift else logits.reshape(1, 1, -1)
        labels = labels[:, 1:] if shift else labels
        found += logits.softmax(-1).amax(-1)[labels != -100].tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("fisher_type", ["exact", "sampled", "empirical", "batched"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_of_a_classifier(fisher_type, batch_size):
    model, examples = sharp(bert()), Examples("bert", 5)
    found = estimate_fisher(model, examples, fisher_type=fisher_type, batch_size=batch_size)
    expected = by_loop(model, [examples[i] for i in range(5)])
    assert 0.4 < expected < 0.95
    assert found.confidence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_of_many_labels_evenly_spaced_ones_stand_for_all(batch_size):
    model = sharp(llama())
    length, prompts = 60, (0, 20, 55)  # 59, 40 and 5 labels, of which 15, 14 and 5 are looked at
    ids = torch.randint(2, 32, (3, length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    for n, prompt in enumerate(prompts):
        labels[n, :prompt] = -100
    twin = copy.deepcopy(model).double().eval()
    largest = twin(input_ids=ids).logits.softmax(-1).amax(-1)[:, :-1]
    expected = numbers = 0
    for n, step in enumerate((4, 3, 1)):
        own = largest[n][labels[n, 1:] != -100].tolist()
        expected += len(own) * sum(own[::step]) / len(own[::step])
        numbers += len(own)
    examples = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    found = estimate_fisher(model, examples, batch_size=batch_size)
    assert numbers == 104
    assert found.confidence == pytest.approx(expected / numbers, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_of_a_language_model_it_is_over_labelled_tokens(batch_size, monkeypatch):
    monkeypatch.setattr("hf_ewc.fisher.likelihood.slices._SLICE", 64)
    model, examples = sharp(llama()), Examples("llama", 5)
    found = estimate_fisher(model, examples, batch_size=batch_size)
    expected = by_loop(model, [examples[i] for i in range(5)], shift=True)
    assert found.confidence == pytest.approx(expected, rel=1e-5)


def test_masked_classes_do_not_count():
    model = sharp(bert())
    model.classifier.register_forward_hook(
        lambda m, i, out: out.index_fill(1, torch.tensor([2]), -1e4)
    )
    examples = Examples("bert", 3)
    found = estimate_fisher(model, [{**examples[i], "labels": torch.tensor(i % 2)} for i in (0, 1)])
    ids = torch.stack([examples[i]["input_ids"] for i in (0, 1)])
    probabilities = model(input_ids=ids).logits[:, :2].double().softmax(-1)
    assert found.confidence == pytest.approx(probabilities.amax(-1).mean().item(), rel=1e-5)


def test_of_yes_or_no_labels_that_are_there():
    model = Classifier(3, "multi_label_classification")
    labels = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(1)).float()
    labels[2, 1] = math.nan
    found = estimate_fisher(model, [{"x": features(), "labels": labels}])
    yes = copy.deepcopy(model).double()(features().double())["logits"].sigmoid()
    expected = torch.maximum(yes, 1 - yes)[~labels.isnan()].mean().item()
    assert found.confidence == pytest.approx(expected, rel=1e-5)


def test_of_answers_it_is_over_their_starts_and_ends():
    set_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SMALL)).eval()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(30)
    ids = tokens(3)["input_ids"]
    batch = {"input_ids": ids, "start_positions": torch.tensor([1, 2, 0]),
             "end_positions": torch.tensor([2, 3, 1])}  # fmt: skip
    outputs = model(input_ids=ids)
    both = torch.stack([outputs.start_logits, outputs.end_logits]).double()
    expected = both.softmax(-1).amax(-1).mean().item()
    assert estimate_fisher(model, [batch]).confidence == pytest.approx(expected, rel=1e-5)


def test_a_regression_and_a_likelihood_of_the_users_have_none():
    regression = {"x": features(), "labels": torch.randn(6, 1)}
    assert estimate_fisher(Classifier(1, "regression"), [regression]).confidence is None

    def log_p(model, batch):
        return model(batch["x"])["logits"].log_softmax(-1)[:, 0]

    batch = {"x": features(), "labels": torch.zeros(6, dtype=torch.long)}
    assert estimate_fisher(Classifier(3), [batch], log_likelihood=log_p).confidence is None


def test_examples_that_run_one_by_one_count_once():
    model = Gated()
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="in gru"):
        found = estimate_fisher(model, [{"x": x, "labels": torch.arange(4) % 3}])
    expected = model(x)["logits"].double().softmax(-1).amax(-1).mean().item()
    assert found.confidence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_it_is_a_share(value):
    with pytest.raises(ValueError, match="confidence is"):
        Fisher({"a": torch.ones(1)}, confidence=value)
    with pytest.raises(ValueError, match="confidence of a task is"):
        TaskRecord(**{**asdict(RECORD), "confidence": value})


def test_it_stands_in_the_state_the_report_and_is_shown(tmp_path, capsys):
    config = EWCConfig(ewc_lambda=10.0, fisher_samples=8)
    result = run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=2), config)
    folder = tmp_path / "02-2-or-3" / "final"
    kept = [record.confidence for record in EWCState.from_pretrained(folder).tasks]
    assert kept == [record.confidence for record in result.state.tasks]
    assert all(0.5 <= value <= 1.0 for value in kept)  # of two classes that a task has
    assert kept[0] != kept[1]
    written = json.loads((folder / "ewc_state.json").read_text())["tasks"]
    assert [task["confidence"] for task in written] == kept
    content = json.loads((tmp_path / "results.json").read_text())
    assert [found["confidence"] for found in content["fishers"]] == kept
    report = (tmp_path / "report.md").read_text()
    assert [f" {value:.3f} |\n" in report for value in kept] == [True, True]
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "confidence" in printed
    assert f"{kept[1]:.4g}" in printed


def test_records_without_it_are_still_read():
    old = {key: value for key, value in asdict(RECORD).items() if key != "confidence"}
    assert TaskRecord(**old).confidence is None
    row = {"task": "a", "examples": 1, "fisher_type": "exact", "trace": 2.0}
    *_, line = fisher_table([row]).splitlines()
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["a", "1", "exact", "2", ""]
