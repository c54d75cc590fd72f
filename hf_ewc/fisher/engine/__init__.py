"""Squared per-example gradients of a batch: one backward for all examples, or one for each."""
