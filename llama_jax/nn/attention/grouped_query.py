"""Grouped-query attention; multi-head (K = N) and multi-query (K = 1) are its ends."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.nn.attention.cache import Cache, write
from llama_jax.nn.attention.kernels import attend
from llama_jax.nn.dropout import check_rate
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import Mixer, MixerModule
from llama_jax.nn.norms import Norm
from llama_jax.nn.parameters import Projection, child
from llama_jax.nn.positions import Rope
from llama_jax.parallel import shard


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
    qk_norm: of each query and key head, before rotary positions (Henry et al. 2020), or none.
    window: how many keys a query sees, itself included (and as many after it where it sees those); none for all.
    softcap: scores are softcap * tanh(scores / softcap), as in Gemma 2; none for as they are.
    dropout: rate on the attention weights.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool
    out_bias: bool
    scale: float | None = None
    qk_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads)
        if self.head_dim < 1 or (self.rope is not None and self.head_dim % 2 and self.rope.rotary_dim is None):
            raise UserError(f"head_dim={self.head_dim} must be positive, and even for rotary positions")
        if self.rope is not None and (self.rope.rotary_dim or 0) > self.head_dim:
            raise UserError(f"rope.rotary_dim={self.rope.rotary_dim} must be at most head_dim={self.head_dim}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1")
        for name in ("scale", "softcap"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value} must be above 0")
        check_rate("dropout", self.dropout)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "GroupedQueryModule":
        return GroupedQueryModule(self, width, rngs=rngs)

    def score_flops(self, context: float) -> float:
        return 4 * self.num_heads * self.head_dim * (context if self.window is None else min(context, self.window))


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises UserError where the key/value heads cannot be shared evenly."""
    if num_heads < 1:
        raise UserError(f"num_heads={num_heads} must be at least 1")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
        raise UserError(
            f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: "
            f"take one of {', '.join(map(str, divisors))}"
        )


def projections(config: Any, width: int, *, rngs: nnx.Rngs) -> tuple[Projection, Projection, Projection, Projection]:
    """Those of queries, keys, values and output, for a config with their options."""
    # Scores begin as large as with a scale of 1/sqrt(head_dim): at T5's of 1 they would begin as a choice of one key.
    shrunk = 1.0 if config.scale is None else min(1.0, config.head_dim**-0.5 / config.scale)
    heads = {"heads": config.num_heads, "_head_dim": config.head_dim}
    kv_heads = {"kv_heads": config.num_kv_heads, "_head_dim": config.head_dim}
    outer = {"embed": width}
    return (
        Projection(outer, heads, bias=config.qkv_bias, rngs=child(rngs, "q_proj"), std=shrunk * width**-0.5),
        Projection(outer, kv_heads, bias=config.qkv_bias, rngs=child(rngs, "k_proj")),
        Projection(outer, kv_heads, bias=config.qkv_bias, rngs=child(rngs, "v_proj")),
        Projection(heads, outer, bias=config.out_bias, rngs=child(rngs, "o_proj")),
    )


class GroupedQueryModule(MixerModule):
    def __init__(self, config: GroupedQuery, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(config, width, rngs=rngs)
        norm = config.qk_norm
        self.q_norm = norm and norm.build(config.head_dim, rngs=child(rngs, "q_norm"))
        self.k_norm = norm and norm.build(config.head_dim, rngs=child(rngs, "k_norm"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], mask: AttentionMask, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        config = self.config
        if config.window is not None:
            mask = dataclasses.replace(mask, window=config.window)
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if (rope := config.rope) is not None:
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, positions), rope.rotate(k_BTKH, positions)
        k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        if cache is not None:
            assert mask.q_index is not None
            cache = write(cache, {"k": k_BKSH, "v": v_BKSH}, mask.q_index[:, 0])
            k_BKSH, v_BKSH = cache["k"].astype(x.dtype), cache["v"].astype(x.dtype)
        scale = config.head_dim**-0.5 if config.scale is None else config.scale
        y_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, mask, scale=scale, softcap=config.softcap, dropout=config.dropout)
        return self.o_proj(y_BTNH), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        return {
            name: shard(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for name in ("k", "v")
        }  # [B, K, S, H]: with S before K the TPU program keeps a second, transposed cache.
