"""Arguments that cannot be meant, in the first calls that people make: one sentence each."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from test_tasks import arguments, two_tasks, vit
from torch.utils.data import DataLoader, TensorDataset

from hf_ewc import EWCState, Fisher, estimate_fisher, run_tasks
from tests.models import Examples, bert


@pytest.fixture(scope="module")
def known():
    model = bert()
    fisher = estimate_fisher(model, Examples("bert", 4))
    return model, fisher, EWCState().consolidate(fisher, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gamma": "half"},
            "gamma is 'half'; allowed is a finite number of at least 0 and at most",
        ),
        ({"gamma": 1.5}, "gamma is 1.5; allowed is"),
        ({"weight": None}, "weight is None; allowed is a finite number of at least 0"),
        ({"weight": True}, "weight is True; allowed is"),
        ({"keep_fraction": "all"}, "keep_fraction is 'all'; allowed is a finite number above 0"),
        ({"keep_fraction": 0}, "keep_fraction is 0; allowed is"),
    ],
)
def test_how_a_task_is_folded_in(settings, message, known):
    model, fisher, state = known
    with pytest.raises(ValueError, match=re.escape(message)):
        state.consolidate(fisher, model, **settings)


@pytest.mark.parametrize("fraction", ["all", None, 2, float("nan")])
def test_what_a_packed_state_keeps(fraction, known):
    with pytest.raises(ValueError, match="keep_fraction is"):
        known[2].pack(keep_fraction=fraction)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_samples": "all"},
            "num_samples is 'all'; allowed is an integer of at least 1, or None",
        ),
        ({"batch_size": 2.5}, "batch_size is 2.5; allowed is an integer"),
        ({"num_draws": "2"}, "num_draws is '2'; allowed is an integer"),
        ({"seed": None}, "seed is None; allowed is an integer of at least 0"),
    ],
)
def test_how_a_fisher_is_estimated(settings, message, known):
    with pytest.raises(ValueError, match=re.escape(message)):
        estimate_fisher(known[0], Examples("bert", 4), **settings)


@pytest.mark.parametrize(
    ("diagonal", "message"),
    [
        ([torch.ones(3)], "diagonal is a list; needed is a dict of tensors"),
        (None, "diagonal is a NoneType"),
        ({1: torch.ones(2)}, "Fisher has the name 1; a parameter's name is a string"),
    ],
)
def test_what_a_fisher_holds(diagonal, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        Fisher(diagonal)


@pytest.mark.parametrize(
    "diagonal",
    [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")],
)
def test_a_fisher_without_values_of_its_own(diagonal):
    with pytest.raises(TypeError, match=r"Fisher of 'a' is .*; needed is a dense tensor"):
        Fisher({"a": diagonal})


@pytest.mark.parametrize("parameters", [None, 3])
def test_parameters_that_are_none(parameters, known):
    with pytest.raises(TypeError, match=r"parameters is .*; needed is the model, a dict by name"):
        EWCState().consolidate(known[1], parameters)


def test_labels_that_are_no_tensor(known):
    def collate(rows):
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows]).numpy()}

    with pytest.raises(ValueError, match="'labels' is a ndarray in a batch; needed is a tensor"):
        estimate_fisher(known[0], Examples("bert", 4), data_collator=collate)


def test_data_that_is_text(known):
    with pytest.raises(TypeError, match="data is 'abc'; give a data set"):
        estimate_fisher(known[0], "abc")


IDS, LABELS = torch.arange(12).view(4, 3), torch.tensor([0, 1, 0, 1])
ROWS = {"input_ids": IDS.tolist(), "labels": LABELS.tolist()}


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (pd.DataFrame(ROWS), TypeError, "data is a pandas DataFrame"),
        (DatasetDict(train=Dataset.from_dict(ROWS)), TypeError, "with the keys ['train']"),
        (IDS, TypeError, "data is an array of the shape (4, 3)"),
        (IDS.numpy(), TypeError, "data is an array of the shape (4, 3)"),
        (TensorDataset(IDS, LABELS), TypeError, "an example of data is a tuple"),
        ([[1, 2], [3, 4]], TypeError, "an example of data is a list"),
        (["a good film"], TypeError, "an example of data is a str"),
        ([None], TypeError, "an example of data is a NoneType"),
        (DataLoader(TensorDataset(IDS, LABELS)), TypeError, "A batch is a list"),
        (iter([(IDS, LABELS)]), TypeError, "A batch is a tuple"),
        (iter([{"input_ids": IDS[0], "labels": 1}]), ValueError, "each is an example where a"),
        (iter([{"input_ids": IDS[0], "labels": LABELS[0]}]), ValueError, "each is an example"),
        (Dataset.from_dict({**ROWS, "labels": ["a", "b"] * 2}), ValueError, "such as 'a'"),
        ([{"input_ids": IDS[0], "label": "spam"}], ValueError, "such as 'spam'"),
        (Dataset.from_dict({"labels": []}), ValueError, "data is empty"),
        (None, TypeError, "data is None"),
        (3, TypeError, "data is 3"),
    ],
)
def test_data_of_other_kinds(data, kind, message, known):
    with pytest.raises(kind, match=re.escape(message)):
        estimate_fisher(known[0], data)


@pytest.mark.parametrize("source", [None, 3, ["runs"]])
def test_where_a_state_is(source):
    with pytest.raises(TypeError, match=r"source is .*; needed is the folder of a state"):
        EWCState.from_pretrained(source)


def test_an_empty_path_is_no_state(known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known[2].save_pretrained(".")
    with pytest.raises(ValueError, match="'' is not a folder"):
        EWCState.from_pretrained("")


@pytest.mark.parametrize(
    ("folder", "kind", "message"),
    [
        ("", ValueError, "folder is an empty path"),
        (None, TypeError, "folder is None; needed is the path of one"),
        ("file", ValueError, "file is to be a folder, and file is a file"),
        ("file/inside", ValueError, "file/inside is to be a folder, and file is a file"),
        (Path("file"), ValueError, "is to be a folder"),
    ],
)
def test_where_a_state_is_written(folder, kind, message, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a user's")
    with pytest.raises(kind, match=re.escape(message)):
        known[2].save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_place_of_the_folder_of_a_run(tmp_path):
    (tmp_path / "file").write_text("a user's")
    with pytest.raises(ValueError, match=r"run is to be a folder, and .*file is a file"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path / "file" / "run"))
