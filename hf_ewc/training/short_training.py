"""Training arguments for a short training, of which only the weights count."""

from __future__ import annotations

import copy

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_ewc.training.lambda_curve import SHARE


def for_a_share(args: TrainingArguments, whole: int, part: int) -> TrainingArguments:
    """The arguments for SHARE of the optimizer steps, with the schedule drawn together likewise.

    Nothing is logged, saved, reported or evaluated.

    Args:
        whole: how many examples the full training has.
        part: how many the short one has, of which an epoch takes fewer steps.
    """
    found = copy.copy(args)
    # Rounded, since the steps are: 6.000000000000001 epochs have one more than 6.
    found.num_train_epochs = round(SHARE * args.num_train_epochs * whole / part, 9)
    if args.max_steps > 0:
        found.max_steps = max(1, round(SHARE * args.max_steps))
    if args.warmup_steps and args.warmup_steps >= 1:
        found.warmup_steps = round(SHARE * args.warmup_steps)
    found.eval_strategy = found.logging_strategy = IntervalStrategy.NO
    found.save_strategy = SaveStrategy.NO
    found.load_best_model_at_end = found.push_to_hub = found.logging_first_step = False
    found.eval_on_start = False
    found.dataloader_drop_last = False  # the held-out part may be less than a batch
    found.report_to = []
    found.disable_tqdm = True
    return found
