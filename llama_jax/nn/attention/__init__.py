"""One file per attention, each with its own cache, and the kernels they share."""
