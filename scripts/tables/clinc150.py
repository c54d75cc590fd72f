"""Ways of not forgetting, side by side, on intents that come domain after domain (clinc150).

    scripts/reproduce clinc150 [--only plain EWC ...] [--seeds N]

Five domains of fifteen intents, 15 training examples of each; the upper two layers of MiniLM, its
pooler and one head are trained, six epochs a domain. EWC has the untouched λ; that of L2-SP and the
shares were set once and not tuned.
"""

from functools import partial
from pathlib import Path
from typing import Any

from options import TableOptions, parsed
from peft import LoraConfig, get_peft_model
from sequences import TaskSequence, clinc150

from hf_ewc import SequenceConfig


def methods_of(sequence: TaskSequence) -> dict[str, Any]:
    ewc = {"ewc_lambda": 1e3, "fisher_type": "sampled"}
    return {
        "plain": {},
        "EWC": ewc,
        "L2-SP": {"l2sp_lambda": 0.1},
        "replay 5 %": {"replay_share": 0.05},
        "EWC + replay 5 %": {**ewc, "replay_share": 0.05},
        "head warm-up": {"head_warmup_share": 0.2},
        "frozen encoder": {"trained_modules": ["classifier"]},
        "LoRA": {"make_model": partial(with_lora, sequence), "sequence_config": ONLY_THE_LAST},
        "averaging": {"weight_average": "mean"},
        "distillation": {"distillation_weight": 1.0},
        "joint": {"joint_training": True},
    }


ONLY_THE_LAST = SequenceConfig(keep_models="last")


def with_lora(sequence: TaskSequence, **settings: Any) -> Any:
    """An adapter in the upper two layers, and a head."""
    adapter = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=[4, 5],
        layers_pattern="layer",
        modules_to_save=["classifier"],
        **settings,
    )
    return get_peft_model(sequence.make_model(), adapter)


def main() -> None:
    options: TableOptions = parsed("clinc150")
    sequence = clinc150(options)
    methods = methods_of(sequence)
    chosen = {name: methods[name] for name in options.among(methods)}
    print(sequence.compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
