"""Recipes as processes that are forked from one which has imported everything (`tests.processes`).

``python -m tests.recipe recipes/NAME.py ARGUMENTS`` does what ``python recipes/NAME.py ARGUMENTS``
does.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.processes import ACCELERATE, ROOT, launch

ON_TWO = [ACCELERATE, "--config_file", "recipes/accelerate/cpu_2.yaml", "-m"]


def run_recipe(name: str, *arguments: object, processes: int = 1) -> tuple[int, str]:
    """Exit code and output of a recipe on CPUs, in one process or by `accelerate launch` in two."""
    command = ["tests.recipe", f"recipes/{name}.py", *map(str, arguments), "--use_cpu"]
    return launch(*(ON_TWO if processes == 2 else []), *command)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(ROOT / Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
