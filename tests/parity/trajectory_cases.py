"""The cases of the training trajectories, for the maker of their goldens and for the test: settings and batches.

Weights are those of the other goldens; batches are drawn from a seed.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

STEPS, PARTS, ROWS, LENGTH, SOURCE_LENGTH, NUM_PREFIX = 40, 2, 4, 24, 16, 4
FIRST_ID, NUM_IDS, MASK_ID, START_ID = 4, 24, 3, 0

Batch = dict[str, np.ndarray]

OPTIMIZER = {
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "final_fraction": 0.1,
    "z_loss": 0.0,
    "label_smoothing": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is trained on, and how.

    golden: directory of the weights that it begins with.
    changes: settings of the optimizer that are not those of `OPTIMIZER`.
    """

    golden: str
    objective: Literal["causal", "prefix", "masked", "source"]
    changes: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def optimizer(self) -> dict[str, Any]:
        return OPTIMIZER | self.changes


CASES = {
    "llama": Case("llama_gqa", "causal", {"z_loss": 1e-2, "label_smoothing": 0.1}),
    "gpt2": Case("gpt2", "causal", {"label_smoothing": 0.1}),
    "mixtral": Case("mixtral", "causal", {"z_loss": 1e-2}),
    "gemma2": Case("gemma2", "causal", {"weight_decay": 0.3}),
    "deepseek_v3": Case("deepseek_v3", "causal", {"final_fraction": 0.0}),
    "gpt_neox": Case("gpt_neox", "prefix", {"warmup_steps": 0, "z_loss": 1e-2}),
    "bert": Case("bert_mlm", "masked", {"beta2": 0.999}),
    "t5": Case("t5_v1_1", "source", {"label_smoothing": 0.1, "z_loss": 1e-2}),
}


def batches(name: str) -> Iterator[Batch]:
    """The batch of every step: rows of two documents and padding; the parts have different numbers of targets."""
    objective = CASES[name].objective
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(STEPS):
        sizes = np.stack([rng.integers(5, 13, ROWS), rng.integers(6, 13, ROWS)], 1)
        sizes[-1, 1] = 0
        segments, positions = _packed(sizes, LENGTH)
        text = _texts(rng, LENGTH + 1)
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "segment_ids": segments, "positions": positions}
        weighted = segments > 0
        if objective == "prefix":
            batch["prefix"] = (weighted & (positions < NUM_PREFIX)).astype(np.int32)
            weighted &= positions >= NUM_PREFIX - 1
        elif objective == "masked":
            chosen = rng.random(text[:, 1:].shape) < 0.3
            batch["tokens"] = np.where(chosen, MASK_ID, text[:, 1:])
            batch["token_types"] = (positions >= NUM_PREFIX).astype(np.int32)
            weighted &= chosen
        elif objective == "source":
            batch["tokens"] = np.where(positions == 0, START_ID, text[:, :-1])
            source_segments, source_positions = _packed(np.minimum(sizes, 8), SOURCE_LENGTH)
            batch |= {"source_segment_ids": source_segments, "source_positions": source_positions}
            batch["source_tokens"] = text[:, SOURCE_LENGTH:0:-1]
        yield {key: x.astype(np.int32) for key, x in batch.items()} | {"weights": weighted.astype(np.float32)}


def _texts(rng: np.random.Generator, length: int) -> np.ndarray:
    """Rows in which most ids follow from the one before."""
    drawn, follows = rng.integers(NUM_IDS, size=(ROWS, length)), rng.random((ROWS, length)) < 0.8
    for i in range(1, length):
        drawn[:, i] = np.where(follows[:, i], (5 * drawn[:, i - 1] + 7) % NUM_IDS, drawn[:, i])
    return FIRST_ID + drawn


def _packed(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of rows with documents of these sizes."""
    place, ends = np.arange(length), sizes.cumsum(1)
    segments = 1 + (place >= ends[:, :1]) - 2 * (place >= ends[:, 1:])
    positions = np.where(segments == 2, place - ends[:, :1], place)
    return np.maximum(segments, 0), np.where(segments > 0, positions, 0)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A vector that the change of a tensor is projected on."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
