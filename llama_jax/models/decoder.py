"""The decoder: embedding, blocks, norm, head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.models.block import Aux, Layers
from llama_jax.models.compute import Compute
from llama_jax.models.config import TransformerConfig
from llama_jax.models.parts import Embedding
from llama_jax.models.transformer import Batch, LossTerm, Transformer
from llama_jax.nn import AttentionMask, child, unzigzag, zigzag


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A causal language model."""

    batch_fields = frozenset(
        ("tokens", "targets", "weights", "positions", "segment_ids", "prefix", "source_tokens", "source_positions")
    )
    joins_source = True

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {
            "embedding": Embedding(self.vocab_size, self.hidden_size, rngs=child(rngs, "embedding")),
            **self.embedding_parts(rngs=rngs),
            **self.final_norm(rngs=rngs),
            **self.head_parts(rngs=rngs),
        }

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute) -> "Decoder":
        return Decoder(self, parts, stacks, compute)


class Decoder(Transformer):
    """Tokens to logits. Made by `assemble` from parameters by name, or by `build`."""

    layers: Layers

    def trunk(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        prefix: Int[Array, "b t"] | None = None,
        key: jax.Array | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Final hidden states, and the layers' auxiliary arrays. Positions default to 0, 1, 2...

        Tokens whose `prefix` is 1 are seen by all of their document, by what stands before them too. Where a context
        axis splits the sequence, all of these are in zigzag order (`nn.attention.context`). `key` is for dropout;
        `outputs` is given what every block gives.
        """
        if positions is None:
            positions = zigzag(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        mask = self.row_mask(tokens.shape[1], segment_ids=segment_ids, prefix=prefix, dropout_key=key)
        x = self.embed(tokens, positions, mask)
        x, aux = self.layers(x, positions=positions, mask=mask, remat=self.compute.remat, outputs=outputs)
        return self.normed(x), aux

    def row_mask(self, length: int, **fields: Any) -> AttentionMask:
        """The mask of whole rows."""
        places = jnp.arange(length)
        return self.mask(bias=self.bias(places[None], places), **fields)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        prefix: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """float32 logits at every position."""
        tokens, positions, segment_ids, prefix = jax.tree.map(zigzag, (tokens, positions, segment_ids, prefix))
        hidden, _ = self.trunk(tokens, positions=positions, segment_ids=segment_ids, prefix=prefix)
        return self.logits(unzigzag(hidden))

    def hidden_states(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        prefix: Int[Array, "b t"] | None = None,
    ) -> dict[str, list[Float[Array, "b t d"]]]:
        """What every block gives, by stack."""
        tokens, positions, segment_ids, prefix = jax.tree.map(zigzag, (tokens, positions, segment_ids, prefix))
        outputs: list[jax.Array] = []
        self.trunk(tokens, positions=positions, segment_ids=segment_ids, prefix=prefix, outputs=outputs)
        return {"layers": [unzigzag(x) for x in outputs]}

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        hidden, aux = self.trunk(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            prefix=batch.get("prefix"),
            key=key,
        )
        main = LossTerm("loss", hidden, batch["targets"], batch["weights"], self.head, self.head_weight())
        return [main], aux

    def init_cache(self, batch: int, length: int) -> list[Any]:
        """Empty caches of all layers for `length` positions."""
        return [block.attention.init_cache(batch, length, self.compute.jax_dtype) for block in self.layers.prefix]

    def extend(
        self,
        tokens: Int[Array, "b t"],
        *,
        cache: list[Any],
        lengths: Int[Array, " b"],
        valid: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], list[Any]]:
        """Hidden states of T more tokens in rows that hold `lengths` already, and the cache with them in it.

        What is not `valid` stands behind a row's end, and is as if it were not there. Layers have to be unrolled: with
        the cache as a scan output or carry decoding is up to twice as slow.
        """
        assert not self.layers.pattern
        index, mask = self.cache_mask(tokens.shape[1], cache, lengths, valid)
        x = self.embed(tokens, index, mask)
        new = []
        for block, layer_cache in zip(self.layers.prefix, cache, strict=True):
            x, _, layer_cache = block(x, positions=index, mask=mask, cache=layer_cache)
            new.append(layer_cache)
        return self.normed(x), new
