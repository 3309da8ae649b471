"""Multi-head latent attention: all heads' keys and values come from one small latent vector of each token.

Training expands the latents to keys and values. Decoding need not: q . (W_k c) = (W_k^T q) . c, so queries can be
brought to the latents instead, and what is summed up there is expanded once. Then the latents with the rotary key
beside them are the keys, and the values too, as in multi-query attention, and all that the cache holds.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.nn.attention.cache import Cache, write
from llama_jax.nn.attention.kernels import attend
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import Mixer, MixerModule
from llama_jax.nn.norms import RMSNorm
from llama_jax.nn.parameters import Projection, cast_and_gather, child
from llama_jax.nn.positions import Rope
from llama_jax.parallel import einsum, shard

# The two parts of a query or key: what meets the latents, and what is rotated.
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

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise UserError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or none")
        if self.rope is not None and self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even for rotary positions")
        if self.rope is not None and self.rope.rotary_dim is not None:
            raise UserError("rope.rotary_dim has no place in latent attention: qk_rope_head_dim says how much turns")

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        scaling = None if self.rope is None else self.rope.scaling
        magnitude = 1.0 if scaling is None else scaling.score_magnitude()
        return magnitude * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5

    def absorbs(self, num_queries: int) -> bool:
        """Whether so many queries in a row are cheaper on the latents than on keys and values expanded for them."""
        expanded = self.qk_nope_head_dim + self.v_head_dim
        latent = 2 * (self.kv_lora_rank + self.qk_rope_head_dim)
        return num_queries * (latent - expanded - self.qk_rope_head_dim) < self.kv_lora_rank * expanded

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LatentAttentionModule":
        return LatentAttentionModule(self, width, rngs=rngs)

    def score_flops(self, context: float) -> float:
        return 2 * self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim) * context


class LatentAttentionModule(MixerModule):
    """Released files have `q_nope_proj` and `q_rope_proj` (or, of a latent, `q_b_*`) as one, so `kv_a_proj` and
    `k_rope_proj`, and `k_b_proj` and `v_b_proj`."""

    def __init__(self, config: LatentAttention, width: int, *, rngs: nnx.Rngs):
        self.config = config
        outer, latent = {"embed": width}, {"embed": config.kv_lora_rank}

        def projection(name: str, in_dims: dict[str, int], out_dims: dict[str, int]) -> Projection:
            return Projection(in_dims, out_dims, bias=False, rngs=child(rngs, name))

        def norm(name: str, size: int) -> nnx.Module:
            return RMSNorm(eps=config.eps).build(size, rngs=child(rngs, name))

        def heads(size: int) -> dict[str, int]:
            return {"heads": config.num_heads, "_head_dim": size}

        if config.q_lora_rank is None:
            self.q_nope_proj = projection("q_nope_proj", outer, heads(config.qk_nope_head_dim))
            self.q_rope_proj = projection("q_rope_proj", outer, heads(config.qk_rope_head_dim))
        else:
            q_latent = {"embed": config.q_lora_rank}
            self.q_a_proj = projection("q_a_proj", outer, {"_latent": config.q_lora_rank})
            self.q_a_layernorm: Any = norm("q_a_layernorm", config.q_lora_rank)
            self.q_b_nope_proj = projection("q_b_nope_proj", q_latent, heads(config.qk_nope_head_dim))
            self.q_b_rope_proj = projection("q_b_rope_proj", q_latent, heads(config.qk_rope_head_dim))
        self.kv_a_proj = projection("kv_a_proj", outer, {"_latent": config.kv_lora_rank})
        self.kv_a_layernorm: Any = norm("kv_a_layernorm", config.kv_lora_rank)
        self.k_rope_proj = projection("k_rope_proj", outer, {"_head_dim": config.qk_rope_head_dim})
        self.k_b_proj = projection("k_b_proj", latent, heads(config.qk_nope_head_dim))
        self.v_b_proj = projection("v_b_proj", latent, heads(config.v_head_dim))
        self.o_proj = projection("o_proj", heads(config.v_head_dim), outer)

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], mask: AttentionMask, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        q = self.queries(self.query_latents(x), positions)
        latents = self.latents(x, positions)
        if cache is not None:
            assert mask.q_index is not None
            cache = write(cache, {"latent": latents[:, None]}, mask.q_index[:, 0])
            latents = cache["latent"][:, 0].astype(x.dtype)
        absorbed = cache is not None and self.config.absorbs(x.shape[1])
        return self.o_proj((self.on_latents if absorbed else self.on_keys)(q, latents, mask)), cache

    def query_latents(self, x: Float[Array, "b t d"]) -> Float[Array, "b t c"]:
        """What queries are made of."""
        return x if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def queries(self, source: Float[Array, "b t c"], positions: Int[Array, "b t"]) -> Parts:
        if self.config.q_lora_rank is None:
            nope, rope = self.q_nope_proj(source), self.q_rope_proj(source)
        else:
            nope, rope = self.q_b_nope_proj(source), self.q_b_rope_proj(source)
        return nope, self._rotate(rope, positions)

    def latents(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]) -> Float[Array, "b t r"]:
        """What the cache keeps of each token: the latent of its keys and values, normalised, then the rotary key."""
        k_rope = self._rotate(self.k_rope_proj(x)[:, :, None], positions)[:, :, 0]
        return jnp.concatenate([self.kv_a_layernorm(self.kv_a_proj(x)), k_rope], axis=-1)

    def _rotate(self, x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
        return x if self.config.rope is None else self.config.rope.rotate(x, positions)

    def expand(
        self, q: Parts, latents: Float[Array, "b s r"]
    ) -> tuple[Float[Array, "b t n q"], Float[Array, "b n s q"], Float[Array, "b n s v"]]:
        """Queries, keys and values of all heads."""
        latent, k_rope = jnp.split(latents, [self.config.kv_lora_rank], axis=-1)
        k_nope, v = self.k_b_proj(latent), self.v_b_proj(latent)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        k = jnp.concatenate([k_nope, shard(shared, "batch", "sequence", "heads", None)], axis=-1)
        return jnp.concatenate(q, axis=-1), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def on_keys(self, q: Parts, latents: Float[Array, "b s r"], mask: AttentionMask) -> Float[Array, "b t n v"]:
        """What each head reads, by keys and values."""
        return attend(*self.expand(q, latents), mask, scale=self.config.scale)

    def on_latents(self, q: Parts, latents: Float[Array, "b s r"], mask: AttentionMask) -> Float[Array, "b t n v"]:
        """The same, with the projections of keys and values absorbed."""
        heads = ("batch", "sequence", "heads", None)
        q_latent = einsum("btnh,rnh->btnr", q[0], cast_and_gather(self.k_b_proj.weight, q[0].dtype), out=heads)
        keys = latents[:, None]
        # The rotary part is not asked for; without it, the values would be a copy of most of the cache.
        y = attend(jnp.concatenate([q_latent, q[1]], axis=-1), keys, keys, mask, scale=self.config.scale)
        y = y[..., : self.config.kv_lora_rank]
        return einsum("btnr,rnv->btnv", y, cast_and_gather(self.v_b_proj.weight, y.dtype), out=heads)

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        shape = (batch, 1, length, self.config.kv_lora_rank + self.config.qk_rope_head_dim)
        return {"latent": shard(jnp.zeros(shape, dtype), "batch", None, None, None)}
