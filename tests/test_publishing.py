"""The last model of a run goes to the Hub, once."""

import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from test_storage_hub import FakeHub
from test_tasks import arguments, two_tasks, vit
from transformers import ViTForImageClassification

from hf_ewc import EWCConfig, EWCState, compare_methods, run_tasks
from hf_ewc.state import hub
from hf_ewc.tasks import publishing


class HubOfModels(FakeHub):
    """Which also takes single files."""

    def upload_folder(self, *, ignore_patterns, **options) -> SimpleNamespace:
        assert ignore_patterns == "README.md"
        return super().upload_folder(**options)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **options) -> None:
        self.commits += 1
        shutil.copytree(self.head(repo_id), self.root / repo_id / str(self.commits))
        (self.head(repo_id) / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = HubOfModels(tmp_path / "hub")
    monkeypatch.setattr(publishing, "HfApi", lambda token=None: fake)
    monkeypatch.setattr(hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def test_model_state_and_card_in_the_end(fake_hub, tmp_path):
    args = arguments(tmp_path / "digits", max_steps=2, push_to_hub=True)
    ewc = EWCConfig(ewc_lambda=7.0, fisher_samples=4)
    done = run_tasks(vit(), two_tasks(), args, ewc)
    assert fake_hub.commits == 2  # the model of the last task, and its card
    head = fake_hub.head("me/digits")
    assert EWCState.from_pretrained("me/digits") == done.state
    pushed = ViTForImageClassification.from_pretrained(head).state_dict()
    assert all(pushed[name].equal(value) for name, value in done.model.state_dict().items())
    card = ModelCard((head / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["ewc"]
    assert "2 tasks" in card.text
    assert "λ: 7" in card.text

    (head / "README.md").write_text("---\nlicense: mit\n---\n\nMy words.\n")
    run_tasks(vit(), two_tasks(), args, ewc)  # goes on behind the last task
    text = (fake_hub.head("me/digits") / "README.md").read_text()
    assert "My words." in text
    assert text.count("## Elastic Weight Consolidation") == 1
    assert not (tmp_path / "digits" / "02-2-or-3" / "final" / "README.md").exists()


def test_a_plain_model_under_a_name(fake_hub, tmp_path):
    args = arguments(tmp_path, max_steps=1, push_to_hub=True, hub_model_id="us/plain")
    run_tasks(vit(), two_tasks(), args)
    text = (fake_hub.head("us/plain") / "README.md").read_text()
    assert "ewc" not in (ModelCard(text).data.tags or [])
    assert not list(fake_hub.head("us/plain").glob("ewc_state*"))


def test_who_may_not_push_hears_of_it_before_training(fake_hub, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("not logged in")

    monkeypatch.setattr(fake_hub, "create_repo", refuse)
    args = arguments(tmp_path, max_steps=1, push_to_hub=True)
    with pytest.raises(OSError, match="not logged in"):
        run_tasks(vit(), two_tasks(), args)
    assert not list(tmp_path.glob("01-*"))


def test_several_models_are_not_pushed(tmp_path):
    args = arguments(tmp_path, max_steps=1, push_to_hub=True)
    with pytest.raises(ValueError, match="push_to_hub is for one model"):
        compare_methods(vit, two_tasks(), args, {"plain": {}}, seeds=[0])
