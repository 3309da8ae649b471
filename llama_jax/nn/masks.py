"""Who may attend to whom, as one small value instead of a dense matrix."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_index", "key_index", "segment_ids", "key_segment_ids", "prefix", "bias", "valid", "dropout_key"],
    meta_fields=["causal", "window", "kernel", "context"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Made only by the model; mixers hand it on to `attend`, whole.

    `causal` hides the keys after a query; `window` those `window` or more places away. `segment_ids` [B, T] forbid
    attention between different documents of a packed row. `prefix` [B, S] is 1 at keys that all queries of their
    document see, those before them too. `q_index` [B, T] is where each query stands among the keys; None when query t
    stands at key t. `kernel` names the attention kernel of the run, `context` how keys and values
    travel where the sequence is split. Kernels that work on tiles also say where the keys stand (`key_index` [S]) and
    which documents they are of (`key_segment_ids` [B, S]); elsewhere these are None.

    Three fields say more about the inputs than who sees whom. `bias` [1 or B, N, T, S] is added to the scaled scores
    (relative positions), in the order of the text. `valid` [B, T] is false at inputs that stand for no token, where
    `segment_ids` do not say it: ask `real()`. `dropout_key` is a random key in training, and None elsewhere.
    """

    causal: bool = True
    window: int | None = None
    # Arrays or None; Any because JAX also rebuilds the tree with placeholders.
    q_index: Any = None
    key_index: Any = None
    segment_ids: Any = None
    key_segment_ids: Any = None
    prefix: Any = None
    bias: Any = None
    valid: Any = None
    dropout_key: Any = None
    kernel: str = "auto"
    context: str = "ring"

    def real(self) -> Bool[Array, "b t"] | None:
        """Which inputs are tokens; None where all are. Others must not count, nor change a state that tokens see."""
        if self.valid is not None or self.segment_ids is None:
            return self.valid
        return self.segment_ids > 0

    def row_means(self, values: Float[Array, "b t *_"]) -> Float[Array, "b *_"]:
        """[B, T, ...] -> [B, ...], over the tokens of each row: 0 where a row has none."""
        if (real := self.real()) is None:
            return values.mean(1)
        real = real.reshape(*real.shape, *(1,) * (values.ndim - 2))
        return jnp.where(real, values, 0).sum(1) / jnp.maximum(real.sum(1), 1)

    def mean_of_rows(self, values: Float[Array, " b"]) -> Float[Array, ""]:
        """[B] -> the mean over the rows that have tokens: 0 where none has."""
        if (real := self.real()) is None:
            return values.mean()
        real = real.any(1)
        return jnp.where(real, values, 0).sum() / jnp.maximum(real.sum(), 1)

    def allowed(
        self, first_query: int | Array, num_queries: int, first_key: int | Array, num_keys: int
    ) -> Bool[Array, "#b t s"]:
        """Dense mask of a block of queries against a block of keys; where they begin may be traced."""

        def queries(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first_query, num_queries, axis=1)[..., None]

        def keys(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first_key, num_keys, axis=axis)

        key_index = first_key + jnp.arange(num_keys) if self.key_index is None else keys(self.key_index, 0)
        if self.q_index is None:
            q_index = (first_query + jnp.arange(num_queries))[None, :, None]
        else:
            q_index = queries(self.q_index)
        allowed = key_index <= q_index if self.causal else jnp.ones((*q_index.shape[:2], num_keys), bool)
        if self.prefix is not None:
            allowed |= keys(self.prefix, 1)[:, None] > 0
        if self.window is not None:
            allowed &= key_index > q_index - self.window
            if not self.causal or self.prefix is not None:
                allowed &= key_index < q_index + self.window
        if self.segment_ids is not None:
            key_segments = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
            allowed &= queries(self.segment_ids) == keys(key_segments, 1)[:, None]
        return allowed
