"""A language model, one domain of texts after another, without losing what it knew before.

    accelerate launch recipes/sequential_causal_lm.py \\
        recipes/configs/sequential_causal_lm/my_texts.yaml

The YAML file names the domains: files of your own (txt, or a column of csv, json or parquet) or
data sets of the Hub, of texts or of chats, which go through the tokenizer's chat template. The
score is perplexity per token, of which less is better; texts under `evaluate_also:` are scored and
never trained on. `protect:` names general texts: EWC then holds from the first task on what the
model knows of them, its pretraining. `--use_peft` trains LoRA, `--packing` packs chats by TRL. With
`methods:` it trains in several ways side by side, else once. Every field of TrainingArguments,
EWCConfig and SequenceConfig may stand in the file, or be given behind it; started again after a
kill, it goes on where it was.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import datasets
import torch
import transformers
from text_domains import DomainArguments, domains_of, examples_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from hf_ewc import EWCConfig, EWCMixin, EWCState, EWCTrainer, SequenceConfig, Task
from hf_ewc.cli.arguments import one_line_errors, parse_arguments
from hf_ewc.cli.lengths import fitting_length
from hf_ewc.cli.lora import LoraArguments, with_lora
from hf_ewc.cli.methods import MethodArguments, checked_methods, learn
from hf_ewc.cli.models import pretrained
from hf_ewc.processes import leave


@dataclass
class Arguments(DomainArguments, LoraArguments, MethodArguments):
    model_name_or_path: str = field(
        kw_only=True, metadata={"help": "Folder or Hub id of the model to start."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Join chats and cut them into full examples, by TRL's SFTTrainer."},
    )


DEFAULTS = dict(
    learning_rate=2e-5,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),  # elsewhere it only warns
    max_grad_norm=0.0,  # clipping would shrink the task's gradient along with the penalty's
)


def parsed(arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Everything that was asked for, with what can be checked without data checked."""
    types = (Arguments, TrainingArguments, EWCConfig, SequenceConfig)
    found = parse_arguments(*types, defaults=DEFAULTS, arguments=arguments, description=__doc__)
    own, args, ewc, _ = found
    with one_line_errors():
        own.tasks, own.protect, own.evaluate_also = domains_of(own)
        own.methods = checked_methods(own.methods, ewc, further=["protect"])
        for name, settings in own.methods.items():
            if not isinstance(settings.get("protect", True), bool):
                raise ValueError(
                    f"method {name!r} has protect: {settings['protect']!r:.60}; needed is true or "
                    "false. Which texts are protected stands outside of `methods:`."
                )
        own.seeds(args.seed)
        if own.protect and own.use_peft and ewc.ewc_space != "weight":
            raise ValueError(
                "protect with use_peft needs ewc_space: weight, since each run begins with an "
                "adapter of its own, drawn at random, which no state of the pretraining knows."
            )
    return found


def main() -> None:
    own, args, ewc, sequence = parsed()
    datasets.disable_progress_bars()  # those of loading; the tasks' own stay
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        tokenizer = pretrained(AutoTokenizer, own.model_name_or_path)
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {own.model_name_or_path} has neither a pad_token nor an "
                "eos_token; save it with one of them, with which examples can be padded."
            )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        config = pretrained(AutoConfig, own.model_name_or_path)
        own.block_size = fitting_length("block_size", own.block_size, tokenizer, config)
        tasks, others, general = prepared(own, tokenizer)
        options = dict(
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads texts and labels alike
        )
        if own.packing:
            options = dict(processing_class=tokenizer, trainer_class=packing_trainer())
            args = packing_arguments(args, own.block_size)

    def make_model() -> Any:
        model = pretrained(AutoModelForCausalLM, own.model_name_or_path, dtype="float32")
        model.config.use_cache = False
        return with_lora(model, own, "CAUSAL_LM")

    def known(ewc: EWCConfig) -> EWCState:
        return pretraining(make_model(), own, args, ewc, tokenizer, general)

    with one_line_errors(only_own=True):
        own.methods = with_pretraining(own.methods, known if general else None)
        if general and not own.methods:
            options["ewc_state"] = known(of_the_pretraining(ewc))
    options |= dict(sequence_config=sequence, evaluate_also=others)
    learn(make_model, tasks, args, ewc, own, **options)
    leave()


def prepared(own: Arguments, tokenizer: Any) -> tuple[list[Task], list[Task], Any]:
    """What is learnt, what is only scored, and the general texts that are protected first."""

    def examples(domain: Any, part: str) -> Any:
        most = own.max_train_samples if part == "train" else own.max_eval_samples
        whole = own.packing and part == "train" and domain is not own.protect
        return examples_of(domain, part, tokenizer, own.block_size, most, whole)

    tasks = [
        Task(each.name, examples(each, "train"), examples(each, "eval"), metric="perplexity")
        for each in own.tasks
    ]
    others = [
        Task(each.name, None, examples(each, "eval"), metric="perplexity")
        for each in own.evaluate_also
    ]
    return tasks, others, own.protect and examples(own.protect, "train")


def pretraining(
    model: Any,
    own: Arguments,
    args: TrainingArguments,
    ewc: EWCConfig,
    tokenizer: Any,
    general: Any,
) -> EWCState:
    """What the model knows of general texts, as the state that protects it."""
    args = copy.copy(args)
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    trainer = EWCTrainer(
        model=model,
        args=args,
        train_dataset=general,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        ewc_config=ewc,
    )
    return trainer.consolidate(name=own.protect.name)


def of_the_pretraining(ewc: EWCConfig) -> EWCConfig:
    """What of the settings counts there: not λ, which may be "auto", and nothing is held out."""
    return replace(ewc, ewc_lambda=1.0, ewc_layer_lambdas=None, fisher_data="train")


def with_pretraining(
    methods: dict[str, dict[str, Any]], known: Callable[[EWCConfig], EWCState] | None
) -> dict[str, dict[str, Any]]:
    """The methods; those with EWC begin with the pretraining, unless they say `protect: false`.

    Args:
        methods: as they were checked.
        known: what the model knows, by settings of EWC; called once for all methods with the same.
    """
    found, states = {}, {}
    for name, settings in methods.items():
        own = {key: value for key, value in settings.items() if key != "protect"}
        if known and "ewc_config" in own and settings.get("protect", True):
            differing = {f.name: own[f.name] for f in fields(EWCConfig) if f.name in own}
            ewc = of_the_pretraining(replace(own["ewc_config"], **differing))
            if str(ewc) not in states:
                states[str(ewc)] = known(ewc)
            own["ewc_state"] = states[str(ewc)]
        found[name] = own
    return found


def packing_trainer() -> Any:
    """TRL's trainer, with EWC."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ValueError("packing is done by TRL, which is missing: pip install trl") from error

    class EWCSFTTrainer(EWCMixin, SFTTrainer): ...

    return EWCSFTTrainer


def packing_arguments(args: TrainingArguments, block_size: int) -> TrainingArguments:
    """The same arguments for TRL's trainer.

    Packed one behind the other ("wrapped"), an example stays a row of the batch, which the Fisher
    needs; "bfd" would make one row of a batch.
    """
    from trl import SFTConfig

    given = {each.name: getattr(args, each.name) for each in fields(TrainingArguments) if each.init}
    packing = dict(packing=True, packing_strategy="wrapped", eval_packing=False)
    return SFTConfig(**given, **packing, max_length=block_size)


if __name__ == "__main__":
    main()
