"""Who may attend to whom, as one small value instead of a dense matrix."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q_index", "segment_ids"], meta_fields=["causal", "kernel"]
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Made only by the model; mixers hand it on to `attend`, whole.

    `q_index` [B, T] is where each query stands among the keys; None when query t stands at key t. `segment_ids` [B, T]
    forbid attention between different documents of a packed row. `kernel` names the attention kernel of the run.
    """

    causal: bool = True
    # Arrays or None; Any because JAX also rebuilds the tree with placeholders.
    q_index: Any = None
    segment_ids: Any = None
    kernel: str = "auto"

    def allowed(self, queries: slice, first_key: int | Array, num_keys: int) -> Bool[Array, "#b t s"]:
        """Dense mask of a block of queries against `num_keys` keys from `first_key` on, which may be traced."""
        key_index = first_key + jnp.arange(num_keys)
        if self.q_index is None:
            q_index = jnp.arange(queries.start, queries.stop)[None]
        else:
            q_index = self.q_index[:, queries]
        if self.causal:
            allowed = key_index <= q_index[..., None]
        else:
            allowed = jnp.ones((*q_index.shape, num_keys), bool)
        if self.segment_ids is not None:
            keys = jax.lax.dynamic_slice_in_dim(self.segment_ids, first_key, num_keys, axis=1)
            allowed &= self.segment_ids[:, queries, None] == keys[:, None]
        return allowed
