"""results.json: what a run recorded, with a checksum, and read strictly."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_ewc.files import write_atomically
from hf_ewc.metrics import AccuracyMatrix
from hf_ewc.report.environment import environment
from hf_ewc.report.outcome import Given, Outcome, Runs, as_runs, matrices
from hf_ewc.report.statistics import Estimate, differences, reference_of, summarize

logger = logging.getLogger("hf_ewc")

_LARGEST = 1 << 28  # bytes; a thousand tasks with three seeds of ten methods take a tenth of it
_DIGEST = len(hashlib.sha256().hexdigest())
_BEGIN, _MIDDLE = b'{\n  "checksum": "', b'",\n'


def write_results(
    path: str | os.PathLike[str], runs: Given, details: Mapping[str, Any] | None = None
) -> Path:
    """Write results.json, atomically: `{"checksum", "runs": {method: [run, ...]}, ...}`.

    The checksum is the SHA-256 of everything behind its own line. A run is
    `AccuracyMatrix.to_dict` with its seed, seconds, peak memory (bytes) and importance by layer
    where they are known. Figures that JSON cannot hold (inf, NaN, an int beyond the floats) are
    kept as null, with one warning.
    """
    checked = as_runs(runs)
    content = {
        "runs": {method: _runs(repeats) for method, repeats in checked.items()},
        "summary": {
            method: _named(summarize(matrices(repeats))) for method, repeats in checked.items()
        },
        "differences": _differences(checked),
        "environment": environment(),
        **(details or {}),
    }
    lost: list[str] = []
    text = json.dumps(plain(content, lost), indent=2, allow_nan=False)
    if lost:
        logger.warning(
            "%s keeps null in place of %d figures that are no finite numbers: %s.",
            path, len(lost), ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else ""),
        )  # fmt: skip
    return write_atomically(path, _sealed(text.removeprefix("{\n").encode() + b"\n"))


def read_results(
    path: str | os.PathLike[str],
) -> tuple[dict[str, list[AccuracyMatrix]], dict[str, Any]]:
    """The matrices of a results.json by method, and all else that it holds.

    Raises:
        ValueError: the file is not what `write_results` wrote, to the byte.
    """
    runs, content = read_outcomes(path)
    return {method: matrices(repeats) for method, repeats in runs.items()}, content


def read_outcomes(path: str | os.PathLike[str]) -> tuple[Runs, dict[str, Any]]:
    """As `read_results`, with all that is known of each run, by method and seed."""
    try:
        content = _parsed(_opened(_read(Path(path))))
        runs = {method: _outcomes(repeats) for method, repeats in content["runs"].items()}
        return as_runs(runs), content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a results file of hf_ewc ({error}).") from error


def _outcomes(repeats: list[dict[str, Any]]) -> dict[int, Outcome]:
    """By seed; runs that tell none are counted from 0."""
    seeds = [run.get("seed", i) for i, run in enumerate(repeats)]
    if len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"its seeds are {seeds}")
    return dict(zip(seeds, map(Outcome.from_dict, repeats), strict=True))


def plain(value: Any, lost: list[str], where: str = "") -> Any:
    """`value` in JSON's types; what JSON has no number for becomes None, its place into `lost`."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, lost, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, lost, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        if _is_finite(value):
            return value
        lost.append(where.lstrip("."))
        return None
    raise TypeError(f"results.json cannot hold {type(value).__name__} at {where.lstrip('.')!r}.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float, which readers would take for inf
        return False


def _sealed(rest: bytes) -> bytes:
    return _BEGIN + hashlib.sha256(rest).hexdigest().encode() + _MIDDLE + rest


def _opened(data: bytes) -> str:
    """The JSON of a sealed file without its checksum, which has to be right."""
    rest = data[len(_BEGIN) + _DIGEST + len(_MIDDLE) :]
    if not data.startswith(_BEGIN):
        raise ValueError("it does not begin with a checksum")
    if data != _sealed(rest):
        raise ValueError("its checksum is not that of its content: it is damaged, or was edited")
    return "{" + rest.decode()


def _read(path: Path) -> bytes:
    kind = os.stat(path)
    if not stat.S_ISREG(kind.st_mode):
        raise ValueError("it is no regular file")
    if kind.st_size > _LARGEST:
        raise ValueError(f"it has {kind.st_size} bytes; at most {_LARGEST} are read")
    return path.read_bytes()


def _parsed(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which JSON has not")

    content: dict[str, Any] = json.loads(
        text, parse_constant=refuse, object_pairs_hook=_without_repeats
    )
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _runs(repeats: Mapping[int, Outcome]) -> list[dict[str, Any]]:
    seeds = {} if [*repeats] == [*range(len(repeats))] else {s: {"seed": s} for s in repeats}
    return [outcome.to_dict() | seeds.get(seed, {}) for seed, outcome in repeats.items()]


def _named(summary: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: {"mean": found.mean, "std": found.std} for name, found in summary.items()}


def _differences(runs: Runs) -> dict[str, Any]:
    """Each method's measures minus the reference's, paired by seed."""
    reference = reference_of(runs)
    if reference is None or len(runs) < 2:
        return {}
    return {
        method: {
            name: {"mean": found.mean, "standard_error": found.error, "seeds": found.seeds}
            for name, found in differences(repeats, runs[reference]).items()
        }
        for method, repeats in runs.items()
        if method != reference
    }
