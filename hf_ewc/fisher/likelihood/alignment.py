"""Connectionist temporal classification: a sequence of labels, aligned with the frames anyhow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED
from hf_ewc.fisher.likelihood.categorical import draw_classes
from hf_ewc.fisher.likelihood.choices import Choices
from hf_ewc.fisher.likelihood.distribution import Distribution
from hf_ewc.precision import uniforms_on


@dataclass(frozen=True)
class Alignments(Distribution):
    """p(y | x) = Σ over the paths that collapse to y of Π_t p_t (Graves et al. 2006).

    A path names a class or the blank at each frame; repetitions are merged, then blanks dropped.

    Args:
        log_probabilities: (B, T, C) of the classes at each frame.
        frames: (B,) how many frames of each example count.
        labels: (B, S), −100 where there is none.
        blank: the class that is no label.
    """

    log_probabilities: Tensor
    frames: Tensor
    labels: Tensor
    blank: int

    @property
    def labelled(self) -> Tensor:
        return (self.labels != IGNORED).any(1)

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def num_positions(self) -> int:
        return len(self.labels)

    @property
    def num_exact_passes(self) -> int:
        return sys.maxsize

    def empirical(self) -> Tensor:
        log_p = self._log_probabilities(self.labels)
        impossible = log_p.isinf().nonzero().flatten().tolist()
        if impossible:
            raise self._not_aligned(impossible[0])
        return log_p.sum()

    def sampled(self, choices: Choices) -> Tensor:
        """A path drawn frame by frame, collapsed, is a draw from p(y | x)."""
        log_p = self.log_probabilities.detach()
        drawn = torch.full(log_p.shape[:2], IGNORED, device=log_p.device)
        for n, count in enumerate(self.frames.tolist()):
            numbers = uniforms_on(log_p.device, choices.uniforms(count, n))
            path = choices.settled(n, draw_classes(log_p[n, :count], numbers))
            merged = torch.unique_consecutive(path)
            kept = merged[merged != self.blank]
            drawn[n, : len(kept)] = kept
        return self._log_probabilities(drawn).sum()

    def _log_probabilities(self, labels: Tensor) -> Tensor:
        """(B,) log p(y_n | x_n); 0 for the examples without a label of their own."""
        given = labels != IGNORED
        losses = F.ctc_loss(
            self.log_probabilities.transpose(0, 1),
            labels[given],
            self.frames,
            given.sum(1),
            blank=self.blank,
            reduction="none",
        )
        return torch.where(self.labelled, -losses, 0.0)

    def exact(self, choices: Choices) -> Iterator[Tensor]:
        raise ValueError(
            "The expectation over all label sequences of a CTC head cannot be enumerated, so "
            "fisher_type='exact' is not to be had; use 'sampled', which draws label sequences from "
            "the model, 'empirical' or 'auto'."
        )

    def losses(self) -> list[Tensor]:
        """Also the mean over examples of −log p divided by the number of labels.

        Of labels that cannot be aligned it is taken for 0, as with `zero_infinity`; without that a
        loss is infinite and says nothing.
        """
        losses = -self._log_probabilities(self.labels)
        losses = losses.masked_fill(losses.isinf(), 0.0)
        lengths = (self.labels != IGNORED).sum(1).clamp_min(1)
        counts = (self.num_labels, self.num_positions, 1)
        return [*(losses.sum() / max(count, 1) for count in counts), (losses / lengths).mean()]

    def _not_aligned(self, example: int) -> ValueError:
        count = int((self.labels[example] != IGNORED).sum())
        return ValueError(
            f"The {count} labels of an example cannot be aligned with its "
            f"{int(self.frames[example])} frames: CTC needs one for each label, and one between "
            "two that are equal. So their probability is 0, and they have no Fisher. Leave such "
            "examples out of the data, or take fisher_type='sampled', whose labels are drawn."
        )

    def graph_output(self) -> Tensor:
        return self.log_probabilities

    def first_example(self) -> Alignments:
        return replace(
            self,
            log_probabilities=self.log_probabilities[:1],
            frames=self.frames[:1],
            labels=self.labels[:1],
        )

    def without(self, padding: Tensor) -> Alignments:
        return replace(self, labels=self.labels.masked_fill(padding.unsqueeze(1), IGNORED))
