"""Latent attention to the keys that a small indexer chooses for each query: DeepSeek sparse attention.

Training computes all scores, by blocks of queries, and masks keys that are not chosen. Decoding reads only the chosen.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.attention import blockwise
from llama_jax.nn.attention.attend import Call
from llama_jax.nn.attention.context import splits, unzigzag, zigzag
from llama_jax.nn.attention.grouped_query import Cache, empty_cache, read_cache, write_cache
from llama_jax.nn.attention.latent import LatentAttention, LatentAttentionModule
from llama_jax.nn.base import ForwardContext, Mask, check_at_least, record
from llama_jax.nn.norms import LayerNorm
from llama_jax.nn.parameters import Projection, child
from llama_jax.parallel import mesh_axis_sizes, replicate, shard, spec, split_over

# The indexer's queries [B, T, I, H], the weight of each of its heads [B, T, I], and its keys [B, S, H].
type Index = tuple[jax.Array, jax.Array, jax.Array]
# Queries [B, T, N, H], keys [B, N, S, H] and values [B, N, S, V] of all heads.
type Heads = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class SparseLatentAttention(LatentAttention):
    """Latent attention to the keys that a lightning indexer chooses (DeepSeek-AI 2025, "DeepSeek-V3.2").

    The indexer learns by a separate loss: the divergence of its softmax from the attention weights, summed over the
    heads and normalised (equations 3 and 4). Its inputs are detached; neither the indexer nor the attention trains the
    other.

    num_index_heads: heads of the indexer, which share one key.
    index_head_dim: size of the indexer's heads; the first qk_rope_head_dim of it are rotated.
    index_topk: largest number of keys that a query attends to.
    index_loss_weight: factor of the indexer's loss; 0 leaves the indexer as it is.
    index_warmup: attend to all keys while the indexer learns, as in the first stage of its training.
    """

    num_index_heads: int
    index_head_dim: int
    index_topk: int
    index_loss_weight: float = 0.0
    index_warmup: bool = False
    has_scores = False  # the indexer knows of no bias

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        # The proportions of DeepSeek-V3.2: latents of 12 and 4 heads, half as many heads in the indexer.
        found = super().follow(known)
        size = known.get("qk_nope_head_dim", found["qk_nope_head_dim"])
        own = {
            "num_index_heads": max(1, found["num_heads"] // 2),
            "index_head_dim": max(size, found["qk_rope_head_dim"]),
        }
        own["index_topk"] = min(2048, known.get("max_positions", 2048))
        return found | own | {"q_lora_rank": 12 * size}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_lora_rank is None:
            raise UserError("q_lora_rank=None leaves the indexer without the latent that its queries are made of")
        check_at_least(self, 1, "num_index_heads", "index_topk")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise UserError(
                f"index_head_dim={self.index_head_dim} must be at least qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        check_at_least(self, 0, "index_loss_weight")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "SparseLatentAttentionModule":
        return SparseLatentAttentionModule(self, width, rngs=rngs)

    def score_flops(self, num_keys: float) -> float:
        num_chosen = num_keys if self.index_warmup else min(num_keys, self.index_topk)
        return super().score_flops(num_chosen) + 2 * self.num_index_heads * self.index_head_dim * num_keys


class Indexer(nnx.Module):
    """The indexer, whose score of a key is the sum over heads of weight * relu(q . k) (equation 1)."""

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
        self, x: Float[Array, "b t d"], query_latents: Float[Array, "b t c"], positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t i h"], Float[Array, "b t i"]]:
        """Return the queries, and the float32 weight of each head."""
        scale = (self.config.num_index_heads * self.config.index_head_dim) ** -0.5
        head_weights = self.weights_proj(x.astype(jnp.float32)) * scale
        return self._rotate(self.q_proj(query_latents), positions), head_weights

    def keys(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        """Return the key of each token, which all heads share."""
        return self._rotate(self.k_norm(self.k_proj(x))[:, :, None], positions)[:, :, 0]

    def _rotate(self, x: Float[Array, "b t n h"], positions: Int[Array, "b t"]) -> Float[Array, "b t n h"]:
        if (rope := self.config.rope) is None:
            return x
        return dataclasses.replace(rope, rotary_dim=self.config.qk_rope_head_dim).rotate(x, positions)


class SparseLatentAttentionModule(LatentAttentionModule):
    """Latent attention with an indexer; its cache also has the indexer's keys, `index` [B, 1, S, H]."""

    config: SparseLatentAttention

    def __init__(self, config: SparseLatentAttention, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.indexer = Indexer(config, width, rngs=child(rngs, "indexer"))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # a mixer may return auxiliary arrays, too
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None, dict[str, jax.Array]]:
        """Map [B, T, D] to [B, T, D]; the auxiliary `loss.indexer` is what the indexer learns from, in training."""
        if ctx.kernel not in ("auto", "reference", "blockwise"):
            raise UserError(f"attention_kernel={ctx.kernel!r} cannot do sparse attention: take auto")
        if ctx.position_bias is not None:
            raise UserError("sparse attention takes no bias of the scores: set position_bias to none")
        query_latents = self.query_latents(x)
        q, latents = self.queries(query_latents, positions), self.latents(x, positions)
        x_detached, query_latents = jax.lax.stop_gradient((x, query_latents))
        index_k = self.indexer.keys(x_detached, positions)
        if cache is not None:
            cache = write_cache(cache, {"latent": latents[:, None], "index": index_k[:, None]}, ctx.cache_start)
            latents, index_k = (found[:, 0] for found in read_cache(cache, ("latent", "index"), x.dtype))
        learns = cache is None and self.config.index_loss_weight > 0
        if not learns and (latents.shape[1] <= self.config.index_topk or self.config.index_warmup):
            # All keys are chosen: the indexer is not needed.
            return self.o_proj(self.attended(q, latents, ctx, decoding=cache is not None)), cache, {}
        index = *self.indexer.queries(x_detached, query_latents, positions), index_k
        if cache is not None and x.shape[1] == 1:
            chosen, mask = choose_entries(latents, index, ctx.mask, self.config)
            return self.o_proj(self.on_latents(q, chosen, ForwardContext(mask))), cache, {}
        y, *divergence = sparse_attention(self.expand(q, latents), index, ctx.mask, self.config, learns=learns)
        aux: dict[str, jax.Array] = {}
        if learns:
            aux["loss.indexer"] = self.config.index_loss_weight * ctx.mean_of_rows(ctx.row_means(divergence[0]))
        return self.o_proj(y), cache, aux

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
        index = empty_cache({"index": (batch, 1, length, self.config.index_head_dim)}, dtype)
        return super().init_cache(batch, length, dtype) | index


def sparse_attention(
    heads: Heads, index: Index, mask: Mask, config: SparseLatentAttention, *, learns: bool
) -> tuple[jax.Array, ...]:
    """Return what each head reads of the chosen keys, [B, T, N, V].

    If the indexer `learns`, also return the divergence of its choice from the attention weights, [B, T].
    """
    chosen = lambda: chosen_keys(index, mask, config)  # noqa: E731
    record("attend", lambda: Call(*heads, ForwardContext(mask), config.scale, None, 0.0, chosen()))
    (rows, length, num_heads, _), v_head_dim = heads[0].shape, heads[2].shape[3]
    local = functools.partial(
        _sparse_attention,
        config=config,
        learns=learns,
        num_heads=num_heads,
        head_axes=split_over("heads", num_heads),
        index_axes=split_over("heads", config.num_index_heads),
    )
    if not mesh_axis_sizes():
        return local(heads, index, mask)
    sequence = "sequence" if mask.query_places is None and splits(length) else None
    queries, keys = ("batch", sequence, "heads", None), ("batch", "heads", None, None)
    heads = _sharded(heads, queries, keys, keys)
    index = _sharded(index, queries, queries[:3], ("batch", None, None))
    shapes = (rows, length, num_heads, v_head_dim), *([(rows, length)] if learns else [])
    outs = tuple(spec(*queries[: len(shape)], shape=shape) for shape in shapes)
    mask = _on_mesh(mask, rows, length, sequence)
    y, *divergence = jax.shard_map(local, out_specs=outs)(heads, index, mask)
    return shard(y, "batch", "sequence", "heads", None), *divergence


def _sparse_attention(
    heads: Heads,
    index: Index,
    mask: Mask,
    *,
    config: SparseLatentAttention,
    learns: bool,
    num_heads: int,
    head_axes: tuple[str, ...],
    index_axes: tuple[str, ...],
) -> tuple[jax.Array, ...]:
    """Compute a device's part of `sparse_attention`; mesh axes `head_axes` and `index_axes` split the heads."""
    (q, k, v), (index_q, head_weights, index_k) = heads, index

    def block(carry, begin, size: int, first: int, stop: int):
        q_i, index_q_i, weights_i = (
            jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (q, index_q, head_weights)
        )
        k_j, v_j = k[:, :, first:stop], v[:, :, first:stop]
        chosen = mask.allowed(begin, size, first, stop - first)
        index_scores = _index_scores(index_q_i, weights_i, index_k[:, first:stop], index_axes)
        index_scores = jnp.where(chosen, index_scores, blockwise.MASKED)
        if stop - first > config.index_topk and not config.index_warmup:
            chosen &= _largest(jax.lax.stop_gradient(index_scores), config.index_topk)
        scores = config.scale * jnp.einsum("btnh,bnsh->bnts", q_i, k_j, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(jnp.where(chosen[:, None], scores, blockwise.MASKED), axis=-1)
        probs = jnp.where(chosen[:, None], probs, 0)  # where nothing is allowed the softmax has made 1/S of each
        y = jnp.einsum("bnts,bnsv->bntv", probs.astype(v.dtype), v_j)[:, :, None]
        if not learns:
            return carry, (y,)
        # The target is the attention weights' mean over all heads, those of other devices included.
        target = jax.lax.stop_gradient(probs.sum(1))
        target = (jax.lax.psum(target, head_axes) if head_axes else target) / num_heads
        log_choice = jax.nn.log_softmax(jnp.where(chosen, index_scores, blockwise.MASKED), axis=-1)
        terms = jax.scipy.special.xlogy(target, target) - target * log_choice
        return carry, (y, jnp.where(chosen, terms, 0).sum(-1)[:, None, None])

    # The backward pass computes a block's scores again: all of them would be quadratic in the sequence.
    block = jax.checkpoint(block, static_argnums=(2, 3, 4))
    _, (y, *divergence) = blockwise.over_queries(block, (), q.shape[1], k.shape[2], mask)
    return y[:, :, 0].swapaxes(1, 2), *(x[:, 0, 0] for x in divergence)


def chosen_keys(index: Index, mask: Mask, config: SparseLatentAttention) -> Bool[Array, "b t s"]:
    """Return the keys that each query attends to, at once and whole on every device, in the order of the text."""
    index, mask = jax.tree.map(lambda x: replicate(unzigzag(x)), (index, mask))
    scores = _index_scores(*index, ())
    allowed = mask.allowed(0, scores.shape[1], 0, scores.shape[2])
    if config.index_warmup or scores.shape[2] <= config.index_topk:
        return jnp.broadcast_to(allowed, scores.shape)
    return allowed & _largest(jnp.where(allowed, scores, blockwise.MASKED), config.index_topk)


def choose_entries(
    latents: Float[Array, "b s r"], index: Index, mask: Mask, config: SparseLatentAttention
) -> tuple[Float[Array, "b k r"], Mask]:
    """Return the cache entries that are chosen for the one query of each row, and the mask of those it attends to."""
    local = functools.partial(
        _choose_entries, count=config.index_topk, index_axes=split_over("heads", config.num_index_heads)
    )
    if mesh_axis_sizes():
        rows, queries = latents.shape[0], ("batch", None, "heads", None)
        index = _sharded(index, queries, queries[:3], ("batch", None, None))
        outs = tuple(spec("batch", *(None,) * n, shape=(rows, *(1,) * n)) for n in (2, 1))
        local, mask = jax.shard_map(local, out_specs=outs), _on_mesh(mask, rows, 1, None)
        latents = shard(latents, "batch", None, None)
    chosen, is_allowed = local(latents, index, mask)
    # Segment ids say which of the chosen entries are allowed: 1 for the query and for those.
    segment_ids = jnp.ones_like(mask.query_places)
    return chosen, Mask(causal=False, segment_ids=segment_ids, key_segment_ids=is_allowed)


def _choose_entries(
    latents: jax.Array, index: Index, mask: Mask, *, count: int, index_axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    scores = _index_scores(*index, index_axes)
    scores = jnp.where(mask.allowed(0, 1, 0, scores.shape[2]), scores, blockwise.MASKED)
    values, places = jax.lax.top_k(scores[:, 0], count)
    return jnp.take_along_axis(latents, places[:, :, None], axis=1), (values > blockwise.MASKED).astype(jnp.int32)


def _index_scores(
    q: Float[Array, "b t i h"], head_weights: Float[Array, "b t i"], k: Float[Array, "b s h"], axes: tuple[str, ...]
) -> Float[Array, "b t s"]:
    """Return the indexer's scores, inside `shard_map`; `axes` of the mesh split its heads."""
    scores = jax.nn.relu(jnp.einsum("btih,bsh->btis", q, k, preferred_element_type=jnp.float32))
    scores = jnp.einsum("btis,bti->bts", scores, head_weights)
    return jax.lax.psum(scores, axes) if axes else scores


def _largest(scores: Float[Array, "b t s"], count: int) -> Bool[Array, "b t s"]:
    """Return a mask of the `count` largest of each row; of equal ones the first, as `jax.lax.top_k` has it."""
    least = jax.lax.top_k(scores, count)[0][..., -1:]
    above, equal = scores > least, scores == least
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= count - above.sum(-1, keepdims=True)))


def _sharded[Arrays: tuple[jax.Array, ...]](arrays: Arrays, *names: tuple[str | None, ...]) -> Arrays:
    return tuple(shard(x, *axes) for x, axes in zip(arrays, names, strict=True))  # type: ignore[return-value]


def _on_mesh(mask: Mask, rows: int, length: int, sequence: str | None) -> Mask:
    """Return the mask for queries that `sequence` may split, in zigzag order then, and keys whole on every device."""
    if sequence:
        places = zigzag(jnp.arange(length)[None])
        mask = dataclasses.replace(
            mask,
            query_places=jnp.broadcast_to(places, (rows, length)),
            key_places=replicate(places)[0],
            key_segment_ids=mask.segment_ids,
        )
    split = {"query_places": sequence, "segment_ids": sequence, "key_segment_ids": None, "prefix": None}
    arrays = {name: (getattr(mask, name), axis) for name, axis in split.items()}
    changes = {name: x if x is None else shard(x, "batch", axis) for name, (x, axis) in arrays.items()}
    return dataclasses.replace(mask, **changes)
