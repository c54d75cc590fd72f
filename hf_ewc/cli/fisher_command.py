"""`hf-ewc fisher`: estimate the Fisher of a model on data, and write the EWC state."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """
DATA is a file (csv, json, jsonl, parquet, txt), a folder of such files or of images, a folder of
`Dataset.save_to_disk`, or a data set of the Hub as NAME or NAME:CONFIG.

examples:
  hf-ewc fisher runs/model reviews.csv -o runs/model/ewc
  hf-ewc fisher runs/model nli.jsonl --text premise hypothesis --label gold -o state
  hf-ewc fisher gpt2 wikitext:wikitext-2-raw-v1 --num_samples 500 --max_length 256 -o state
  hf-ewc fisher runs/b/model b.csv --onto runs/a/ewc --mode separate -o runs/b/ewc
"""


# As in `hf_ewc.importance`, which `--help` does not wait for.
FISHER_TYPES = ("auto", "exact", "sampled", "empirical", "batched")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options named as the settings of `EWCConfig` and the arguments of `estimate_fisher` are."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of a model or of a PEFT adapter")
    add("data", metavar="DATA", help="examples that stand for the task; see below")
    add("-o", "--output", metavar="STATE", required=True, help="folder for the state")
    add("--split", default="train", help="of a data set with several (default: train)")
    add("--text", nargs="+", metavar="COLUMN", help="the text, or the two texts")
    add("--label", metavar="COLUMN", help="the label (default: label or labels)")
    add("--max_length", type=int, metavar="N", help="tokens of an example (default: the model's)")
    add("--fisher_type", choices=FISHER_TYPES, default="auto", help="(default: auto)")
    add(
        "--num_samples", type=int, default=200, metavar="N",
        help="examples that are drawn; 0 takes all (default: 200)",
    )  # fmt: skip
    add("--batch_size", type=int, default=8, metavar="N", help="(default: 8)")
    add("--seed", type=int, default=0, help="of the draw of examples and labels (default: 0)")
    add("--name", help="of the task, in the state (default: that of DATA)")
    add("--onto", metavar="STATE", help="an earlier state, whose tasks stay protected")
    add("--mode", choices=("online", "separate"), default="online", help="(default: online)")


def run(given: argparse.Namespace) -> None:
    """Estimate, consolidate, save."""
    _check(given)
    from hf_ewc.cli.data import examples
    from hf_ewc.cli.models import load_model
    from hf_ewc.fisher import estimate_fisher
    from hf_ewc.state import EWCState

    state = EWCState.from_pretrained(given.onto) if given.onto else EWCState()
    model = load_model(given.model)
    data, collator = examples(model, given)
    wanted = min(given.num_samples, len(data)) if given.num_samples else None
    fisher = estimate_fisher(
        model,
        data,
        data_collator=collator,
        fisher_type=given.fisher_type,
        num_samples=wanted,
        batch_size=given.batch_size,
        seed=given.seed,
    )
    name = given.name or Path(given.data).stem
    state = state.consolidate(fisher, model, mode=given.mode, name=name)
    state.save_pretrained(given.output)
    print(
        f"{fisher.fisher_type} Fisher of {len(fisher.diagonal)} parameters on "
        f"{fisher.num_examples} examples, task {name!r}: written to {given.output}"
    )


def _check(given: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen as wrong."""
    if Path(given.output).is_file():
        raise ValueError(f"-o {given.output} is a file; give a folder for the state.")
    for name in ("batch_size", "max_length", "num_samples"):
        value = getattr(given, name)
        if value is not None and value < (0 if name == "num_samples" else 1):
            raise ValueError(f"--{name} is {value}; give a number above 0.")
