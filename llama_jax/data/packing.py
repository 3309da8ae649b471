"""Examples side by side in one row."""

from collections.abc import Sequence

import numpy as np

from llama_jax.data.objectives.base import Example

SOURCE = "source_"


def pack(examples: Sequence[Example], length: int, source_length: int | None) -> Example:
    """One row: the examples' fields one after another, then zeros up to `length` (`source_length` in the source).

    `segment_ids` and, with a source, `source_segment_ids` number the examples from 1, equally in both; 0 is padding.
    Raises ValueError where the examples do not fit, or are not of one objective.
    """
    names = list(examples[0]) if examples else []
    if not names or any(list(example) != names for example in examples):
        raise ValueError("a row needs examples, all with the same fields")
    row: Example = {}
    for prefix, capacity in (("", length), (SOURCE, source_length)):
        stream = [name for name in names if name.startswith(SOURCE) == bool(prefix)]
        if bool(stream) != (capacity is not None):
            raise ValueError("source_length is for examples with a source, and they need it")
        if capacity is None:
            continue
        sizes = [{len(example[name]) for name in stream} for example in examples]
        if any(len(size) != 1 for size in sizes):
            raise ValueError("the fields of an example's stream must be equally long")
        total = sum(size for (size,) in sizes)
        if total > capacity:
            raise ValueError(f"examples of {total} {prefix}positions do not fit into a row of {capacity}")
        padding = (0, capacity - total)
        for name in stream:
            row[name] = np.pad(np.concatenate([example[name] for example in examples]), padding)
        numbers = np.arange(1, len(examples) + 1, dtype=np.int32)
        row[f"{prefix}segment_ids"] = np.pad(np.repeat(numbers, [size for (size,) in sizes]), padding)
    return row
