"""Multi-head latent attention: all heads' keys and values come from one small latent vector of each token.

Training expands the latents to keys and values. Decoding can avoid that: q . (W_k c) = (W_k^T q) . c, so queries are
projected to the size of the latents instead, and the weighted sum of latents is expanded once. Then the latents, joined
with the rotary key, are both keys and values, as in multi-query attention, and all that the cache holds.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.attention.attend import attend
from llama_jax.nn.attention.grouped_query import Cache, empty_cache, read_cache, write_cache
from llama_jax.nn.base import ForwardContext, Mixer, MixerModule, check_at_least, known_heads
from llama_jax.nn.norms import RMSNorm
from llama_jax.nn.parameters import Projection, child
from llama_jax.nn.rope import Rope, known_rope
from llama_jax.parallel import einsum, shard

# The two parts of a query: the one that is multiplied with the latents, and the rotary one.
type Parts = tuple[Float[Array, "b t n h"], Float[Array, "b t n p"]]


@dataclasses.dataclass(frozen=True)
class LatentAttention(Mixer):
    """Multi-head latent attention with decoupled rotary positions (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

    Scores are scaled by (qk_nope_head_dim + qk_rope_head_dim)^-0.5, and by what a YaRN scaling adds to that.

    num_heads: heads.
    q_lora_rank: size of the latent that queries are made of; none makes them of the input.
    kv_lora_rank: size of the latent that keys and values are made of.
    qk_nope_head_dim: size of the part of a head's queries and keys that has no positions.
    qk_rope_head_dim: size of the rotary part, whose key all heads share.
    v_head_dim: size of a head's values.
    rope: rotary positions, or none.
    eps: of the RMSNorms of the latents.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope | None
    eps: float

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        # The proportions of DeepSeek-V2: a latent of 4 heads, and half a head more that turns.
        num_heads, size = known_heads(known)
        heads = {"qk_nope_head_dim": size, "qk_rope_head_dim": max(2, size // 4 * 2), "v_head_dim": size}
        latents = {"num_heads": num_heads, "q_lora_rank": None, "kv_lora_rank": 4 * size}
        return heads | latents | {"rope": known_rope(known), "eps": 1e-6}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        check_at_least(self, 1, "q_lora_rank", hint=", or none")
        if self.rope is not None and self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even for rotary positions")
        if self.rope is not None and self.rope.rotary_dim is not None:
            raise UserError("rope.rotary_dim has no place in latent attention: qk_rope_head_dim says how much turns")

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        scaling = None if self.rope is None else self.rope.scaling
        magnitude = 1.0 if scaling is None else scaling.score_magnitude()
        return magnitude * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5

    def absorbs(self, num_queries: int) -> bool:
        """Return whether attention on the latents is cheaper than on keys and values expanded for these queries."""
        # Products for each key and head: expanding it costs kv_lora_rank * expanded once; every query then needs
        # expanded + qk_rope_head_dim of them, and 2 * (kv_lora_rank + qk_rope_head_dim) on the latents.
        expanded = self.qk_nope_head_dim + self.v_head_dim
        latent = 2 * (self.kv_lora_rank + self.qk_rope_head_dim)
        return num_queries * (latent - expanded - self.qk_rope_head_dim) < self.kv_lora_rank * expanded

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LatentAttentionModule":
        return LatentAttentionModule(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        return 2 * self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim) * num_keys


class LatentAttentionModule(MixerModule):
    """Multi-head latent attention; its cache is `latent` [B, 1, S, R], which `latents` returns.

    Released files have `q_nope_proj` and `q_rope_proj` (or `q_b_nope_proj` and `q_b_rope_proj`) as one matrix,
    `kv_a_proj` and `k_rope_proj` as one, and `k_b_proj` and `v_b_proj` as one.
    """

    def __init__(self, config: LatentAttention, width: int, *, rngs: nnx.Rngs):
        self.config = config
        nope, rope, value = (
            {"heads": config.num_heads, "_head_dim": size}
            for size in (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
        )
        outer, latent = {"embed": width}, {"embed": config.kv_lora_rank}

        def projection(name: str, in_dims: dict[str, int], out_dims: dict[str, int]) -> Projection:
            return Projection(in_dims, out_dims, bias=False, rngs=child(rngs, name))

        def norm(name: str, size: int) -> Any:
            return RMSNorm(eps=config.eps).build(size, rngs=child(rngs, name))

        if config.q_lora_rank is None:
            self.q_nope_proj = projection("q_nope_proj", outer, nope)
            self.q_rope_proj = projection("q_rope_proj", outer, rope)
        else:
            q_latent = {"embed": config.q_lora_rank}
            self.q_a_proj = projection("q_a_proj", outer, {"_latent": config.q_lora_rank})
            self.q_a_layernorm = norm("q_a_layernorm", config.q_lora_rank)
            self.q_b_nope_proj = projection("q_b_nope_proj", q_latent, nope)
            self.q_b_rope_proj = projection("q_b_rope_proj", q_latent, rope)
        self.kv_a_proj = projection("kv_a_proj", outer, {"_latent": config.kv_lora_rank})
        self.kv_a_layernorm = norm("kv_a_layernorm", config.kv_lora_rank)
        self.k_rope_proj = projection("k_rope_proj", outer, {"_head_dim": config.qk_rope_head_dim})
        self.k_b_proj = projection("k_b_proj", latent, nope)
        self.v_b_proj = projection("v_b_proj", latent, value)
        self.o_proj = projection("o_proj", value, outer)

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        q = self.queries(self.query_latents(x), positions)
        latents = self.latents(x, positions)
        if cache is not None:
            cache = write_cache(cache, {"latent": latents[:, None]}, ctx.cache_start)
            latents = read_cache(cache, ("latent",), x.dtype)[0][:, 0]
        return self.o_proj(self.attended(q, latents, ctx, decoding=cache is not None)), cache

    def query_latents(self, x: Float[Array, "b t d"]) -> Float[Array, "b t c"]:
        """Return the latents that queries are projected from: x itself without a q_lora_rank."""
        return x if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def queries(self, query_latents: Float[Array, "b t c"], positions: Int[Array, "b t"]) -> Parts:
        """Return both parts of the queries of all heads."""
        if self.config.q_lora_rank is None:
            nope, rope = self.q_nope_proj(query_latents), self.q_rope_proj(query_latents)
        else:
            nope, rope = self.q_b_nope_proj(query_latents), self.q_b_rope_proj(query_latents)
        return nope, self._rotate(rope, positions)

    def latents(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]) -> Float[Array, "b t r"]:
        """Return the cache entry of each token: the normalised latent of its keys and values, then the rotary key."""
        k_rope = self._rotate(self.k_rope_proj(x)[:, :, None], positions)[:, :, 0]
        return jnp.concatenate([self.kv_a_layernorm(self.kv_a_proj(x)), k_rope], axis=-1)

    def _rotate(self, x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
        return x if self.config.rope is None else self.config.rope.rotate(x, positions)

    def attended(
        self, q: Parts, latents: Float[Array, "b s r"], ctx: ForwardContext, *, decoding: bool
    ) -> Float[Array, "b t n v"]:
        """Return what each head reads, by the cheaper of both forms where a cache is read."""
        absorbed = decoding and self.config.absorbs(q[0].shape[1])
        return (self.on_latents if absorbed else self.on_keys)(q, latents, ctx)

    def expand(
        self, q: Parts, latents: Float[Array, "b s r"]
    ) -> tuple[Float[Array, "b t n q"], Float[Array, "b n s q"], Float[Array, "b n s v"]]:
        """Return queries, keys and values of all heads."""
        latent, k_rope = jnp.split(latents, [self.config.kv_lora_rank], axis=-1)
        k_nope, v = self.k_b_proj(latent), self.v_b_proj(latent)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        k = jnp.concatenate([k_nope, shard(shared, "batch", "sequence", "heads", None)], axis=-1)
        return jnp.concatenate(q, axis=-1), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def on_keys(self, q: Parts, latents: Float[Array, "b s r"], ctx: ForwardContext) -> Float[Array, "b t n v"]:
        """Return what each head reads, by expanded keys and values."""
        return attend(*self.expand(q, latents), ctx, scale=self.config.scale)

    def on_latents(self, q: Parts, latents: Float[Array, "b s r"], ctx: ForwardContext) -> Float[Array, "b t n v"]:
        """Return the same as `on_keys`, with the projections of keys and values absorbed into queries and result."""
        heads = ("batch", "sequence", "heads", None)
        q_latent = einsum("btnh,rnh->btnr", q[0], self.k_b_proj.matrix(q[0].dtype), out=heads)
        keys = latents[:, None]
        # The sum of the rotary keys is computed too, and dropped: values without them would be a copy of most of the
        # cache.
        y = attend(jnp.concatenate([q_latent, q[1]], axis=-1), keys, keys, ctx, scale=self.config.scale)
        y = y[..., : self.config.kv_lora_rank]
        return einsum("btnr,rnv->btnv", y, self.v_b_proj.matrix(y.dtype), out=heads)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        shape = (batch, 1, length, self.config.kv_lora_rank + self.config.qk_rope_head_dim)
        return empty_cache({"latent": shape}, dtype)
