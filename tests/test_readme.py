"""What the README shows works: its blocks run, its table is up to date, its links lead on."""

import re
import warnings
from pathlib import Path

import pytest

from hf_ewc import EWCState

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where the blocks ran, one after another in one namespace, and what each of them raised."""
    folder = tmp_path_factory.mktemp("readme")
    names, raised = {"__name__": "__main__"}, []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # where there is no GPU
        for number, block in enumerate(BLOCKS):
            try:
                exec(compile(block, f"README.md, Python block {number}", "exec"), names)
                raised.append(None)
            except Exception as error:
                raised.append(error)
    return folder, raised


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(number, run):
    _, raised = run
    if raised[number] is not None:
        raise raised[number]


def test_the_example_leaves_a_state(run):
    folder, _ = run
    state = EWCState.from_pretrained(folder / "runs/example/ewc")
    assert state.num_tasks == 1
    assert any((value > 0).any() for value in state.importance.values())


def test_the_example_is_short():
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert example == BLOCKS[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def test_the_table_of_settings_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import settings_table

    assert settings_table.with_table(README) == README, settings_table.__doc__


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_commands_exist():
    for command in set(re.findall(r"scripts/\w[\w.]*", README)):
        assert (ROOT / command).exists(), command
