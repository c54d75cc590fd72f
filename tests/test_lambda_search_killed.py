"""kill -9 in the middle of a trial, and the same run started again."""

import json
import os
import signal
import sys
from pathlib import Path

from test_lambda_search import AUTO, three_tasks, tried
from test_tasks import arguments, same_weights, vit

from hf_ewc import run_tasks
from hf_ewc.tasks.lambda_search import HalfWay
from tests.processes import launch

PATHS = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])


def run(folder):
    return run_tasks(vit(), three_tasks(), arguments(folder, num_train_epochs=2), AUTO)


def test_the_same_is_found_and_learnt(tmp_path):
    """Four steps a trial: the sixth is in the second one, where one trial has been written."""
    whole = run(tmp_path / "whole")
    cut = tmp_path / "cut"
    code, output = launch("tests.test_lambda_search_killed", str(cut), PYTHONPATH=PATHS)
    assert code == -signal.SIGKILL, output[-3000:]
    (written,) = json.loads((cut / "results.json").read_text())["runs"]["EWC"]
    ((trial,),) = [search["trials"] for search in written["lambda_search"]]
    again = run(cut)
    assert again.searches[0].trials[0].seconds == trial["seconds"]  # not made anew
    assert tried(again) == tried(whole)
    assert [c.chosen for c in again.searches] == [c.chosen for c in whole.searches]
    assert again.matrix == whole.matrix
    assert same_weights(again.model, whole.model)


def die_in_a_trial(at):
    steps, on_step_end = [], HalfWay.on_step_end

    def dies(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_step_end(self, *args, **kwargs)

    HalfWay.on_step_end = dies


if __name__ == "__main__":
    die_in_a_trial(6)
    run(sys.argv[1])
