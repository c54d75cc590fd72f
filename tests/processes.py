"""Real processes for the tests, forked from one that has imported torch and transformers already.

Importing takes a new interpreter four seconds, and each launch starts several. Here, therefore,
`python -m MODULE` runs in a fork of a process that has imported what all need, as `__main__`, in an
environment and a session of its own. Launchers (torchrun, `accelerate launch`) do all that they do
elsewhere, but the processes they start are forks, too. With `fresh=True` all are new interpreters.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHERS = TORCHRUN, ACCELERATE = "torch.distributed.run", "accelerate.commands.launch"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "DS_IGNORE_CUDA_DETECTION": "1",
    "PYTHONPATH": str(ROOT),
}

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])
# What the forks come from is started by name, wherever pytest was started.
_PATHS = [str(ROOT), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in _PATHS if path)


def torchrun(processes: int = 2) -> list[str]:
    """The launcher for as many processes, which meet at a free port."""
    meeting_point = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [TORCHRUN, "--nproc_per_node", str(processes), *meeting_point]


def launch(
    *command: str, fresh: bool = False, timeout: float = 420, **environment: str
) -> tuple[int, str]:
    """Run `python -m command` on CPUs: its exit code, what it and its processes printed.

    Whatever is left of them after `timeout` seconds is killed, and the test fails.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    environment = {**inherited, **SETTINGS, **environment}
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        run = _in_new_interpreter if fresh else _in_fork
        code = run(command, environment, log.name, timeout)
        output = log.read()
    if code is None:
        pytest.fail(f"It hung for {timeout} s:\n{output[-4000:]}")
    return code, output


def _in_fork(
    command: tuple[str, ...], environment: dict[str, str], log: str, timeout: float
) -> int | None:
    process = FORKS.Process(target=_become, args=(command, environment, log))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def _in_new_interpreter(
    command: tuple[str, ...], environment: dict[str, str], log: str, timeout: float
) -> int | None:
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _become(command: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    """Be `python -m command` in this environment; what it prints goes to the file `log`."""
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(ROOT)
    os.environ.clear()
    # Without TorchDynamo, DeepSpeed does not compile an optimizer that nobody asked for.
    os.environ.update(environment, TORCHDYNAMO_DISABLE="1")
    if command[0] not in LAUNCHERS:
        _as_main("-m", *command)
        return
    _launch_forks()
    sys.argv = list(command)
    importlib.import_module(command[0]).main()


def _as_main(*options: str) -> None:
    """Do what `python options` does, `options` being `[-u] -m MODULE ARGUMENTS`."""
    _, module, *arguments = [option for option in options if option != "-u"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _launch_forks() -> None:
    """Let torch's launcher fork this process, by its own means for functions, not start others."""
    import torch.distributed.run as launcher

    original = launcher.elastic_launch

    def elastic_launch(config: Any, entrypoint: Any) -> Any:
        return original(dataclasses.replace(config, start_method="fork"), _as_main)

    launcher.elastic_launch = elastic_launch
