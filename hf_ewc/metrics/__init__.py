"""The scores of a sequence of tasks, and the measures taken from them, without torch."""

from hf_ewc.metrics.accuracy_matrix import AccuracyMatrix, Array

__all__ = ["AccuracyMatrix", "Array"]
