"""States that refer to a model's weights for their anchors: one copy on disk, and none to lose."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import MODELS, Examples, bert
from peft import LoraConfig, get_peft_model
from states import random_fisher
from stored import files, make, refuse, tensor_file
from test_storage_damage import set_to
from test_storage_hub import fake_hub  # noqa: F401
from test_tasks import CONFIG, same_weights, two_tasks, vit
from test_tasks import arguments as task_arguments
from training import arguments
from transformers import Trainer

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher, run_tasks
from hf_ewc.state.document import STATE_FILE, encoded


def consolidated(model, names=()):
    return EWCState().consolidate(random_fisher(model, 0, names), model)


def lora(model):
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )


CASES = {
    "whole": (lambda: MODELS["llama"](), {}),
    "in shards": (lambda: MODELS["llama"](), {"max_shard_size": 3000}),
    "tied": (lambda: MODELS["gpt2"](), {}),
    "under other names": (lambda: MODELS["vit"](), {}),
    "in half precision": (lambda: MODELS["llama"]().bfloat16(), {}),
    "an adapter": (lambda: lora(MODELS["llama"]()), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_anchors_are_not_written_twice(case, tmp_path, caplog):
    build, options = CASES[case]
    model = build()
    model.save_pretrained(tmp_path, **options)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    state = consolidated(model, tuple(trained))
    state.save_pretrained(tmp_path / "copy")
    state.save_pretrained(tmp_path, checkpoint=tmp_path)
    assert "copy of the others" not in caplog.text
    copy, own = tensor_file(tmp_path / "copy"), tensor_file(tmp_path)
    shutil.rmtree(tmp_path / "copy")
    held = sum(state.packed(name)[0].nbytes for name in state.importance)
    assert held < own.stat().st_size < held + 200 * len(trained) + 1000
    assert copy.name != own.name
    found = EWCState.from_pretrained(tmp_path)
    assert found == state
    assert found.packed(trained[0])[1].values.dtype == state.packed(trained[0])[1].values.dtype
    found.check(model)
    assert found.penalty(model).item() == 0.0


def test_a_part_of_the_parameters_and_packed_importances(tmp_path):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    names = ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight")
    for dtype in ("bfloat16", "float8"):
        state = consolidated(model, names).pack(dtype)
        state.save_pretrained(tmp_path, checkpoint=tmp_path)
        assert EWCState.from_pretrained(tmp_path) == state


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_not_copied(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    consolidated(MODELS["llama"]()).save_pretrained(tmp_path, checkpoint=tmp_path)
    loaded = EWCState.from_pretrained(tmp_path)
    assert f"{tmp_path}/model.safetensors" in Path("/proc/self/maps").read_text()
    assert loaded.num_tasks == 1


def test_only_what_is_the_same_bit_for_bit_is_referred_to(tmp_path, caplog):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    changed = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(changed)
        weight[-1, -1] += weight[-1, -1].abs() * 2**-22
        model.model.norm.weight[0] = 0.0
    model.save_pretrained(tmp_path / "zero")
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0
    state = consolidated(model)
    state.save_pretrained(tmp_path / "ewc", checkpoint=tmp_path / "zero")
    assert EWCState.from_pretrained(tmp_path / "ewc") == state
    document = json.loads((tmp_path / "ewc" / STATE_FILE).read_text())
    (entry,) = document["anchors"].values()
    assert state.importance.keys() - entry["tensors"].keys() == {"model.norm.weight"}
    state.save_pretrained(tmp_path / "ewc", checkpoint=tmp_path / "model.safetensors")
    document = json.loads((tmp_path / "ewc" / STATE_FILE).read_text())
    assert list(document["anchors"]) == ["../model.safetensors"]
    (entry,) = document["anchors"].values()
    missing = state.importance.keys() - entry["tensors"].keys()
    assert missing == {"model.norm.weight", changed}
    assert "its own copy of the others" in caplog.text
    assert EWCState.from_pretrained(tmp_path / "ewc") == state


def test_sparse_anchors_and_those_between_tasks_are_written(tmp_path, caplog):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    sparse = consolidated(model).pack(keep_fraction=0.1)
    sparse.save_pretrained(tmp_path, checkpoint=tmp_path)
    assert EWCState.from_pretrained(tmp_path) == sparse
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    both = consolidated(MODELS["llama"]()).consolidate(
        random_fisher(model, 1), model, mode="separate"
    )
    both.save_pretrained(tmp_path, checkpoint=tmp_path)
    assert EWCState.from_pretrained(tmp_path) == both
    assert "its own copy" in caplog.text


def test_the_weights_under_a_fresh_adapter_are_those_of_the_base(tmp_path):
    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    names = [n for n, _ in base.named_parameters() if "q_proj" in n]
    for init in (True, False):
        model = get_peft_model(
            MODELS["llama"](),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init),
        )
        fisher = Fisher({n: torch.rand(base.get_parameter(n).shape) for n in names})
        state = EWCState().consolidate(fisher, model)
        state.save_pretrained(tmp_path / "ewc", checkpoint=tmp_path / "base")
        document = json.loads((tmp_path / "ewc" / STATE_FILE).read_text())
        assert ("anchors" in document) == init
        assert EWCState.from_pretrained(tmp_path / "ewc") == state


def test_a_changed_or_missing_checkpoint_is_refused(tmp_path):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path, max_shard_size=3000)
    state = consolidated(model)
    state.save_pretrained(tmp_path / "ewc", checkpoint=tmp_path)
    for path in sorted(tmp_path.glob("model-*.safetensors"))[:3]:
        whole = path.read_bytes()
        for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-8], b"", None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            seen = "is not there" if content is None else "has other content now"
            refuse(tmp_path / "ewc", f"{path.name}, and .* {seen}. Put back that file")
        path.write_bytes(whole)
    assert EWCState.from_pretrained(tmp_path / "ewc") == state


def test_folders_move_together(tmp_path):
    for place in ("run", "run/ewc"):
        MODELS["llama"]().save_pretrained(tmp_path / "run")
        state = consolidated(MODELS["llama"]())
        state.save_pretrained(tmp_path / place, checkpoint=tmp_path / "run")
        shutil.move(tmp_path / "run", tmp_path / "moved")
        assert EWCState.from_pretrained(tmp_path / place.replace("run", "moved")) == state
        shutil.move(tmp_path / place.replace("run", "moved"), tmp_path / "alone" / "ewc")
        if place == "run/ewc":
            refuse(tmp_path / "alone" / "ewc", "is not there")
        shutil.rmtree(tmp_path / "moved", ignore_errors=True)
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_are_followed_as_the_cache_of_the_hub_has_them(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    state = consolidated(MODELS["llama"]())
    state.save_pretrained(tmp_path / "here" / "deep" / "ewc", checkpoint=snapshot)
    assert EWCState.from_pretrained(tmp_path / "here" / "deep" / "ewc") == state


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"model.bin": b"x"},
        {"model.safetensors": b"x" * 99},
        {INDEX: b"{"},
        {INDEX: b"{}"},
        {INDEX: b'{"weight_map": [1]}'},
        {INDEX: b'{"weight_map": {"w": "gone.safetensors"}}'},
    ],
)
def test_what_holds_no_weights_is_refused(content, tmp_path):
    for name, data in (content or {}).items():
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"holds no weights in safetensors|not a whole safetensors|no index of"
    ):
        make().save_pretrained(tmp_path / "ewc", checkpoint=tmp_path / "model")
    assert not (tmp_path / "ewc").exists()


DAMAGED = {
    "an absolute path": lambda found: {"/" + path: entry for path, entry in found.items()},
    "another kind of file": lambda found: {path[:-11] + "bin": e for path, e in found.items()},
    "twice": lambda found: {**found, "other.safetensors": next(iter(found.values()))},
    "no names": lambda found: {path: {**e, "tensors": [1]} for path, e in found.items()},
    "an unknown name": lambda found: {p: {**e, "tensors": {"x": "y"}} for p, e in found.items()},
    "no tensor": lambda found: {
        p: {**e, "tensors": dict.fromkeys(e["tensors"], "nothing")} for p, e in found.items()
    },
    "another's": lambda found: {
        p: {**e, "tensors": dict.fromkeys(e["tensors"], "model.norm.weight")}
        for p, e in found.items()
    },
    "no hash": lambda found: {path: {**e, "sha256": "x"} for path, e in found.items()},
    "no size": lambda found: {path: {**e, "bytes": -1} for path, e in found.items()},
    "a list": lambda found: [1],
    "nothing": lambda found: {},
}


@pytest.mark.parametrize("change", DAMAGED)
def test_documents_that_are_whole_but_wrong_are_refused(tmp_path, change):
    MODELS["llama"]().save_pretrained(tmp_path)
    consolidated(MODELS["llama"]()).save_pretrained(tmp_path, checkpoint=tmp_path)
    path = tmp_path / STATE_FILE
    document = json.loads(path.read_text())
    set_to("anchors", DAMAGED[change](document["anchors"]))(document)
    path.write_bytes(encoded(document))
    refuse(tmp_path, "damaged|make no state|do not fit|other shapes?")


def test_the_hub_gets_a_whole_state_and_gives_one_that_refers_to_its_own(tmp_path, fake_hub):  # noqa: F811
    MODELS["llama"]().save_pretrained(tmp_path / "run")
    state = consolidated(MODELS["llama"]())
    state.save_pretrained(tmp_path / "run", checkpoint=tmp_path / "run")
    EWCState.from_pretrained(tmp_path / "run").push_to_hub("me/llama")
    assert "anchors" not in json.loads((fake_hub.head("me/llama") / STATE_FILE).read_text())
    assert EWCState.from_pretrained("me/llama") == state
    (tmp_path / "run" / "README.md").write_text("")
    options = {"delete_patterns": "ewc_state-*.safetensors"}
    fake_hub.upload_folder(repo_id="me/llama", folder_path=tmp_path / "run", **options)
    assert EWCState.from_pretrained("me/llama") == state
    state.save_pretrained(tmp_path / "ewc", checkpoint=tmp_path / "run")
    fake_hub.upload_folder(repo_id="me/llama", folder_path=tmp_path / "ewc", **options)
    with pytest.raises(ValueError, match=r"outside of the repository.*push_to_hub"):
        EWCState.from_pretrained("me/llama")


# ---- In the Trainer ----


def trainer_of(model, folder, state=None, anchor="reference"):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args = arguments(folder, learning_rate=0.01, optim="sgd", **steps)
    config = EWCConfig(ewc_lambda=10.0, ewc_anchor=anchor)
    return EWCTrainer(
        model=model, args=args, train_dataset=Examples("bert", 8), ewc_config=config,
        ewc_state=state,
    )  # fmt: skip


def test_what_a_trainer_saves_refers_to_its_model(tmp_path):
    trainer = trainer_of(bert(), tmp_path)
    trainer.train()
    state = trainer.consolidate()
    trainer.save_model()
    assert [name for name in files(tmp_path) if name.startswith("ewc_state")] == [
        tensor_file(tmp_path).name, STATE_FILE
    ]  # fmt: skip
    assert json.loads((tmp_path / STATE_FILE).read_text())["anchors"].keys() == {
        "model.safetensors"
    }
    assert EWCState.from_pretrained(tmp_path) == state
    first = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer = trainer_of(trainer.model, tmp_path, tmp_path)
    trainer.train()  # its checkpoints hold a state with a copy: their model is another
    for step in (2, 4):
        assert EWCState.from_pretrained(tmp_path / f"checkpoint-{step}") == state
    trainer.save_model()  # takes the place of the weights that the state was read from
    assert EWCState.from_pretrained(tmp_path) == state
    assert all(torch.equal(trainer.ewc_state.anchor[name], first[name]) for name in state.anchor)
    ended = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    again = trainer_of(bert(), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.ewc_state == state
    assert all(torch.equal(p, ended[n]) for n, p in again.model.named_parameters())


def test_weights_that_are_written_half_leave_a_whole_state(tmp_path, monkeypatch):
    trainer = trainer_of(bert(), tmp_path)
    state = trainer.consolidate()
    trainer.save_model()
    trainer.train()

    def killed(self, output_dir=None, _internal_call=False):
        (tmp_path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert EWCState.from_pretrained(tmp_path) == state


def test_a_run_over_tasks_is_the_same_on_less_disk(tmp_path):
    runs = {}
    for anchor in ("copy", "reference"):
        config = replace(CONFIG, ewc_anchor=anchor)
        for tasks in (two_tasks()[:1], two_tasks()):  # the second call goes on from the disk
            args = task_arguments(tmp_path / anchor, max_steps=1)
            runs[anchor] = run_tasks(vit(), tasks, args, config)
    copy, reference = (runs[anchor].state for anchor in ("copy", "reference"))
    assert copy.anchor == reference.anchor
    assert copy.importance == reference.importance
    assert same_weights(runs["copy"].model, runs["reference"].model)
    size = {
        anchor: sum(path.stat().st_size for path in (tmp_path / anchor).rglob("ewc_state-*"))
        for anchor in runs
    }
    assert size["reference"] < 0.52 * size["copy"]
