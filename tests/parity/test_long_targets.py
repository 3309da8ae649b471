"""Encoder-decoders against the original code where the target is longer than the source and a block of queries."""

import json
from pathlib import Path

import numpy as np
import pytest
from zoo_table import GOLDENS

import llama_jax
from llama_jax.checkpoint.formats import read_directory, write_safetensors
from llama_jax.nn.attention import attend as kernels

NAMES, TOLERANCE, LONGEST = ("bart", "marian", "t5_v1_0"), 5e-5, 300
LENGTHS = ("129_300", "100_200", "40_260")


def lengthened(name: str, folder: Path) -> Path:
    """A golden with more positions, as the maker of these has it: a learned table goes on from its beginning."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    tensors = {key: tensor.read() for key, tensor in read_directory(GOLDENS / name).items()}
    if "max_position_embeddings" in config:
        rows = [0, 1, *(2 + np.arange(LONGEST) % config["max_position_embeddings"])]
        config["max_position_embeddings"] = LONGEST
        tables = {key: table[rows] for key, table in tensors.items() if key.endswith("embed_positions.weight")}
        tensors |= tables
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.quick("t5_v1_0-129_300")
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_targets_longer_than_their_sources(name: str, lengths: str, tmp_path: Path):
    lm = llama_jax.load(lengthened(name, tmp_path), dtype="float32")
    with np.load(GOLDENS / f"long_targets_{name}.npz") as golden:
        source, mask, target, places, expected = (
            golden[f"{key}_{lengths}"] for key in ("source", "source_mask", "target", "places", "logits")
        )
    with kernels.calls_of_attend() as calls:
        logits = lm.model(source.astype(np.int32), target.astype(np.int32), source_mask=mask.astype(np.int32))
    crossing = [call for call in calls if call.ctx.mask.key_segment_ids is not None]
    assert {kernels.choose(call.q, call.k, call.ctx) for call in crossing} == {"blockwise"}
    error = np.abs(np.asarray(logits)[:, places] - expected)
    assert error.max() < TOLERANCE, error.max((0, 2))
