"""What reading a run of another version must give, written down so that it can be compared."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import llama_jax

STOPPED, LAST = 4, 6  # of the runs in the archive: the step of their checkpoint, and their number of steps


def digest(array: Any) -> str:
    array = np.asarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in sorted(arrays.items())}


def read_stopped(run: llama_jax.Run, step: int) -> dict[str, Any]:
    """Return what a stopped run gives: hashes of its parameters and batches, token ids of a text."""
    lm = run.load(step=step)
    found = {
        "params": digests(lm.model.params()),
        "batches": [digests(run.batch(s)) for s in range(LAST)],
        "prompt": lm.tokenizer.encode("the cat sat"),
    }
    return found
