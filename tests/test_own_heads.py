"""A head of its own for each task: exchanged, trained, protected, saved and gone on with."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_tasks import CONFIG, arguments, same_weights
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainerCallback,
    set_seed,
)

from hf_ewc import EWCConfig, EWCState, SequenceConfig, Task, run_tasks
from hf_ewc.processes import is_main_process, leave
from hf_ewc.tasks import Head
from hf_ewc.tasks.head_state import joined, split
from hf_ewc.tasks.heads import Heads, as_head
from tests.processes import launch, torchrun

PATHS = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
SIZES = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def bert(**options):
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(**SIZES, vocab_size=20, max_position_embeddings=8, num_labels=2, **options)
    )


def rows(make_label, count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (count, 5), generator=generator)
    return [{"input_ids": row, "labels": make_label(row)} for row in ids]


def task(name, make_label, **options):
    return Task(name, rows(make_label), rows(make_label, 8, seed=1), **options)


def four_tasks():
    """Two classes on the model's own head, then three, a regression, and a label by token."""
    regression = {"num_labels": 1, "problem_type": "regression"}
    tagging = Head(4, model_class=BertForTokenClassification)
    return [
        task("two", lambda row: int(row[0]) % 2),
        task("three", lambda row: int(row[1]) % 3, head=3),
        task("number", lambda row: float(row[2]) / 20, head=regression, metric="loss"),
        task("tags", lambda row: row % 4, head=tagging),
    ]


def head_of(folder, cls=BertForSequenceClassification):
    return cls.from_pretrained(folder).classifier


def test_heads_are_exchanged_and_come_back():
    model = bert().eval()
    own, ids = model.classifier, torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    heads = Heads(
        model,
        {
            "three": Head(3),
            "number": Head(1, "regression"),
            "tags": Head(4, model_class=BertForTokenClassification),
        },
        seed=5,
    )
    with heads.only("three"):
        assert model(input_ids=ids).logits.shape == (1, 3)
        assert (model.num_labels, model.config.num_labels) == (3, 3)
        with heads.only("tags"):
            assert type(model) is BertForTokenClassification
            output = model(input_ids=ids, labels=torch.tensor([[0, 3, -100]]))
            assert output.logits.shape == (1, 3, 4)
            expected = nn.functional.cross_entropy(output.logits[0, :2], torch.tensor([0, 3]))
            torch.testing.assert_close(output.loss, expected)
    with heads.only("number"):
        output = model(input_ids=ids, labels=torch.tensor([0.25]))
        torch.testing.assert_close(output.loss, (output.logits[0, 0] - 0.25) ** 2)
    assert model.classifier is own
    assert (type(model), model.num_labels) == (BertForSequenceClassification, 2)
    assert torch.equal(model(input_ids=ids).logits, before)
    again = Heads(bert(), {"three": Head(3)}, seed=5)
    with heads.only("three"), again.only("three"):
        assert torch.equal(model.classifier.weight, again._inner.classifier.weight)


def test_four_tasks_with_other_heads(tmp_path):
    model = bert()
    result = run_tasks(model, four_tasks(), arguments(tmp_path), CONFIG, scenario="task")
    assert result.matrix.num_learnt == 4
    assert set(result.metrics[3]["number"]) == {"loss"}
    assert result.model is model
    # The state of the run is the backbone's; each task's folder has its own head and its state.
    assert not any("classifier" in name for name in result.state.importance)
    folders = [tmp_path / f"0{i + 1}-{t.name}" / "final" for i, t in enumerate(four_tasks())]
    sizes = [head_of(folder).out_features for folder in folders[:3]]
    assert sizes == [2, 3, 1]
    assert head_of(folders[3], BertForTokenClassification).out_features == 4
    assert EWCState.from_pretrained(folders[1]).importance["classifier.weight"].shape == (3, 8)
    # The head of an earlier task stays as it was when that task was learnt.
    last = load_file(folders[3] / "heads.safetensors")
    for i, folder in enumerate(folders[:3]):
        assert torch.equal(last[f"{i}.classifier.weight"], head_of(folder).weight), i


def test_the_score_of_an_earlier_task_is_that_of_its_head_over_the_backbone_of_now(tmp_path):
    tasks = four_tasks()[:2]
    model = bert()
    result = run_tasks(model, tasks, arguments(tmp_path), CONFIG, scenario="task")
    model.classifier = head_of(tmp_path / "01-two" / "final")
    batch = torch.stack([example["input_ids"] for example in tasks[0].eval_dataset])
    labels = torch.tensor([example["labels"] for example in tasks[0].eval_dataset])
    found = (model.eval()(input_ids=batch).logits.argmax(-1) == labels).float().mean().item()
    assert result.matrix["three", "two"] == pytest.approx(found)


def test_further_tasks_and_a_second_call_go_on(tmp_path):
    whole = run_tasks(bert(), four_tasks(), arguments(tmp_path / "a"), CONFIG, scenario="task")
    args = arguments(tmp_path / "b")
    for count in (1, 3, 4):
        part = run_tasks(bert(), four_tasks()[:count], args, CONFIG, scenario="task")
    assert same_weights(part.model, whole.model)
    assert part.matrix == whole.matrix
    assert part.state.importance.keys() == whole.state.importance.keys()


def test_a_shared_head_is_protected_or_free(tmp_path):
    penalties = {}
    for protected in (True, False):
        head = Head(3, name="shared", protected=protected)
        tasks = [
            task("one", lambda row: int(row[1]) % 3, head=head),
            task("between", lambda row: int(row[0]) % 2),
            task("two", lambda row: int(row[2]) % 3, head=head),
        ]
        args = arguments(tmp_path / str(protected), max_steps=2)
        run_tasks(bert(), tasks, args, EWCConfig(ewc_mode="separate", fisher_samples=8))
        final = tmp_path / str(protected) / "03-two" / "final"
        penalties[protected] = EWCState.from_pretrained(final).importance["classifier.weight"]
    # Consolidated twice where it is protected, and once where it is free.
    assert (penalties[True] >= penalties[False]).float().mean() > 0.6
    assert penalties[True].sum() > 1.2 * penalties[False].sum()


def test_the_parts_of_a_state_are_the_whole():
    torch.manual_seed(0)
    names = {"bert.a": torch.rand(3), "classifier.weight": torch.rand(2, 3)}
    state = EWCState(names, {n: torch.randn_like(t) for n, t in names.items()}, {"bert.a": 0.5})
    backbone, head = split(state, ["classifier.weight"])
    assert list(backbone.importance) == ["bert.a"]
    assert list(head.importance) == ["classifier.weight"]
    again = joined(backbone, head)
    for name in names:
        assert torch.equal(again.importance[name], state.importance[name])
        assert torch.equal(again.anchor[name], state.anchor[name])
    assert again.offset == state.offset


def quiet_bert():
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_replayed_examples_go_through_their_own_heads(tmp_path):
    """One SGD step on a batch of three kinds, against Σ n_k/n L_k by hand."""
    tasks = four_tasks()[:3]
    args = arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=64, optim="sgd", max_grad_norm=0.0
    )
    config = SequenceConfig(replay_per_class=2)
    two = run_tasks(quiet_bert(), tasks[:2], args, sequence_config=config, scenario="task")
    before = {name: p.detach().clone() for name, p in two.model.named_parameters()}
    third = run_tasks(quiet_bert(), tasks, args, sequence_config=config, scenario="task").model
    kept = json.loads((tmp_path / "replay.json").read_text())["3"]
    stored = load_file(tmp_path / "02-three" / "final" / "heads.safetensors")
    fresh = Heads(quiet_bert(), {"three": Head(3), "number": Head(1, "regression")}, seed=42)
    with fresh.only("number"):
        for name, tensor in fresh._inner.classifier.state_dict().items():
            stored[f"2.classifier.{name}"] = tensor
    model = quiet_bert()
    model.load_state_dict({**model.state_dict(), **before_of_backbone(before)})
    model.eval()
    heads, loss = {}, 0.0
    examples = {
        2: tasks[2].train_dataset,
        0: [tasks[0].train_dataset[i] for i in kept["1"]],
        1: [tasks[1].train_dataset[i] for i in kept["2"]],
    }
    total = sum(map(len, examples.values()))
    for k, chosen in examples.items():
        heads[k] = nn.Linear(8, (2, 3, 1)[k])
        with torch.no_grad():
            heads[k].weight.copy_(stored[f"{k}.classifier.weight"])
            heads[k].bias.copy_(stored[f"{k}.classifier.bias"])
        pooled = model.bert(torch.stack([e["input_ids"] for e in chosen])).pooler_output
        labels = torch.tensor([e["labels"] for e in chosen])
        logits = heads[k](pooled)
        one = (
            nn.functional.mse_loss(logits[:, 0], labels)
            if k == 2
            else nn.functional.cross_entropy(logits, labels)
        )
        loss = loss + one * len(chosen) / total
    loss.backward()
    found = dict(third.named_parameters())
    for name, p in model.bert.named_parameters():
        expected = before[f"bert.{name}"] - 1e-2 * p.grad
        torch.testing.assert_close(found[f"bert.{name}"].detach(), expected, rtol=1e-3, atol=1e-6)
    now = load_file(tmp_path / "03-number" / "final" / "heads.safetensors")
    for k, head in heads.items():
        expected = head.weight.detach() - 1e-2 * head.weight.grad
        torch.testing.assert_close(now[f"{k}.classifier.weight"], expected, rtol=1e-3, atol=1e-6)


def before_of_backbone(before):
    return {name: tensor for name, tensor in before.items() if name.startswith("bert.")}


@pytest.mark.parametrize("space", ["adapter", "weight"])
def test_heads_under_a_lora_adapter(tmp_path, space):
    def adapted():
        config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
        return get_peft_model(bert(), config)

    tasks, config = four_tasks()[:3], EWCConfig(fisher_samples=8, ewc_space=space)
    whole = run_tasks(adapted(), tasks, arguments(tmp_path / "a"), config, scenario="task")
    assert not any("classifier" in name for name in whole.state.importance)
    args = arguments(tmp_path / "b")
    run_tasks(adapted(), tasks[:2], args, config, scenario="task")
    part = run_tasks(adapted(), tasks, args, config, scenario="task")
    assert same_weights(part.model, whole.model)
    assert part.matrix == whole.matrix
    with pytest.raises(ValueError, match="under a PEFT adapter"):
        run_tasks(adapted(), four_tasks(), arguments(tmp_path / "c"), scenario="task")
    sequence = SequenceConfig(l2sp_lambda=1.0)
    if space == "weight":
        with pytest.raises(ValueError, match="ewc_space='adapter'"):
            run_tasks(adapted(), tasks, args, config, sequence_config=sequence, scenario="task")


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (0, ValueError, "num_labels of a head is 0"),
        ("three", TypeError, "head is 'three'"),
        ({"num_labels": 2, "problem_type": "ranking"}, ValueError, "'ranking'"),
        ({"num_labels": 2.5}, TypeError, "needed is an integer"),
        (Head(3, name="two heads"), ValueError, "of an earlier one"),
    ],
)
def test_bad_heads(tmp_path, head, error, message):
    first = task("a", lambda row: 0, head=Head(2, name="two heads"))
    later = task("b", lambda row: 0, head=head)
    with pytest.raises(error, match=message):
        run_tasks(bert(), [first, later], arguments(tmp_path), scenario="task")


def test_what_has_no_head_to_exchange(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no backbone apart from its head"):
        Heads(model, {"a": Head(2)}, 0)
    both = task("a", lambda row: 0, head=2, classes=[0])
    with pytest.raises(ValueError, match="classes and a head"):
        run_tasks(bert(), [both], arguments(tmp_path))
    assert as_head(None) is None


# ---- kill -9 over a sequence with replay, a head for each task and warm-up ----


class KillAt(TrainerCallback):
    def __init__(self, where):
        self.where, self.seen = where, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen += 1
        if self.where == f"step {self.seen}":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args, state, control, **kwargs):
        if self.where == f"save {Path(args.output_dir).name[:2]} {state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)


def everything(folder, where=""):
    config = SequenceConfig(replay_share=0.25, head_warmup_share=0.3)
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    result = run_tasks(
        bert(), four_tasks(), args, CONFIG, sequence_config=config, callbacks=[KillAt(where)]
    )
    save_weights(result.model, folder)


def test_killed_it_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    everything(tmp_path / "whole")
    for where in ("step 6", "save 03 2"):
        assert start(tmp_path / "cut", where)[0] == -signal.SIGKILL
    code, output = start(tmp_path / "cut", "")
    assert code == 0, output[-3000:]
    same_ending(tmp_path / "whole", tmp_path / "cut")


def same_ending(*folders):
    for name in ("weights.pt", "04-tags/final/heads.safetensors"):
        read = torch.load if name.endswith(".pt") else load_file
        one, two = (read(folder / name) for folder in folders)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = ((folder / "results.json").read_text() for folder in folders)
    assert one == two


def start(folder, where):
    return launch("tests.test_own_heads", str(folder), where, PYTHONPATH=PATHS)


def test_four_heads_on_two_processes(tmp_path):
    code, output = launch(
        *torchrun(2), "-m", "tests.test_own_heads", str(tmp_path / "whole"), "", PYTHONPATH=PATHS
    )
    assert code == 0, output[-6000:]
    content = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [list(scores) for scores in content["metrics"]][3] == ["two", "three", "number", "tags"]
    # Without replay, two processes of half the batch end where one does.
    alone = run_tasks(
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        four_tasks(),
        arguments(tmp_path / "one", max_steps=2, per_device_train_batch_size=16),
        CONFIG,
        scenario="task",
    )
    code, output = launch(
        *torchrun(2), "-m", "tests.test_own_heads", str(tmp_path / "two"), "x", PYTHONPATH=PATHS
    )
    assert code == 0, output[-6000:]
    weights = torch.load(tmp_path / "two" / "weights.pt")
    for name, parameter in alone.model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def on_two(folder):
    """As the run of one process in the test above, by two."""
    result = run_tasks(
        bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        four_tasks(),
        arguments(folder, max_steps=2, per_device_train_batch_size=8),
        CONFIG,
        scenario="task",
    )
    save_weights(result.model, folder)


def save_weights(model, folder):
    if is_main_process():
        torch.save(dict(model.named_parameters()), Path(folder) / "weights.pt")


if __name__ == "__main__":
    on_two(sys.argv[1]) if sys.argv[2] == "x" else everything(*sys.argv[1:])
    leave()
