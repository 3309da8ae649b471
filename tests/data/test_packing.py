"""Examples in one row."""

import numpy as np
import pytest

from llama_jax.data.objectives import Example
from llama_jax.data.rows.packing import pack


def example(n: int, first: int, source: int | None = None) -> Example:
    made = {"tokens": np.arange(first, first + n, dtype=np.int32), "weights": np.ones(n, np.float32)}
    return made if source is None else made | {"source_tokens": np.full(source, first, np.int32)}


def test_a_row_of_two_examples_and_padding():
    row = pack([example(2, 5), example(3, 8)], 7, None)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [5, 6, 8, 9, 10, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 0, 0],
    }
    assert {name: x.dtype for name, x in row.items()} == {
        "tokens": np.int32, "weights": np.float32, "segment_ids": np.int32
    }  # fmt: skip


def test_sources_and_targets_stand_apart_under_one_number():
    row = pack([example(1, 5, source=2), example(0, 7, source=1), example(2, 8, source=0)], 3, 4)
    assert {name: x.tolist() for name, x in row.items()} == {
        "tokens": [5, 8, 9],
        "weights": [1, 1, 1],
        "segment_ids": [1, 3, 3],
        "source_tokens": [5, 5, 7, 0],
        "source_segment_ids": [1, 1, 2, 0],
    }


@pytest.mark.parametrize(
    ("examples", "length", "source_length", "sentence"),
    [
        ([example(2, 5), example(3, 8)], 4, None, "examples of 5 positions do not fit into a row of 4"),
        ([example(2, 5, 3), example(3, 8, 1)], 5, 3, "examples of 4 source_positions do not fit into a row of 3"),
        ([example(2, 5)], 4, 4, "source_length is for examples with a source"),
        ([example(2, 5, 1)], 4, None, "and they need it"),
        ([example(2, 5), example(2, 5, 1)], 4, 4, "all with the same fields"),
        ([], 4, None, "a row needs examples"),
        ([example(2, 5) | {"weights": np.ones(1, np.float32)}], 4, None, "must be equally long"),
    ],
)
def test_what_does_not_fit_is_refused(examples, length: int, source_length: int | None, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        pack(examples, length, source_length)
