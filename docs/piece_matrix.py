"""Which pieces of a decoder go together, and the table of it in docs/zoo.md: chosen by name, as on the command line."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from markdown_table import markdown

from llama_jax.config import UserError, override
from llama_jax.models import Compute, DecoderConfig, abstract_params
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.training.step import losses

type Changes = Mapping[str, Any]

BASE = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=1,
    max_positions=8,
    attention=GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=4, rope=None, qkv_bias=False, out_bias=False),
    feed_forward=SwiGLU(intermediate_size=24, bias=False),
    norm=RMSNorm(eps=1e-5),
    tie_embeddings=False,
)
ATTENTIONS: dict[str, Changes] = {
    "grouped queries": {},
    "a window": {"attention.window": 3},
    "normed heads": {"attention.qk_norm": "RMSNorm"},
    "output gate": {"attention.output_gate": True},
    "latent": {"attention": "LatentAttention"},
    "sparse": {"attention": "SparseLatentAttention", "attention.index_topk": 3},
    "Elman": {"attention": "ElmanRNN"},
    "LSTM": {"attention": "LSTM"},
    "GRU": {"attention": "GRU"},
    "delta rule": {"attention": "GatedDeltaNet"},
    "n-gram": {"attention": "NGram", "attention.order": 3},
    "Mamba-2": {"attention": "Mamba2"},
}
NORMS: dict[str, Changes] = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "output": {"norm_placement": "output"},
    "LayerNorm": {"norm": "LayerNorm"},
    "no norm": {"norm": "none"},
    "parallel, one norm": {"parallel": "one_norm"},
    "parallel, own norms": {"parallel": "own_norms"},
}
POSITIONS: dict[str, Changes] = {
    "no positions": {},
    "rotary": {"attention.rope": Rope(theta=10000.0, scaling=None)},
    "learned": {"positions": "LearnedPositions"},
    "sinusoids": {"positions": "SinusoidalPositions"},
    "ALiBi": {"position_bias": "Alibi"},
    "relative bias": {"position_bias": "RelativeBias"},
}
FEED_FORWARDS: dict[str, Changes] = {
    "SwiGLU": {},
    "MLP": {"feed_forward": "MLP", "feed_forward.activation": "gelu_tanh"},
    "GEGLU": {"feed_forward": "GatedLinearUnit", "feed_forward.activation": "gelu"},
    "experts": {"feed_forward": "Experts", "feed_forward.num_experts": 4},
    "no feed-forward": {"feed_forward": "none"},
}
GROUPS = {"attention": ATTENTIONS, "norms": NORMS, "positions": POSITIONS, "feed-forward": FEED_FORWARDS}


@functools.cache
def made(names: tuple[str, ...]) -> DecoderConfig | str:
    """Return the model with a piece of each group, or the sentence that refuses it."""
    changes: dict[str, Any] = {}
    for group, name in zip(GROUPS.values(), names, strict=True):
        changes |= group[name]
    try:
        return override(BASE, changes)
    except UserError as error:
        return str(error)


def combinations() -> Iterator[tuple[str, ...]]:
    """Yield every choice of a piece of each group."""
    yield from itertools.product(*GROUPS.values())


def _pairs(names: tuple[str, ...]) -> set[tuple[str, str]]:
    return set(itertools.combinations(names, 2))


@functools.cache
def covering() -> list[tuple[str, ...]]:
    """Return combinations that can be made and have, together, every pair of pieces that some of these has."""
    return cover({names: _pairs(names) for names in combinations() if not isinstance(made(names), str)})


def cover[Name](sets: Mapping[Name, Set[Any]]) -> list[Name]:
    """Return names whose sets have, together, every element of all sets: few, by taking the most useful one first."""
    left = set[Any]().union(*sets.values())
    chosen = list[Name]()
    while left:
        chosen.append(max(sets, key=lambda name: len(sets[name] & left)))
        left -= sets[chosen[-1]]
    return chosen


def gradient(config: DecoderConfig) -> tuple[float, dict[str, np.ndarray]]:
    """Return the mean loss of two rows of eight random tokens, and its gradient by parameter."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (2, 9), dtype=np.int32)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((2, 8), np.float32),
        "segment_ids": np.ones((2, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    }
    shapes = abstract_params(config)
    params = {name: jnp.asarray(rng.normal(0.0, 0.3, a.shape).astype(np.float32)) for name, a in shapes.items()}

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> jax.Array:
        ((_, loss, _),), _ = losses(params, batch, config, Compute(loss_chunk=4))
        return loss / ids[:, 1:].size

    loss, found = mean_loss(params, batch)
    return float(loss), {name: np.asarray(value) for name, value in found.items()}


def matrix() -> str:
    """Return the table of what goes together, and the sentences that refuse the rest.

    A cell has the pieces of its column that go with the row's piece in no combination.
    """
    sentences: dict[tuple[str, str], set[str]] = {}
    for names in combinations():
        found = made(names)
        for pair in _pairs(names):
            sentences.setdefault(pair, set()).add("" if not isinstance(found, str) else found)
    never = {pair: min(found, key=len) for pair, found in sentences.items() if "" not in found}
    rows = []
    for group, pieces in GROUPS.items():
        for piece in pieces:
            cells = []
            for other in GROUPS.values():
                refused = [name for name in other if (piece, name) in never or (name, piece) in never]
                cells.append("" if other is pieces else f"not {', '.join(refused)}" if refused else "all")
            rows.append((group, piece, *cells))
    lines = [f"- {a} with {b}: {sentence}" for (a, b), sentence in never.items()]
    return markdown("|".join(("group", "piece", *GROUPS)), rows) + "\n\n" + "\n".join(lines)
