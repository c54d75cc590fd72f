"""A trainer's evaluation of further data: all of these, and with weights that stay as they are."""

import pytest
import torch
from test_tasks import arguments, examples, two_tasks, vit
from transformers import Trainer

from hf_ewc import Task, run_tasks
from hf_ewc.training.evaluating import all_of_its_own_data

SETS = [examples((0, 1), 11, seed=1), examples((2, 3), 6, seed=2)]


def count(prediction):
    return {"count": float(len(prediction.label_ids))}


def loss_by_hand(model, data):
    images = torch.stack([example["pixel_values"] for example in data])
    labels = torch.tensor([example["labels"] for example in data])
    with torch.no_grad():
        return model.eval()(pixel_values=images, labels=labels).loss.item()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_each_data_set_is_evaluated_in_full(drops, persistent, tmp_path):
    workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    args = arguments(
        tmp_path, dataloader_drop_last=drops, per_device_eval_batch_size=8,
        **(workers if persistent else {}),
    )  # fmt: skip
    trainer = Trainer(vit(), args, eval_dataset=SETS[0], compute_metrics=count)
    trainer.evaluate()  # whose loader persists
    loaders = dict(vars(trainer).get("_eval_dataloaders", {}))
    for data in (SETS[1], SETS[0]):
        with all_of_its_own_data(trainer):
            found = trainer.evaluate(data)
        assert found["eval_count"] == len(data)
        assert found["eval_loss"] == pytest.approx(loss_by_hand(trainer.model, data), rel=1e-4)
    assert trainer.args.dataloader_drop_last is drops
    assert vars(trainer).get("_eval_dataloaders", {}) == loaders


def test_a_run_scores_each_task_on_its_own_data_where_workers_persist(tmp_path):
    also = [Task("other", None, examples((0, 1, 2, 3), 10, seed=5))]
    found = {}
    for persistent in (False, True):
        args = arguments(
            tmp_path / str(persistent), max_steps=2, dataloader_num_workers=1,
            dataloader_persistent_workers=persistent,
        )  # fmt: skip
        found[persistent] = run_tasks(vit(), two_tasks(), args, evaluate_also=also).metrics
    assert found[True] == found[False]


def test_weights_stay_in_their_precision_after_evaluation_in_half(tmp_path):
    args = arguments(tmp_path, max_steps=2, bf16_full_eval=True)
    model = run_tasks(vit(), two_tasks(), args).model
    plain = run_tasks(vit(), two_tasks(), arguments(tmp_path / "plain", max_steps=2)).model
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_batches_of_outputs_are_for_the_users_metrics(tmp_path):
    args = arguments(tmp_path, max_steps=1, eval_do_concat_batches=False)
    with pytest.raises(ValueError, match="eval_do_concat_batches is False"):
        run_tasks(vit(), two_tasks(), args)
    assert not (tmp_path / "results.json").exists()
