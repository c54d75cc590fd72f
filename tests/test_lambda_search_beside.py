"""The search for λ beside everything else that a run does, in one process and in two."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lambda_search import AUTO, three_tasks, tried
from test_own_heads import bert, four_tasks
from test_tasks import arguments, two_tasks, vit

from hf_ewc import EWCConfig, SequenceConfig, compare_methods, run_tasks
from hf_ewc.processes import is_main_process, leave
from hf_ewc.tasks.lambda_search import LambdaSearch
from tests.processes import launch, torchrun

PATHS = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])


def adapted(folder, space):
    model = get_peft_model(
        bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
    )
    tasks = [replace(t, head=None) for t in four_tasks()[:1]]
    tasks += [replace(tasks[0], name="again", train_dataset=tasks[0].train_dataset[::-1])]
    return model, tasks, {"ewc_space": space}, {}


def combination(name):
    """A model, tasks, and the settings of EWC and of the sequence."""
    if name.startswith("LoRA"):
        return adapted(None, name.split()[1])
    if name == "heads":
        return bert(), four_tasks(), {}, {}
    if name == "heads and replay":
        return bert(), four_tasks(), {}, {"replay_share": 0.5, "distillation_weight": 1.0}
    if name == "classes and replay":
        return vit(), two_tasks(), {}, {"replay_share": 0.5, "head_warmup_share": 0.2}
    if name == "growing head":
        growing = {"grow_head": True, "replay_per_class": 4, "separated_softmax": True}
        return vit(2), two_tasks(masked=False), {}, {**growing, "align_weights": True}
    if name == "L2-SP and gate":
        gate = {"max_forgetting": 1.0, "gate_retries": 1, "keep_models": "last"}
        return vit(), two_tasks(), {"ewc_mode": "separate"}, {"l2sp_lambda": 0.1, **gate}
    return vit(), two_tasks(), {"fisher_data": "held_out"}, {"joint_training": True}


@pytest.mark.parametrize(
    "name",
    [
        *("LoRA adapter", "LoRA weight", "heads", "heads and replay", "classes and replay"),
        *("growing head", "L2-SP and gate", "held out and joint"),
    ],
)
def test_it_goes_with(tmp_path, monkeypatch, name):
    """After a search the weights are what they were, bit for bit, and the run goes on."""
    model, tasks, ewc, sequence = combination(name)
    find, looked = LambdaSearch.find, []

    def watched(self, index, model, data):
        heads = self._space.heads
        before = [p.detach().clone() for p in everything(model, heads)]
        find(self, index, model, data)
        looked.append(index)
        after = everything(model, heads)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    monkeypatch.setattr(LambdaSearch, "find", watched)
    config = EWCConfig(ewc_lambda="auto", fisher_samples=4, **ewc)
    options = dict(sequence_config=SequenceConfig(**sequence), scenario="task")
    result = run_tasks(model, tasks, arguments(tmp_path, max_steps=2), config, **options)
    assert looked == list(range(len(tasks)))
    assert [curve.task for curve in result.searches] == [task.name for task in tasks[1:]]
    used = [record.ewc_lambda for record in result.state.tasks]
    assert used == [None, *(curve.chosen for curve in result.searches)]


def everything(model, heads):
    found = list(model.parameters())
    return found if heads is None else [*found, *heads._tensors().values()]


def test_methods_and_their_report(tmp_path):
    methods = {"plain": {}, "found": {"ewc_lambda": "auto", "fisher_samples": 4}}
    args = arguments(tmp_path, max_steps=2)
    comparison = compare_methods(vit, two_tasks(), args, methods, seeds=[0, 1])
    assert [len(o.searches) for o in comparison.runs["found"].values()] == [1, 1]
    report = (tmp_path / "report.md").read_text()
    assert "How λ was found" in report
    assert "lambda_search.png" in report
    assert (tmp_path / "lambda_search.png").stat().st_size > 0
    assert not (tmp_path / "plain" / "seed-0" / "lambda_search.png").exists()


def on(folder, size):
    """Three tasks, scored before the first, with batches of this size in each process."""
    args = arguments(folder, num_train_epochs=6, per_device_train_batch_size=size)
    result = run_tasks(vit(), three_tasks(), args, AUTO, evaluate_unseen=True)
    if is_main_process():
        torch.save(outputs(result.model), Path(folder) / "outputs.pt")
    return result


def test_two_processes_find_the_same(tmp_path):
    alone = on(tmp_path / "one", 8)
    command = [*torchrun(2), "-m", "tests.test_lambda_search_beside", str(tmp_path / "two")]
    code, output = launch(*command, PYTHONPATH=PATHS)
    assert code == 0, output[-6000:]
    (run,) = json.loads((tmp_path / "two" / "results.json").read_text())["runs"]["EWC"]
    two = [[(t["ewc_lambda"], t["score"]) for t in s["trials"]] for s in run["lambda_search"]]
    assert two == tried(alone)
    # Not weight by weight: Adam scales up the rounding of those that have no effect (keys' biases).
    there = torch.load(tmp_path / "two" / "outputs.pt")
    torch.testing.assert_close(there, outputs(alone.model), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def outputs(model):
    images = [e["pixel_values"] for task in three_tasks() for e in task.eval_dataset]
    return model.eval()(pixel_values=torch.stack(images)).logits


if __name__ == "__main__":
    on(sys.argv[1], 4)
    leave()
