"""The encoder-decoder: a source is encoded once, and a decoder that attends to it writes the target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.models.config import (
    Compute,
    LayerOverride,
    Pieces,
    TransformerConfig,
    causal_score_flops,
    check_overrides,
    check_position_bias,
    full_score_flops,
    with_overrides,
)
from llama_jax.models.model import Batch, LossTerm, Transformer
from llama_jax.models.stack import Aux, Block, Layers
from llama_jax.nn import CrossAttention, ForwardContext, Mask, PositionBias, PyTree, check_at_least, check_rate, dropout
from llama_jax.parallel import mesh_axis_sizes, shard

Cache = dict[str, PyTree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """A model that reads a source and writes a target (Vaswani et al. 2017).

    Encoder and decoder share the embedding, and the kind of everything else. max_positions is for each of them.

    num_encoder_layers: number of blocks of the encoder.
    cross_attention: attention of every layer of the decoder to the encoder's results.
    decoder_start_id: first token of the decoder's inputs.
    encoder_overrides: layers of the encoder whose attention or feed-forward differs.
    encoder_position_bias: bias added to the encoder's attention scores, or none; position_bias is the decoder's alone.
    final_dropout: rate on the results of the last block of either, in training.
    never_written: tokens that sampling does not choose, whatever their logits.
    """

    batch_fields = frozenset(
        ("tokens", "targets", "weights", "positions", "segment_ids", "source_tokens", "source_positions")
    )
    has_source = True
    splits_sequence = False
    sides = ("encoder_", "")

    num_encoder_layers: int
    cross_attention: CrossAttention
    decoder_start_id: int
    encoder_overrides: tuple[LayerOverride, ...] = ()
    encoder_position_bias: PositionBias | None = None
    final_dropout: float = 0.0
    never_written: tuple[int, ...] = ()

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"num_encoder_layers": known.get("num_layers"), "cross_attention": known.make(CrossAttention)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_encoder_layers")
        if self.parallel != "none":
            raise UserError(f"parallel={self.parallel!r} is not there for a decoder that attends to a source")
        check_overrides("encoder_overrides", self.encoder_overrides, self.num_encoder_layers, "num_encoder_layers")
        bias, overrides = self.encoder_position_bias, self.encoder_overrides
        check_position_bias("encoder_position_bias", bias, self.attention, overrides)
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise UserError(f"decoder_start_id={self.decoder_start_id} is outside of vocab_size={self.vocab_size}")
        check_rate("final_dropout", self.final_dropout)
        if not set(self.never_written) < set(range(self.vocab_size)):
            raise UserError(f"never_written={self.never_written} must be ids below vocab_size={self.vocab_size}")

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        pieces = self.attention, self.feed_forward
        return {
            "encoder_layers": with_overrides(pieces, self.num_encoder_layers, self.encoder_overrides),
            "layers": with_overrides(pieces, self.num_layers, self.overrides),
        }

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        return Block(self, pieces, cross_attention=self.cross_attention if stack == "layers" else None, rngs=rngs)

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute) -> Transformer:
        return EncoderDecoder(self, parts, stacks, compute)

    def tokens_of(self, name: str, target_length: int, source_length: int) -> int:
        of_source = name.startswith(("encoder_", "layers.cross_attention.k_proj", "layers.cross_attention.v_proj"))
        lengths = (0, source_length) if of_source else (target_length, 0)
        return super().tokens_of(name, *lengths)

    def score_flops(self, target_length: int, source_length: int) -> float:
        encoder, decoder = self.stacks().values()
        return (
            full_score_flops([mixer for mixer, _ in encoder], source_length)
            + causal_score_flops([mixer for mixer, _ in decoder], target_length)
            + target_length * len(decoder) * self.cross_attention.score_flops(source_length)
        )

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length = min(32, self.max_positions)
        shapes = {"source": (2, length), "target": (2, max(1, length - 3))}
        return {name: rng.integers(0, self.vocab_size, shape).astype(np.int32) for name, shape in shapes.items()}

    @property
    def needs_rng(self) -> bool:
        return super().needs_rng or self.cross_attention.needs_rng or self.final_dropout > 0


class EncoderDecoder(Transformer):
    """Source and target to the target's logits. Made by `assemble` from parameters by name, or by `build`.

    Sources are [B, S], targets [B, T]. Segment ids separate documents of packed rows, and are 0 at padding: a document
    of the target attends to the source of the same number.
    """

    inputs = ("source", "target", "source_mask")
    encoder_layers: Layers
    layers: Layers
    config: EncoderDecoderConfig

    def encode(
        self,
        source: Int[Array, "b s"],
        *,
        positions: Int[Array, "b s"] | None = None,
        segment_ids: Int[Array, "b s"] | None = None,
        key: jax.Array | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b s d"], Aux]:
        """Return the hidden states that the decoder attends to, and the encoder's auxiliary arrays.

        Positions default to 0, 1, 2... `key` is for dropout; the results of all blocks are appended to `outputs`.
        """
        mask = Mask(causal=False, segment_ids=segment_ids)
        encoded, _, aux = self.run_stack(source, positions, mask, side="encoder_", key=key, outputs=outputs)
        return encoded, aux

    def decode(
        self,
        target: Int[Array, "b t"],
        encoded: Float[Array, "b s d"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        source_segment_ids: Int[Array, "b s"] | None = None,
        key: jax.Array | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Return the target's final hidden states, and the decoder's auxiliary arrays; arguments as for `encode`.

        Without the source's segment ids targets attend to all of it.
        """
        source = encoded, self._source_context(target, segment_ids, source_segment_ids)
        mask = Mask(segment_ids=segment_ids)
        hidden, _, aux = self.run_stack(target, positions, mask, source=source, key=key, outputs=outputs)
        return hidden, aux

    def final(self, x: Float[Array, "b t d"], ctx: ForwardContext, *, side: str = "") -> Float[Array, "b t d"]:
        return dropout(super().final(x, ctx, side=side), self.config.final_dropout, ctx, f"{side}final")

    def _source_context(
        self, target: jax.Array, segment_ids: jax.Array | None, source_segment_ids: jax.Array | None
    ) -> ForwardContext:
        """Return the context of the attention from the target to the source."""
        if mesh_axis_sizes().get("context", 1) > 1:
            raise UserError(
                "mesh.context cannot split the sequences of an encoder-decoder: take 1, and more of mesh.fsdp"
            )
        if source_segment_ids is None:
            return self.context(Mask(causal=False))
        segment_ids = shard(jnp.ones_like(target), "batch", None) if segment_ids is None else segment_ids
        return self.context(Mask(causal=False, segment_ids=segment_ids, key_segment_ids=source_segment_ids))

    def __call__(
        self, source: Int[Array, "b s"], target: Int[Array, "b t"], *, source_mask: Array | None = None
    ) -> Float[Array, "b t v"]:
        """Return float32 logits of the target's every next token; `source_mask` [B, S] is false (0) at padding."""
        segment_ids = None if source_mask is None else source_mask.astype(jnp.int32)
        encoded, _ = self.encode(source, segment_ids=segment_ids)
        return self.logits(self.decode(target, encoded, source_segment_ids=segment_ids)[0])

    def hidden_states(
        self, source: Int[Array, "b s"], target: Int[Array, "b t"], *, source_mask: Array | None = None
    ) -> dict[str, list[Float[Array, "b _ d"]]]:
        """Return the results of every block for the arguments of a call, by stack."""
        outputs: dict[str, list[jax.Array]] = {"encoder_layers": [], "layers": []}
        segment_ids = None if source_mask is None else source_mask.astype(jnp.int32)
        encoded, _ = self.encode(source, segment_ids=segment_ids, outputs=outputs["encoder_layers"])
        self.decode(target, encoded, source_segment_ids=segment_ids, outputs=outputs["layers"])
        return outputs

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        source_key, target_key = (None, None) if key is None else jax.random.split(key)
        source_segment_ids = batch["source_segment_ids"]
        encoded, aux = self.encode(
            batch["source_tokens"], positions=batch["source_positions"], segment_ids=source_segment_ids, key=source_key
        )
        hidden, of_decoder = self.decode(
            batch["tokens"],
            encoded,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            source_segment_ids=source_segment_ids,
            key=target_key,
        )
        return [self.main_term(hidden, batch)], aux | of_decoder

    def init_cache(
        self,
        batch: int,
        length: int,
        dtype: DTypeLike | None = None,
        *,
        source: Int[Array, "b s"],
        source_mask: Bool[Array, "b s"],
    ) -> Cache:
        """Return the source's keys and values in every layer, and empty caches of the decoder for `length` positions.

        The source is encoded here, once; `source_mask` is false at its padding. `dtype` None is that of the
        activations.
        """
        assert not self.layers.repeated
        segment_ids = source_mask.astype(jnp.int32)
        encoded, _ = self.encode(source, segment_ids=segment_ids)
        blocks, dtype = self.layers.leading, self.compute.jax_dtype if dtype is None else dtype
        return {
            "layers": [block.attention.init_cache(batch, length, dtype) for block in blocks],
            "source": [block.cross_attention.keys(encoded) for block in blocks],
            "source_segments": segment_ids,
        }

    def extend(
        self,
        tokens: Int[Array, "b t"],
        *,
        cache: Cache,
        lengths: Int[Array, " b"],
        is_token: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Return hidden states of T more tokens in targets that hold `lengths` tokens, and the cache with them in it.

        Inputs where `is_token` is false are padding behind a row's end.
        """
        positions, ctx = self.cache_context(tokens.shape[1], cache["layers"], lengths, is_token)
        source_ctx = self._source_context(tokens, None, cache["source_segments"])
        x, new = self.embed(tokens, positions, ctx), []
        for block, own, keys in zip(self.layers.leading, cache["layers"], cache["source"], strict=True):
            x, _, own = block(x, positions=positions, ctx=ctx, cache=own, source=(keys, source_ctx))
            new.append(own)
        return self.final(x, ctx), cache | {"layers": new}
