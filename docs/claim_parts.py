"""The sweeps that `claims.py` trains: what their variants change, and the base of all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.nn import MLP, LatentAttention, RMSNorm, SparseLatentAttention

SIZES = {
    "model.vocab_size": 2048,
    "tokenizer.vocab_size": 2048,
    "model.hidden_size": 128,
    "model.num_layers": 4,
    "model.attention.num_heads": 8,
    "model.attention.num_kv_heads": 8,
    "model.attention.head_dim": 16,
    "model.feed_forward.intermediate_size": 344,
    "global_batch_size": 8,
    "sequence_length": 128,
    "num_steps": 300,
    "optimizer": "AdamW",
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 30,
    "logging.validate_every_steps": 100,
    "logging.validation_batches": 48,
    "logging.sample_prompts": [],
    "compute.dtype": "float32",
    "compute.preflight": False,
    "checkpoint.every_steps": 10_000,
    "checkpoint.keep_best": 0,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A sweep, or measurements without one (no variants): `match` as of `ablate`, `changes` of the base."""

    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict[str, dict[str, Any]])
    match: str | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def part_sizes(quick: bool) -> dict[str, Any]:
    """Return the keys of the base of all parts; quick ones are those of the notebooks' reduced mode."""
    small = {
        "model.hidden_size": 64,
        "model.num_layers": 2,
        "data.path": [str(Path(json.__file__).parent / "*.py")],
        "num_steps": 4,
        "sequence_length": 64,
        "model.vocab_size": 512,
        "tokenizer.vocab_size": 512,
        "data.validation_fraction": 0.3,
        "optimizer.warmup_steps": 1,
        "logging.validate_every_steps": 4,
        "logging.validation_batches": 2,
    }
    return SIZES | (small if quick else {})


NO_ROPE = {"model.attention.rope": None}
PARTS = {
    "attention": Part(
        {
            "MHA": {},
            "MQA": {"model.attention.num_kv_heads": 1},
            "GQA": {"model.attention.num_kv_heads": 2},
            "MLA": {"model.attention": LatentAttention},
            "DSA": {
                "model.attention": SparseLatentAttention,
                "model.attention.q_lora_rank": 64,
                "model.attention.index_topk": 32,
                "model.attention.index_loss_weight": 1.0,
            },
        },
        match="parameters",
    ),
    "norms": Part(
        {
            "LayerNorm": {},
            "RMSNorm": {"model.norm": RMSNorm},
            "LayerNorm, post": {"model.norm_placement": "post"},
            "LayerNorm, post, no warm-up": {"model.norm_placement": "post", "optimizer.warmup_steps": 0},
        },
        changes={"model.norm": "LayerNorm"},
    ),
    "feed_forwards": Part(
        {"SwiGLU": {}}
        | {
            name: {"model.feed_forward": MLP, "model.feed_forward.activation": name.lower()}
            for name in ("ReLU", "GELU", "SiLU")
        },
        match="parameters",
    ),
    "positions": Part(
        {
            "RoPE": {},
            "ALiBi": NO_ROPE | {"model.position_bias": "Alibi"},
            "sinusoids": NO_ROPE | {"model.positions": "SinusoidalPositions"},
            "none": NO_ROPE,
        }
    ),
    "memory": Part(),
}


def base(part: Part, quick: bool) -> Any:
    """Return the run config that a part's variants change."""
    return llama_jax.load_config("tiny_python", part_sizes(quick) | part.changes)
