"""Latent attention to the keys that a small indexer chooses for each query: DeepSeek sparse attention.

Training computes all scores, by blocks of queries, and masks what is not chosen. Decoding reads only what is chosen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import UserError
from llama_jax.nn.attention import blockwise
from llama_jax.nn.attention.cache import Cache, write
from llama_jax.nn.attention.context import splits, zigzag
from llama_jax.nn.attention.latent import LatentAttention, LatentAttentionModule
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.norms import LayerNorm
from llama_jax.nn.parameters import Projection, child
from llama_jax.parallel import mesh_axis_sizes, replicate, shard, spec, split_over

# Of the indexer: queries [B, T, I, H], how much each head counts [B, T, I], and keys [B, S, H].
type Index = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class SparseLatentAttention(LatentAttention):
    """Latent attention whose queries see only what a lightning indexer chooses (DeepSeek-AI 2025, "DeepSeek-V3.2").

    The indexer learns by a loss of its own alone: the divergence of its softmax from the attention weights, summed over
    the heads and normalised (equations 3 and 4). It starts from what the attention hands it; neither trains the other.

    num_index_heads: heads of the indexer, whose one key they share.
    index_head_dim: size of the indexer's heads; the first qk_rope_head_dim of it are rotated.
    index_topk: how many keys each query sees at most.
    index_loss_weight: what the indexer's loss is multiplied by; 0 leaves the indexer as it is.
    index_warmup: whether queries see everything while the indexer learns, as in the first stage of its training.
    """

    num_index_heads: int
    index_head_dim: int
    index_topk: int
    index_loss_weight: float = 0.0
    index_warmup: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_lora_rank is None:
            raise UserError("q_lora_rank=None leaves the indexer without the latent that its queries are made of")
        for name in ("num_index_heads", "index_topk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise UserError(
                f"index_head_dim={self.index_head_dim} must be at least qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        if self.index_loss_weight < 0:
            raise UserError(f"index_loss_weight={self.index_loss_weight} must be at least 0")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "SparseLatentAttentionModule":
        return SparseLatentAttentionModule(self, width, rngs=rngs)

    def score_flops(self, context: float) -> float:
        seen = context if self.index_warmup else min(context, self.index_topk)
        return super().score_flops(seen) + 2 * self.num_index_heads * self.index_head_dim * context


class Indexer(nnx.Module):
    """What the score of a key is made of: the sum over heads of weight * relu(q . k), as equation 1 has it."""

    def __init__(self, config: SparseLatentAttention, width: int, *, rngs: nnx.Rngs):
        assert config.q_lora_rank is not None
        self.config = config
        heads = {"heads": config.num_index_heads, "_head_dim": config.index_head_dim}
        outer, latent, key = {"embed": width}, {"embed": config.q_lora_rank}, {"_head_dim": config.index_head_dim}
        self.q_proj = Projection(latent, heads, bias=False, rngs=child(rngs, "q_proj"))
        self.k_proj = Projection(outer, key, bias=False, rngs=child(rngs, "k_proj"))
        self.k_norm: Any = LayerNorm(eps=config.eps, bias=True).build(config.index_head_dim, rngs=child(rngs, "k_norm"))
        self.weights_proj = Projection(
            outer, {"heads": config.num_index_heads}, bias=False, rngs=child(rngs, "weights_proj")
        )

    def queries(
        self, x: Float[Array, "b t d"], source: Float[Array, "b t c"], positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t i h"], Float[Array, "b t i"]]:
        """Queries, and how much each head counts, in float32."""
        scale = (self.config.num_index_heads * self.config.index_head_dim) ** -0.5
        weights = self.weights_proj(x.astype(jnp.float32)) * scale
        return self._rotate(self.q_proj(source), positions), weights

    def keys(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        return self._rotate(self.k_norm(self.k_proj(x))[:, :, None], positions)[:, :, 0]

    def _rotate(self, x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
        if (rope := self.config.rope) is None:
            return x
        return dataclasses.replace(rope, rotary_dim=self.config.qk_rope_head_dim).rotate(x, positions)


class SparseLatentAttentionModule(LatentAttentionModule):
    config: SparseLatentAttention

    def __init__(self, config: SparseLatentAttention, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.indexer = Indexer(config, width, rngs=child(rngs, "indexer"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], mask: AttentionMask, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None, dict[str, jax.Array]]:
        """Also what the indexer is to learn from, in training: `loss.indexer`."""
        if mask.kernel not in ("auto", "reference", "blockwise"):
            raise UserError(f"attention_kernel={mask.kernel!r} cannot do sparse attention: take auto")
        if mask.bias is not None:
            raise UserError("sparse attention takes no bias of the scores: set position_bias to none")
        source = self.query_latents(x)
        q, latents = self.queries(source, positions), self.latents(x, positions)
        x_detached, source = jax.lax.stop_gradient((x, source))
        index_k = self.indexer.keys(x_detached, positions)
        if cache is not None:
            assert mask.q_index is not None
            cache = write(cache, {"latent": latents[:, None], "index": index_k[:, None]}, mask.q_index[:, 0])
            latents, index_k = (cache[name][:, 0].astype(x.dtype) for name in ("latent", "index"))
        learns = cache is None and self.config.index_loss_weight > 0
        aux: dict[str, jax.Array] = {}
        if not learns and (latents.shape[1] <= self.config.index_topk or self.config.index_warmup):
            absorbed = cache is not None and self.config.absorbs(x.shape[1])
            y = (self.on_latents if absorbed else self.on_keys)(q, latents, mask)
        else:
            index = *self.indexer.queries(x_detached, source, positions), index_k
            if cache is not None and x.shape[1] == 1:
                y = self.on_latents(q, *self._chosen(latents, index, mask))
            else:
                y, *divergence = self._masked(self.expand(q, latents), index, mask, learns)
                if learns:
                    mean = mask.mean_of_rows(mask.row_means(divergence[0]))
                    aux["loss.indexer"] = self.config.index_loss_weight * mean
        return self.o_proj(y), cache, aux

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        index = jnp.zeros((batch, 1, length, self.config.index_head_dim), dtype)
        return super().init_cache(batch, length, dtype) | {"index": shard(index, "batch", None, None, None)}

    def _masked(
        self, attended: tuple[jax.Array, jax.Array, jax.Array], index: Index, mask: AttentionMask, learns: bool
    ) -> Any:
        """What each head reads, [B, T, N, V], from queries, keys and values.

        If the indexer `learns`, also how far its choice diverges from the attention weights [B, T].
        """
        config = self.config
        (rows, length, num_heads, _), v_head_dim = attended[0].shape, attended[2].shape[3]
        head_axes = split_over("heads", num_heads)
        index_axes = split_over("heads", config.num_index_heads)

        def local(q, k, v, index_q, index_weights, index_k, mask):
            def block(carry, begin, size, first, stop):
                q_i, index_q_i, weights_i = (
                    jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (q, index_q, index_weights)
                )
                k_j, v_j = k[:, :, first:stop], v[:, :, first:stop]
                chosen = mask.allowed(begin, size, first, stop - first)
                index = _index_scores(index_q_i, weights_i, index_k[:, first:stop], index_axes)
                index = jnp.where(chosen, index, blockwise.MASKED)
                if stop - first > config.index_topk and not config.index_warmup:
                    chosen &= _largest(jax.lax.stop_gradient(index), config.index_topk)
                scores = config.scale * jnp.einsum("btnh,bnsh->bnts", q_i, k_j, preferred_element_type=jnp.float32)
                weights = jax.nn.softmax(jnp.where(chosen[:, None], scores, blockwise.MASKED), axis=-1)
                weights = jnp.where(chosen[:, None], weights, 0)  # where nothing is seen: not 1/S each
                y = jnp.einsum("bnts,bnsv->bntv", weights.astype(v.dtype), v_j)[:, :, None]
                if not learns:
                    return carry, (y,)
                target = jax.lax.stop_gradient(weights.sum(1))
                target = (jax.lax.psum(target, head_axes) if head_axes else target) / num_heads
                log_choice = jax.nn.log_softmax(jnp.where(chosen, index, blockwise.MASKED), axis=-1)
                terms = jax.scipy.special.xlogy(target, target) - target * log_choice
                return carry, (y, jnp.where(chosen, terms, 0).sum(-1)[:, None, None])

            block = jax.checkpoint(block, static_argnums=(2, 3, 4))
            _, (y, *divergence) = blockwise.over_queries(block, (), q.shape[1], k.shape[2], mask)
            return y[:, :, 0].swapaxes(1, 2), *(x[:, 0, 0] for x in divergence)

        if not mesh_axis_sizes():
            return local(*attended, *index, mask)
        sequence = "sequence" if mask.q_index is None and splits(length) else None
        queries, keys = ("batch", sequence, "heads", None), ("batch", "heads", None, None)
        q, k, v = (shard(x, *names) for x, names in zip(attended, (queries, keys, keys), strict=True))
        index_q, index_weights, index_k = (
            shard(x, *names) for x, names in zip(index, (queries, queries[:3], ("batch", None, None)), strict=True)
        )
        shapes = (rows, length, num_heads, v_head_dim), *([(rows, length)] if learns else [])
        outs = tuple(spec(*queries[: len(shape)], shape=shape) for shape in shapes)
        arrays = q, k, v, index_q, index_weights, index_k, _on_mesh(mask, rows, length, sequence)
        y, *divergence = jax.shard_map(local, out_specs=outs)(*arrays)
        return shard(y, "batch", "sequence", "heads", None), *divergence

    def _chosen(self, latents: jax.Array, index: Index, mask: AttentionMask) -> tuple[jax.Array, AttentionMask]:
        """Of the cache, the entries that are chosen for the one query of each row, and which of them it sees."""
        count, axes = self.config.index_topk, split_over("heads", self.config.num_index_heads)

        def local(latents, index_q, index_weights, index_k, mask):
            scores = _index_scores(index_q, index_weights, index_k, axes)
            scores = jnp.where(mask.allowed(0, 1, 0, scores.shape[2]), scores, blockwise.MASKED)
            values, places = jax.lax.top_k(scores[:, 0], count)
            seen = (values > blockwise.MASKED).astype(jnp.int32)
            return jnp.take_along_axis(latents, places[:, :, None], axis=1), seen

        rows = latents.shape[0]
        if mesh_axis_sizes():
            mask = _on_mesh(mask, rows, 1, None)
            index_q, index_weights, index_k = index
            index_q, index_weights = (shard(x, "batch", None, "heads", *(None,) * (x.ndim - 3)) for x in index[:2])
            index_k, latents = (shard(x, "batch", None, None) for x in (index_k, latents))
            index = index_q, index_weights, index_k
            outs = tuple(spec("batch", *(None,) * n, shape=(rows, *(1,) * n)) for n in (2, 1))
            chosen, seen = jax.shard_map(local, out_specs=outs)(latents, *index, mask)
        else:
            chosen, seen = local(latents, *index, mask)
        # As if what it sees were its document.
        document = jnp.ones_like(mask.q_index)
        return chosen, AttentionMask(causal=False, segment_ids=document, key_segment_ids=seen)


def _index_scores(
    q: Float[Array, "b t i h"], weights: Float[Array, "b t i"], k: Float[Array, "b s h"], axes: tuple[str, ...]
) -> Float[Array, "b t s"]:
    """The indexer's scores, inside `shard_map`; `axes` of the mesh split its heads."""
    scores = jax.nn.relu(jnp.einsum("btih,bsh->btis", q, k, preferred_element_type=jnp.float32))
    scores = jnp.einsum("btis,bti->bts", scores, weights)
    return jax.lax.psum(scores, axes) if axes else scores


def _largest(scores: Float[Array, "b t s"], count: int) -> Bool[Array, "b t s"]:
    """Where the `count` largest of each row are; of equal ones the first, as `jax.lax.top_k` has it."""
    least = jax.lax.top_k(scores, count)[0][..., -1:]
    above, equal = scores > least, scores == least
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= count - above.sum(-1, keepdims=True)))


def _on_mesh(mask: AttentionMask, rows: int, length: int, sequence: str | None) -> AttentionMask:
    """The mask for queries that `sequence` may split, in zigzag order then, and keys that are whole everywhere."""
    if sequence:
        places = zigzag(jnp.arange(length)[None])
        mask = dataclasses.replace(
            mask,
            q_index=jnp.broadcast_to(places, (rows, length)),
            key_index=replicate(places)[0],
            key_segment_ids=mask.segment_ids,
        )
    split = {"q_index": sequence, "segment_ids": sequence, "key_segment_ids": None, "prefix": None}
    arrays = {name: (getattr(mask, name), axis) for name, axis in split.items()}
    return dataclasses.replace(
        mask,
        valid=None,
        dropout_key=None,
        **{name: x if x is None else shard(x, "batch", axis) for name, (x, axis) in arrays.items()},
    )
