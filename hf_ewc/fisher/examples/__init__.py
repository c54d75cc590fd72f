"""Examples: which are chosen, where they come from, how a batch is taken apart."""
