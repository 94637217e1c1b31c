"""Floor 1: the vocabulary of numbers. `grid`, `blocks` and `scheme` need no torch; `qtensor` does."""
