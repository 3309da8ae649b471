"""The decoder: embedding, blocks, norm, head."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.models.config import Compute, Pieces, TransformerConfig
from llama_jax.models.model import Batch, LossTerm, Transformer
from llama_jax.models.stack import Aux, Block, Layers
from llama_jax.nn import Mask, PyTree, unzigzag, zigzag


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A causal language model."""

    batch_fields = frozenset(
        (
            *("tokens", "targets", "weights", "positions", "segment_ids", "prefix", "branch"),
            *("source_tokens", "source_positions"),
        )
    )
    joins_source = True

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        return Block(self, pieces, rngs=rngs)

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
        """Return final hidden states, and the layers' auxiliary arrays. Positions default to 0, 1, 2...

        All tokens of a document attend to those whose `prefix` is 1, tokens before them too. Where a context axis
        splits the sequence, all arrays are in zigzag order (`nn/attention/context.py`). `key` is for dropout; the
        results of all blocks are appended to `outputs`.
        """
        mask = Mask(segment_ids=segment_ids, prefix=prefix)
        hidden, _, aux = self.run_stack(tokens, positions, mask, key=key, outputs=outputs)
        return hidden, aux

    def __call__(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b t v"]:
        """Return float32 logits at every position; other arguments are `positions`, `segment_ids` and `prefix`."""
        tokens, others = jax.tree.map(zigzag, (tokens, others))
        return self.logits(unzigzag(self.trunk(tokens, **others)[0]))

    def hidden_states(self, tokens: Int[Array, "b t"], **others: Any) -> dict[str, list[Float[Array, "b t d"]]]:
        """Return the results of every block for the arguments of a call, by stack."""
        tokens, others = jax.tree.map(zigzag, (tokens, others))
        outputs: list[jax.Array] = []
        self.trunk(tokens, outputs=outputs, **others)
        return {"layers": [unzigzag(x) for x in outputs]}

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        mask = Mask(segment_ids=batch["segment_ids"], prefix=batch.get("prefix"))
        hidden, _, aux = self.run_stack(batch["tokens"], batch["positions"], mask, key=key)
        return [self.main_term(hidden, batch)], aux

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None, room: int | None = None
    ) -> list[PyTree]:
        """Return empty caches of all layers for `length` positions; `dtype` None is that of the activations.

        With `room` layers with a window keep only it, and room for so many tokens to be written at once.
        """
        size = batch, length, self.compute.jax_dtype if dtype is None else dtype
        mixers = [block.attention for block in self.layers.leading]
        if room is None or self.config.position_bias is not None:  # a bias [T, S] is of places in their order
            return [mixer.init_cache(*size) for mixer in mixers]
        return [mixer.init_window(*size, room) for mixer in mixers]

    def extend(
        self,
        tokens: Int[Array, "b t"],
        *,
        cache: list[PyTree],
        lengths: Int[Array, " b"],
        is_token: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], list[PyTree]]:
        """Return hidden states of T more tokens in rows that hold `lengths` tokens, and the cache with them in it.

        Inputs where `is_token` is false are padding behind a row's end. Layers have to be unrolled: with the cache as a
        scan output or carry decoding is up to twice as slow.
        """
        assert not self.layers.repeated
        positions, ctx = self.cache_context(tokens.shape[1], cache, lengths, is_token)
        x, new = self.embed(tokens, positions, ctx), []
        for block, layer_cache in zip(self.layers.leading, cache, strict=True):
            x, _, layer_cache = block(x, positions=positions, ctx=ctx, cache=layer_cache)
            new.append(layer_cache)
        return self.final(x, ctx), new
