"""What decoders, encoders and encoder-decoders have in common around their blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.models.block import Aux, Layers
from llama_jax.models.compute import Compute
from llama_jax.models.config import TransformerConfig
from llama_jax.nn import AttentionMask, dropout, gather, matmul
from llama_jax.parallel import axes_of, shard

type Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """Something that training takes a cross-entropy of.

    `head(hidden [B, T, D], weight)` gives float32 logits of which `targets` [B, T] should be high, where `weights`
    [B, T] are not 0. The loss has `coefficient` times the weighted mean; `name` is its name among the metrics.
    """

    name: str
    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    head: Callable[[jax.Array, Any], jax.Array]
    head_weight: Any
    coefficient: float = 1.0


class Transformer(nnx.Module):
    """Parts by name and stacks of blocks; what is computed with them is the subclass's."""

    embedding: Any

    def __init__(
        self, config: TransformerConfig, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute
    ):
        self.config, self.compute = config, compute
        self.part_names, self.stack_names = tuple(parts), tuple(stacks)
        for name, module in (parts | stacks).items():
            setattr(self, name, module)

    def part(self, name: str) -> Any:
        """A part, or None where this model has none of that name."""
        return getattr(self, name, None)

    def mask(self, **fields: Any) -> AttentionMask:
        """An attention mask with the run's kernels."""
        return AttentionMask(kernel=self.compute.attention_kernel, context=self.compute.context, **fields)

    def embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        mask: AttentionMask,
        *,
        prefix: str = "",
        add: Any = 0,
    ) -> Float[Array, "b t d"]:
        """What enters the first block: embeddings, and with them whatever is added to or done with them."""
        x = self.embedding(tokens, self.compute.jax_dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if (table := self.part(f"{prefix}positions")) is not None:
            x = x + table(positions, x.dtype)
        x = x + add
        if (norm := self.part(f"{prefix}embedding_norm")) is not None:
            x = norm(x)
        return dropout(x, self.config.dropout, mask, f"{prefix}embedding")

    def bias(self, queries: Int[Array, "#b t"], keys: Int[Array, " s"], *, prefix: str = "") -> jax.Array | None:
        """The bias of the attention scores between these places, [1 or B, N, T, S]."""
        part = self.part(f"{prefix}position_bias")
        return None if part is None else part(queries, keys)

    def cache_mask(
        self, length: int, cache: list[Any], lengths: Int[Array, " b"], valid: Bool[Array, "b t"] | None
    ) -> tuple[Int[Array, "b t"], AttentionMask]:
        """Where `length` more tokens stand in rows that hold `lengths` already, and who of these caches they see."""
        index, bias = lengths[:, None] + jnp.arange(length), None
        if self.part("position_bias") is not None:
            places = max(x.shape[2] for x in jax.tree.leaves(cache) if x.ndim == 4)  # keys are [B, K, S, H]
            bias = self.bias(index, jnp.arange(places))
        return index, self.mask(q_index=index, valid=valid, bias=bias)

    def normed(self, x: Float[Array, "b t d"], *, prefix: str = "") -> Float[Array, "b t d"]:
        """What leaves the last block, normalised where the blocks do not end with a norm."""
        norm = self.part(f"{prefix}norm")
        return x if norm is None else norm(x)

    def head_weight(self) -> Any:
        """What `head` multiplies with, as it is stored: [V, D] where tied, else [D, V]; transposing would copy it."""
        lm_head = self.part("lm_head")
        weight = (self.embedding if lm_head is None else lm_head).weight[...].astype(self.compute.jax_dtype)
        if (head_bias := self.part("head_bias")) is None:
            return weight
        bias = head_bias.bias[...]
        if axes_of(weight)[0 if lm_head is None else 1]:
            bias = shard(bias, "vocab")  # a fixed one is stored whole, and has to meet the logits' own part
        return {"weight": weight, "bias": bias}

    def head(self, hidden: Float[Array, "b t d"], weight: Any) -> Float[Array, "b t v"]:
        """float32 logits."""
        weight, bias = (weight["weight"], weight["bias"]) if isinstance(weight, dict) else (weight, None)
        tied = self.part("lm_head") is None
        weight = gather(weight, ("vocab", "embed") if tied else ("embed", "vocab"))
        logits = matmul(hidden, weight, out_axis="vocab", transposed=tied, dtype=jnp.float32)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """float32 logits of final hidden states."""
        return self.head(hidden, self.head_weight())

    def main_logits(self, **inputs: Any) -> Float[Array, "b _ c"]:
        """float32 logits of what the model is for, of the arguments of a call: those of the call itself."""
        return self(**inputs)  # type: ignore[operator]

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        """What training takes the losses of, the main one first, and the layers' auxiliary arrays.

        `key` is what dropout and the like draw from; without one there is none.
        """
        raise NotImplementedError
