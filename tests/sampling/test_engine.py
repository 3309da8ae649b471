"""Requests that are continued together: each as if it were alone."""

from collections import defaultdict

import numpy as np
import pytest

from llama_jax.models import DecoderConfig, Model
from llama_jax.sampling import Engine, Piece, Request, SamplingConfig, generate


def run(engine: Engine) -> dict[tuple[int, int], list[Piece]]:
    pieces = defaultdict(list)
    while not engine.idle:
        for piece in engine.step():
            pieces[piece.ticket, piece.sample].append(piece)
    return pieces


def ids(pieces: list[Piece]) -> list[int]:
    return [i for piece in pieces for i in piece.token_ids]


@pytest.fixture(scope="module")
def prompts(two_layers: DecoderConfig) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, two_layers.vocab_size, n).tolist()) for n in (5, 1, 9, 3, 7)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_requests_are_continued_as_if_alone(model: Model, prompts: list[tuple[int, ...]], temperature: float):
    engine = Engine(model, rows=2)
    counts = [4, 9, 6, 3, 12]
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        config = SamplingConfig(max_new_tokens=count, temperature=temperature, seed=row)
        assert engine.add(Request(prompt, config, row=row)) == row
    found = run(engine)
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        padded = [[0] * len(prompt)] * row + [list(prompt)]
        alone = generate(model, padded, max_new_tokens=count, temperature=temperature, seed=row)[row]
        assert ids(found[row, 0]) == alone[len(prompt) :].tolist()
        assert found[row, 0][-1].finish_reason == "length"
