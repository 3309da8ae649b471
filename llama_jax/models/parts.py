"""What stands around the blocks of every model."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.nn import buffer, embed_lookup, parameter

# Of the embedding and the head: logits start near zero and the first loss near ln V.
EMBEDDING_STD = 0.02


class Embedding(nnx.Module):
    """Vectors of tokens (or of whatever else is numbered)."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "weight", (vocab_size, width), ("vocab", "embed"), std=EMBEDDING_STD)

    def __call__(self, tokens: Int[Array, "b t"], dtype: Any) -> Float[Array, "b t d"]:
        return embed_lookup(self.weight[...].astype(dtype), tokens)


class HeadBias(nnx.Module):
    """A number for each token, added to its logit; trained, or only loaded."""

    def __init__(self, vocab_size: int, *, trained: bool, rngs: nnx.Rngs):
        if trained:
            self.bias: Any = parameter(rngs, "bias", (vocab_size,), ("vocab",), std=0.0)
        else:
            self.bias = buffer(jnp.zeros(vocab_size, jnp.float32), None)
