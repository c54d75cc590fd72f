"""What a run ran on: versions, hardware, and the commit of the code that called it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from typing import Any

PACKAGES = ("hf-ewc", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """Versions, hardware and commit; a new dict of JSON's types."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu": _cpu(),
            "cpu_cores": os.cpu_count(),
            "memory": _memory(),
            "gpus": _gpus(),
        },
        "commit": _commit(_folder()),
    }


def in_words(found: dict[str, Any]) -> str:
    """One sentence for a report."""
    hardware, versions = found["hardware"], found["versions"]
    memory = f", {hardware['memory'] / 2**30:.0f} GiB" if hardware["memory"] else ""
    devices = [f"{hardware['cpu']} ({hardware['cpu_cores']} cores{memory})", *hardware["gpus"]]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f" Commit {found['commit']}." if found["commit"] else ""
    return f"Ran on {', '.join(devices)}, with {names}.{commit}"


@lru_cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {package: _version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


@lru_cache
def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    """Their names, if torch is loaded; a report alone does not load it."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available():
        return []
    return [str(cuda.get_device_name(i)) for i in range(cuda.device_count())]


def _folder() -> str:
    """The working directory; "." where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return "."


@lru_cache
def _commit(folder: str) -> str | None:
    """That of the repository around the folder, marked where files differ from it."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
