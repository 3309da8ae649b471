"""Comparison of converted weights with their source: the same inputs must give the same logits."""

import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.checkpoint.formats import Tensors, rounded
from llama_jax.checkpoint.importing import WeightSource, load_params
from llama_jax.config import Json
from llama_jax.models import Compute, DecoderConfig, Model, ModelConfig, abstract_params, assemble
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU

REPORT_FILE = "conversion.json"

type Logits = Callable[[Mapping[str, np.ndarray]], np.ndarray]


class ConversionError(RuntimeError):
    """The converted weights do not compute the logits of the original ones."""


def params_logits(config: ModelConfig, params: Mapping[str, jax.Array]) -> Logits:
    """Return the package's model of these parameters as a function from its inputs by name to float32 logits."""
    sharding = next(iter(params.values())).sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    assert mesh is None or isinstance(mesh, Mesh)
    model = Model(assemble(config, dict(params), Compute(dtype="float32"), scan=True), mesh)

    def logits(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            arrays = {name: jnp.asarray(x, jnp.int32) for name, x in inputs.items()}
            return np.asarray(model.run(_main_logits, arrays))

    return logits


def _main_logits(module: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    return module.main_logits(**inputs)


def source_logits(
    source: WeightSource, inputs: Mapping[str, np.ndarray], dtype: np.dtype | None = None
) -> tuple[np.ndarray, str]:
    """Return float32 logits [B, T, V] of the source, and which reference computed them: "numpy" or "llama_jax".

    A plain Llama's are those of a numpy model that reads the tensors in their own layout; other families', and those of
    a Llama with options that the numpy model lacks, are those of this package's model, which the parity tests hold
    against the original code. `dtype` rounds the weights first.
    """
    if source.model_type == "llama" and _is_plain(source.config):
        assert isinstance(source.config, DecoderConfig)
        tensors = source.tensors
        if dtype is not None:
            tensors = {name: rounded(tensor, dtype) for name, tensor in tensors.items()}
        interleaved = source.form != "huggingface"
        return llama_logits(source.config, tensors, inputs["tokens"], interleaved=interleaved), "numpy"
    params = load_params(source, abstract_params(source.config, dtype or jnp.float32))
    return params_logits(source.config, params)(inputs), "llama_jax"


def check_conversion(source: WeightSource, logits: Logits, *, dtype: np.dtype | None = None) -> Json:
    """Compare the logits of `source` (see `source_logits`) with those of the converted weights; return the report.

    `dtype` is the type that all weights were converted to, None where they have kept theirs. Raises ConversionError on
    disagreement.
    """
    inputs = source.config.example(np.random.default_rng(0))
    expected, reference = source_logits(source, inputs, dtype)
    difference = float(np.abs(expected - np.asarray(logits(inputs), np.float32)).max())
    std = float(expected.std())
    tolerance = std * 1e-3
    if not difference <= tolerance:  # also where it is not a number
        raise ConversionError(
            f"the converted weights differ from '{source.path}': logits by up to {difference:.3g} where "
            f"{tolerance:.3g} is rounding; nothing was kept"
        )
    return {
        "source": source.path.name,
        "form": source.form,
        "tensors": len(source.tensors),
        "model_type": source.model_type,
        "witness": reference,
        "tokens_compared": math.prod(expected.shape[:-1]),
        "max_abs_logit_difference": difference,
        "logit_std": std,
        "tolerance": tolerance,
        "versions": {name: version(name) for name in ("llama_jax", "jax", "numpy")},
    }


def write_report(directory: Path, report: Json) -> None:
    """Write a conversion report next to the weights it is about."""
    (directory / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# Names of a Llama's tensors: Hugging Face's and Meta's.
_NAMES = {
    "embedding": ("model.embed_tokens", "tok_embeddings"),
    "attention_norm": ("model.layers.{}.input_layernorm", "layers.{}.attention_norm"),
    "q": ("model.layers.{}.self_attn.q_proj", "layers.{}.attention.wq"),
    "k": ("model.layers.{}.self_attn.k_proj", "layers.{}.attention.wk"),
    "v": ("model.layers.{}.self_attn.v_proj", "layers.{}.attention.wv"),
    "o": ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.wo"),
    "ffn_norm": ("model.layers.{}.post_attention_layernorm", "layers.{}.ffn_norm"),
    "gate": ("model.layers.{}.mlp.gate_proj", "layers.{}.feed_forward.w1"),
    "up": ("model.layers.{}.mlp.up_proj", "layers.{}.feed_forward.w3"),
    "down": ("model.layers.{}.mlp.down_proj", "layers.{}.feed_forward.w2"),
    "norm": ("model.norm", "norm"),
    "head": ("lm_head", "output"),
}


def _rotate(x_BTNH: np.ndarray, cos_TH: np.ndarray, sin_TH: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Return vectors with rotary positions; their pairs are neighbours (`interleaved`) or in the two halves."""
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    first, second = (x_BTNH[..., ::2], x_BTNH[..., 1::2]) if interleaved else np.split(x_BTNH, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.stack(turned, axis=-1).reshape(x_BTNH.shape) if interleaved else np.concatenate(turned, axis=-1)


def _is_plain(config: ModelConfig) -> bool:
    """Return whether `llama_logits` computes all that this config has: a window, say, it does not."""
    attention, norm = getattr(config, "attention", None), getattr(config, "norm", None)
    if not isinstance(config, DecoderConfig) or not isinstance(attention, GroupedQuery):
        return False
    rope, fields = attention.rope, ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "out_bias", "dropout")
    plain = GroupedQuery(
        rope=rope and Rope(rope.theta, rope.scaling), **{name: getattr(attention, name) for name in fields}
    )
    names = ("vocab_size", "hidden_size", "num_layers", "max_positions", "feed_forward", "norm", "tie_embeddings")
    same = {name: getattr(config, name) for name in (*names, "dropout")}
    kinds = isinstance(config.feed_forward, SwiGLU) and isinstance(norm, RMSNorm) and rope is not None
    return kinds and config == DecoderConfig(attention=plain, **same)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.maximum(x, -80)))


def llama_logits(config: DecoderConfig, tensors: Tensors, tokens: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Return float32 logits [B, T, V] of int tokens [B, T] in plain numpy, from Hugging Face's tensors or Meta's.

    Meta's have the rotary pairs `interleaved`. This code shares nothing with the weight-name tables, the parameter
    layout and the JAX model, so an error in them cannot hide on both sides of a comparison. One matrix is in memory
    at a time.
    """
    names = {name: pair[interleaved] for name, pair in _NAMES.items()}
    attention, feed_forward, norm = config.attention, config.feed_forward, config.norm
    assert isinstance(attention, GroupedQuery)
    assert isinstance(feed_forward, SwiGLU)
    assert isinstance(norm, RMSNorm)
    assert attention.rope is not None

    def tensor(name: str, layer: int | None, kind: str = "weight") -> np.ndarray:
        return tensors[f"{names[name].format(layer)}.{kind}"].read().astype(np.float32)

    def linear(x: np.ndarray, name: str, layer: int | None = None, bias: bool = False) -> np.ndarray:
        y = x @ tensor(name, layer).T
        return y + tensor(name, layer, "bias") if bias else y

    def normalize(x: np.ndarray, name: str, layer: int | None = None) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(norm.eps)) * tensor(name, layer)

    (b, t), heads, groups = tokens.shape, attention.num_heads, attention.num_heads // attention.num_kv_heads
    angles = np.arange(t)[:, None] * attention.rope.frequencies(attention.head_dim)
    magnitude = 1.0 if attention.rope.scaling is None else attention.rope.scaling.magnitude()
    cos, sin = ((magnitude * f(angles)).astype(np.float32) for f in (np.cos, np.sin))
    future = np.where(np.tri(t, dtype=bool), 0, -np.inf).astype(np.float32)
    x = np.stack([tensors[f"{names['embedding']}.weight"].read((slice(i, i + 1),))[0] for i in tokens.reshape(-1)])
    x = x.astype(np.float32).reshape(b, t, -1)  # [B, T, D], rows of the embedding read one by one
    for layer in range(config.num_layers):
        y = normalize(x, "attention_norm", layer)
        q, k, v = (linear(y, name, layer, attention.qkv_bias).reshape(b, t, -1, attention.head_dim) for name in "qkv")
        q, k = (_rotate(x, cos, sin, interleaved=interleaved) for x in (q, k))
        k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(attention.head_dim**-0.5) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + linear(y.reshape(b, t, heads * attention.head_dim), "o", layer, attention.out_bias)
        y = normalize(x, "ffn_norm", layer)
        y = _silu(linear(y, "gate", layer, feed_forward.bias)) * linear(y, "up", layer, feed_forward.bias)
        x = x + linear(y, "down", layer, feed_forward.bias)
    return linear(normalize(x, "norm"), "embedding" if config.tie_embeddings else "head")
