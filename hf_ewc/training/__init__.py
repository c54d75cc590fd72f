"""Training with the penalty, in the Trainer of transformers and any subclass of it."""

from hf_ewc.training.trainer import EWCMixin, EWCSeq2SeqTrainer, EWCTrainer

__all__ = ["EWCMixin", "EWCSeq2SeqTrainer", "EWCTrainer"]
