"""What it matters which parameters EWC protects, on intents of five domains (clinc150).

    scripts/reproduce selective_protection [--only all ...] [--seeds N]

All of MiniLM is trained; what is protected differs. A LoRA adapter alone, in all layers, stands
beside these without EWC, with it, and with it in the space of the weights. The last column is the
size of the saved state.
"""

from functools import partial
from pathlib import Path
from typing import Any

from options import TableOptions, parsed
from sequences import TaskSequence, clinc150
from ways import ONLY_THE_LAST, with_lora

from hf_ewc.report.statistics import summarize
from hf_ewc.report.tables import table
from hf_ewc.tasks.methods import Comparison
from hf_ewc.tasks.run_folder import safe_name

EWC = {"ewc_lambda": 1e3, "sequence_config": ONLY_THE_LAST}
MEASURES = ("average_accuracy", "forgetting", "learning_accuracy")


def methods_of(sequence: TaskSequence) -> dict[str, Any]:
    lora = partial(with_lora, sequence.make_model)
    adapter = {"make_model": lora, "sequence_config": ONLY_THE_LAST, "learning_rate": 5e-3}
    return {
        "plain": {"sequence_config": ONLY_THE_LAST},
        "all": EWC,
        "layers 0-2": {**EWC, "ewc_target_modules": r".*encoder\.layer\.[0-2]\..*"},
        "layers 3-5": {**EWC, "ewc_target_modules": r".*encoder\.layer\.[3-5]\..*"},
        "attention": {**EWC, "ewc_target_modules": r".*attention\..*"},
        "all but the head": {**EWC, "ewc_exclude_modules": ["classifier"]},
        "LoRA alone": adapter,
        "LoRA, EWC": {**adapter, **EWC},
        "LoRA, EWC on the weights": {**adapter, **EWC, "ewc_space": "weight"},
    }


def main() -> None:
    options: TableOptions = parsed("selective_protection")
    sequence = clinc150(options)
    methods = methods_of(sequence)
    chosen = {name: methods[name] for name in options.among(methods)}
    print(shown(sequence.compared(chosen, Path(str(options.output_dir)), options)))


def shown(comparison: Comparison) -> str:
    rows = []
    for method, repeats in comparison.runs.items():
        found = summarize([outcome.matrix for outcome in repeats.values()])
        cells = [f"{found[m].mean:.3f} ± {found[m].error:.3f}" for m in MEASURES]
        rows.append([method, *cells, state_size(comparison.output_dir / safe_name(method))])
    return table(["", "ACC", "forgetting", "learning accuracy", "state (MiB)"], rows)


def state_size(folder: Path) -> str:
    """Of the first seed's last state; empty where there is none."""
    files = sorted(folder.glob("seed-0/**/ewc_state*.safetensors"))
    return f"{files[-1].stat().st_size / 2**20:.1f}" if files else ""


if __name__ == "__main__":
    main()
