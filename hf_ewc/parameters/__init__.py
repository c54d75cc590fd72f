"""The parameters of a model: their names, which a pattern selects, where their parts lie."""
