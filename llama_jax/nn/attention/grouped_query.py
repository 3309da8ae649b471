"""Grouped-query attention and cross-attention; multi-head (K = N) and multi-query (K = 1) are its ends."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from llama_jax.config import Known, UserError
from llama_jax.nn.attention import ring
from llama_jax.nn.attention.attend import attend
from llama_jax.nn.base import (
    ForwardContext,
    Mixer,
    MixerModule,
    Piece,
    check_above_zero,
    check_at_least,
    check_rate,
    known_heads,
)
from llama_jax.nn.norms import Norm
from llama_jax.nn.parameters import Projection, cast_and_gather, child, joined_products, parameter
from llama_jax.nn.rope import Rope, known_rope
from llama_jax.parallel import reshape, shard

Cache = ring.Cache


@dataclasses.dataclass(frozen=True)
class GroupedQuery(Mixer):
    """Attention whose N query heads share K key/value heads (Ainslie et al. 2023).

    num_heads: query heads.
    num_kv_heads: key/value heads; divides num_heads.
    head_dim: size of a head.
    rope: rotary positions, or none.
    qkv_bias: biases on the query, key and value projections.
    out_bias: a bias on the output projection.
    scale: of the scores; none for 1/sqrt(head_dim).
    qk_norm: of queries and keys, before rotary positions (Henry et al. 2020), or none.
    qk_norm_over: each head, with the same weights (head) or its own (own_weights), or all heads at once (width).
    window: number of keys that a query attends to, itself included (and as many after it in an encoder); none for all.
    softcap: scores are softcap * tanh(scores / softcap), as in Gemma 2; none for as they are.
    dropout: rate on the attention weights.
    sinks: a trained score of each head that only adds to the softmax's denominator (Xiao et al. 2024; GPT-OSS).
    pre_norm: a block with norms before its parts has one before this; off where embeddings are normed (ModernBERT).
    output_gate: the result times the sigmoid of a gate, which the query projection gives after each query (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool
    out_bias: bool
    scale: float | None = None
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "own_weights", "width"] = "head"
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: bool = False
    pre_norm: bool = True
    output_gate: bool = False

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        num_heads, head_dim = known_heads(known)
        sizes = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim}
        return sizes | {"rope": known_rope(known), "qkv_bias": False, "out_bias": False}

    def __post_init__(self) -> None:
        _check_heads(self.num_heads, self.num_kv_heads)
        if self.head_dim < 1 or (self.rope is not None and self.head_dim % 2 and self.rope.rotary_dim is None):
            raise UserError(f"head_dim={self.head_dim} must be positive, and even for rotary positions")
        if self.rope is not None and (self.rope.rotary_dim or 0) > self.head_dim:
            raise UserError(f"rope.rotary_dim={self.rope.rotary_dim} must be at most head_dim={self.head_dim}")
        if self.rope is not None:
            self.rope.frequencies(self.head_dim)  # refuses a scaling for heads of another size
        check_at_least(self, 1, "window")
        check_above_zero(self, "scale", "softcap")
        check_rate("dropout", self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "GroupedQueryModule":
        return GroupedQueryModule(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        return 4 * self.num_heads * self.head_dim * (num_keys if self.window is None else min(num_keys, self.window))


@dataclasses.dataclass(frozen=True)
class CrossAttention(Piece):
    """Attention to a source (Vaswani et al. 2017, section 3.2.3; Bahdanau et al. 2015), without positions.

    num_heads: query heads.
    num_kv_heads: key/value heads; divides num_heads.
    head_dim: size of a head.
    qkv_bias: biases on the query, key and value projections.
    out_bias: a bias on the output projection.
    scale: of the scores; none for 1/sqrt(head_dim).
    dropout: rate on the attention weights.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    scale: float | None = None
    dropout: float = 0.0

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return GroupedQuery.follow(known)

    def __post_init__(self) -> None:
        _check_heads(self.num_heads, self.num_kv_heads)
        check_at_least(self, 1, "head_dim")
        check_above_zero(self, "scale")
        check_rate("dropout", self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "CrossAttentionModule":
        """Return the module for inputs of this width."""
        return CrossAttentionModule(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        """Return the FLOPs of one target token beyond its parameters' products, for a source of `num_keys` tokens."""
        return 4 * self.num_heads * self.head_dim * num_keys


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1:
        raise UserError(f"num_heads={num_heads} must be at least 1")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
        raise UserError(
            f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: "
            f"take one of {', '.join(map(str, divisors))}"
        )


class _Projections(nnx.Module):
    """The projections of queries, keys, values and output, and the scale of the scores."""

    def __init__(self, config: GroupedQuery | CrossAttention, width: int, *, rngs: nnx.Rngs):
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        # Scores begin as large as with a scale of 1/sqrt(head_dim): with T5's scale of 1 each query would otherwise
        # begin by attending to almost one key.
        shrunk = min(1.0, config.head_dim**-0.5 / self.scale)
        outer, heads = {"embed": width}, {"heads": config.num_heads, "_head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "_head_dim": config.head_dim}
        bias, std = config.qkv_bias, shrunk * width**-0.5
        queries = heads | {"_head_dim": config.head_dim * (1 + getattr(config, "output_gate", False))}
        self.q_proj = Projection(outer, queries, bias=bias, rngs=child(rngs, "q_proj"), std=std)
        self.k_proj = Projection(outer, kv_heads, bias=bias, rngs=child(rngs, "k_proj"))
        self.v_proj = Projection(outer, kv_heads, bias=bias, rngs=child(rngs, "v_proj"))
        self.o_proj = Projection(heads, outer, bias=config.out_bias, rngs=child(rngs, "o_proj"))


class GroupedQueryModule(_Projections, MixerModule):
    """Grouped-query attention; its cache is the keys and values so far, `k` and `v` [B, K, S, H], or a ring."""

    def __init__(self, config: GroupedQuery, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.config = config
        self.q_norm = self._norm("q_norm", ("heads", config.num_heads), rngs)
        self.k_norm = self._norm("k_norm", ("kv_heads", config.num_kv_heads), rngs)
        self.sinks = parameter(rngs, "sinks", (config.num_heads,), ("heads",), std=0.0) if config.sinks else None

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        config = self.config
        if config.window is not None:
            ctx = ctx.with_mask(window=config.window)
        products = joined_products(x, *self.same_inputs) or [projection(x) for projection in self.same_inputs]
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(y, "projections") for y in products)
        q_BTNH, *gate = jnp.split(q_BTNH, 1 + config.output_gate, -1)
        q_BTNH, k_BTKH = self._normed(self.q_norm, q_BTNH, "heads"), self._normed(self.k_norm, k_BTKH, "kv_heads")
        if (rope := config.rope) is not None:
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, positions), rope.rotate(k_BTKH, positions)
        k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)  # the layout of the cache, and of the kernels
        if cache is not None:
            cache = write_cache(cache, {"k": k_BKSH, "v": v_BKSH}, ctx.cache_start)
            if ring.is_ring(cache):
                ctx = ctx.with_mask(key_places=ring.places_of(cache))
            k_BKSH, v_BKSH = read_cache(cache, ("k", "v"), x.dtype)
        options: dict[str, Any] = {"scale": self.scale, "softcap": config.softcap, "dropout": config.dropout}
        if self.sinks is not None:
            options["sinks"] = cast_and_gather(self.sinks, jnp.float32).reshape(1, -1, 1, 1)
        y = attend(q_BTNH, k_BKSH, v_BKSH, ctx, **options)
        return self.o_proj(y * jax.nn.sigmoid(gate[0]) if config.output_gate else y), cache

    def _norm(self, name: str, heads: tuple[str, int], rngs: nnx.Rngs) -> Any:
        """Return the norm of queries or keys; `heads` are the axis and the number of theirs."""
        config, own = self.config, child(rngs, name)
        if config.qk_norm is None:
            return None
        if config.qk_norm_over == "width":
            return config.qk_norm.build(heads[1] * config.head_dim, rngs=own)
        norm: Any = config.qk_norm.build(config.head_dim, rngs=own)
        if config.qk_norm_over == "own_weights":
            for weight in ("weight", "bias"):
                if (value := getattr(norm, weight, None)) is not None:
                    values = shard(jnp.broadcast_to(value[...], (heads[1], config.head_dim)), heads[0], None)
                    setattr(norm, weight, nnx.Param(values, axes=(heads[0], None)))
        return norm

    def _normed(self, norm: Any, x: Float[Array, "b t n h"], heads: str) -> Float[Array, "b t n h"]:
        if norm is None or self.config.qk_norm_over != "width":
            return x if norm is None else norm(x)
        whole = reshape(shard(x, "batch", "sequence", None, None), (*x.shape[:2], -1), "batch", "sequence", None)
        return reshape(norm(whole), x.shape, "batch", "sequence", heads, None)

    @property
    def same_inputs(self) -> tuple[Projection, ...]:
        """The projections whose inputs are the same."""
        return self.q_proj, self.k_proj, self.v_proj

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        # [B, K, S, H]: with S before K the TPU program keeps a second, transposed cache.
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        return empty_cache({"k": shape, "v": shape}, dtype)

    def init_window(self, batch: int, length: int, dtype: DTypeLike, room: int) -> Cache:
        size = length if self.config.window is None else self.config.window + room
        if size >= length:
            return self.init_cache(batch, length, dtype)
        held = shard(jnp.zeros((batch, size), jnp.int32), "batch", None)
        return self.init_cache(batch, size, dtype) | {ring.HELD: held}


class CrossAttentionModule(_Projections):
    """Attention from a target to a source."""

    def __init__(self, config: CrossAttention, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.config = config

    def keys(self, source: Float[Array, "b s d"]) -> Cache:
        """Return keys and values of the source, `k` and `v` [B, K, S, H]: the same for every target token."""
        return {"k": self.k_proj(source).swapaxes(1, 2), "v": self.v_proj(source).swapaxes(1, 2)}

    def __call__(self, x: Float[Array, "b t d"], keys: Cache, *, ctx: ForwardContext) -> Float[Array, "b t d"]:
        """Map the target [B, T, D] and the source's `keys` to [B, T, D].

        The mask of `ctx` is not causal; its `segment_ids` [B, T] are those of the target, its `key_segment_ids` [B, S]
        those of the source.
        """
        if ctx.mask.causal or ctx.position_bias is not None:
            raise ValueError("a target token sees all of its source, and has no position among its tokens")
        if ctx.dropout_key is not None:  # else it would drop what the layer's other attention drops
            ctx = dataclasses.replace(ctx, dropout_key=ctx.random_key("cross attention"))
        k, v = (keys[name].astype(x.dtype) for name in ("k", "v"))
        return self.o_proj(attend(self.q_proj(x), k, v, ctx, scale=self.scale, dropout=self.config.dropout))


def empty_cache(shapes: dict[str, tuple[int, int, int, int]], dtype: DTypeLike) -> Cache:
    """Return zeros [B, K, S, H] by name; of int8 with `NAME_scale` [B, K, S, 1], the float32 factor of each entry."""
    if jnp.dtype(dtype) != jnp.int8:
        found = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    else:
        found = {name: jnp.zeros(shape, jnp.int8) for name, shape in shapes.items()}
        found |= {f"{name}_scale": jnp.zeros((*shape[:-1], 1)) for name, shape in shapes.items()}
    return {name: shard(x, "batch", "kv_heads", None, None) for name, x in found.items()}


def read_cache(cache: Cache, names: tuple[str, ...], dtype: DTypeLike) -> list[Float[Array, "b k s _"]]:
    """Return the entries of these names; of int8 times their scales."""
    scales = [cache.get(f"{name}_scale") for name in names]
    found = [cache[name].astype(dtype) for name in names]
    return [x if scale is None else x * scale.astype(dtype) for x, scale in zip(found, scales, strict=True)]


def _rounded(x: Float[Array, "b k t h"]) -> tuple[Array, Array]:
    """Return int8 entries and their scales: the largest number of an entry is 127."""
    scale = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def write_cache(cache: Cache, new: dict[str, Num[Array, "b k t _"]], start: Int[Array, " b"]) -> Cache:
    """Write each row's new entries into a cache of [B, K, S, H] arrays, beginning at its place `start`.

    Into int8 they are rounded, each with the scale that makes its largest number 127.
    """
    if ring.is_ring(cache):
        held = ring.noted(cache, start, size := new["k"].shape[2])
        cache = {name: x for name, x in cache.items() if name != ring.HELD}
        for t in range(size):  # one by one: they may go on at the ring's beginning
            entry = {name: x[:, :, t : t + 1] for name, x in new.items()}
            cache = write_cache(cache, entry, (start + t) % held.shape[1])
        return cache | {ring.HELD: held}

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        if old.shape[0] == 1:  # one slice is written in place; XLA:CPU copies what it scatters into
            return jax.lax.dynamic_update_slice_in_dim(old, new, start[0], axis=2)
        # Slices by row, which need no communication on a mesh.
        place = jax.vmap(lambda row, new_row, at: jax.lax.dynamic_update_slice_in_dim(row, new_row, at, axis=1))
        return place(old, new, start)

    for name in [name for name in new if f"{name}_scale" in cache]:
        new = new | dict(zip((name, f"{name}_scale"), _rounded(new[name]), strict=True))
    # Whole along the sequence, as the cache is: a context axis may have split the new entries.
    whole = {name: shard(x.astype(cache[name].dtype), "batch", "kv_heads", None, None) for name, x in new.items()}
    written = {name: write(cache[name], x) for name, x in whole.items()}
    # Without the barrier XLA:CPU writes once more inside what reads the cache, and copies the whole cache for that.
    return jax.lax.optimization_barrier(written)
