"""log p(y | x) of an example, as the model's own loss means it."""
