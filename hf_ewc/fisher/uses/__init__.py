"""Which tensors carry which examples, how parameters were used, and the squares that come of it."""
