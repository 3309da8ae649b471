"""What every room below needs to know of a model, and the fields that all Transformers share."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
from flax import nnx

from llama_jax.config import Component, UserError
from llama_jax.models.block import Block
from llama_jax.models.compute import Compute
from llama_jax.models.parts import EMBEDDING_STD, HeadBias
from llama_jax.nn import FeedForward, Mixer, Norm, PositionBias, Positions, Projection, check_rate, child

# Of a sequence: int32 counts so far.
NO_LIMIT = 2**31 - 1

type Pieces = tuple[Mixer, FeedForward | None]


class ModelConfig(Component):
    """Config of a model. `batch_fields` are those it is trained on."""

    batch_fields: ClassVar[frozenset[str]]
    has_source: ClassVar[bool] = False
    """True where the model reads a source and writes a target, as encoder-decoders do."""
    joins_source: ClassVar[bool] = False
    """True where a source goes into the same row as its target (decoders)."""
    generates: ClassVar[bool] = True
    """True where the model can continue a text."""
    splits_sequence: ClassVar[bool] = True
    """True where a sequence may be split over several devices."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    tie_embeddings: bool
    # Only where `has_source`: the first token of a target, and tokens that sampling never chooses.
    decoder_start_id: int
    never_written: tuple[int, ...]

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        """Mixer and feed-forward of every layer, by stack.

        Parameters of the layers of a stack are stacked, and their names begin with the stack's: `layers.`.
        """
        raise NotImplementedError

    def layer_pieces(self) -> tuple[Pieces, ...]:
        """Mixer and feed-forward of every layer of all stacks."""
        return tuple(pieces for stack in self.stacks().values() for pieces in stack)

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """What stands around the blocks, by name."""
        raise NotImplementedError

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        """The block of a layer of `stack` with these pieces."""
        raise NotImplementedError

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Any], compute: Compute) -> nnx.Module:
        """The model of its parts and of its `Layers` by stack."""
        raise NotImplementedError

    def tokens_of(self, name: str, target_length: int, source_length: int) -> int:
        """How many tokens of a row are multiplied with the matrix `name`; 0 where it is a table."""
        part = name.partition(".")[0]
        if part.endswith(("positions", "position_bias")) or (part == "embedding" and not self.tie_embeddings):
            return 0
        return target_length + source_length

    def score_flops(self, target_length: int, source_length: int) -> float:
        """FLOPs of a row's forward pass in all layers' attention scores, causal ones counted at half."""
        return causal_score_flops([mixer for mixer, _ in self.layer_pieces()], target_length + source_length)

    @property
    def length_limit(self) -> int:
        """The longest sequence that it can be given: `max_positions`, where positions are more than distances."""
        return self.max_positions

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arguments of a call of the model, for the comparison of its logits with others'."""
        shape = (2, min(32, self.max_positions))
        return {"tokens": rng.integers(0, self.vocab_size, shape).astype(np.int32)}

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers in it."""
        pieces = [piece for layer in self.layer_pieces() for piece in layer if piece is not None]
        return getattr(self, "dropout", 0.0) > 0 or any(piece.needs_rng for piece in pieces)


def causal_score_flops(mixers: Iterable[Mixer], length: int) -> float:
    """Return the FLOPs of a row's causal scores: a token sees those before it and half of itself, half of all together,
    of which a window leaves the last."""
    return sum(
        times * sum(mixer.score_flops(place + 0.5) for place in range(length))
        for mixer, times in collections.Counter(mixers).items()
    )


def full_score_flops(mixers: Iterable[Mixer], length: int) -> float:
    """Return the FLOPs of a row's scores where every token sees both sides: itself and those before it, and as many
    places as a window has after it."""
    return sum(
        times * (2 * sum(mixer.score_flops(seen) for seen in range(1, length + 1)) - length * mixer.score_flops(1))
        for mixer, times in collections.Counter(mixers).items()
    )


@dataclasses.dataclass(frozen=True)
class LayerOverride:
    """Layers whose attention or feed-forward differs from the model's."""

    layers: tuple[int, ...]
    piece: Component


def with_overrides(pieces: Pieces, num_layers: int, overrides: tuple[LayerOverride, ...]) -> tuple[Pieces, ...]:
    """Mixer and feed-forward of every layer of a stack."""
    layers: list[Pieces] = [pieces] * num_layers
    for change in overrides:
        for i in change.layers:
            mixer, feed_forward = layers[i]
            piece = change.piece
            layers[i] = (piece, feed_forward) if isinstance(piece, Mixer) else (mixer, piece)  # type: ignore[assignment]
    return tuple(layers)


def check_overrides(
    name: str, overrides: tuple[LayerOverride, ...], num_layers: int, counted: str = "num_layers"
) -> None:
    """Raises UserError where they name layers that are not there, or hold what is no piece of a layer."""
    for change in overrides:
        for layer in change.layers:
            if not 0 <= layer < num_layers:
                raise UserError(f"{name} name layer {layer}, and {counted}={num_layers} ends at {num_layers - 1}")
        if not isinstance(change.piece, Mixer | FeedForward):
            raise UserError(f"{name} hold {change.piece!r}: it must be an attention or a feed-forward")


def check_position_bias(
    name: str, bias: PositionBias | None, attention: Mixer, overrides: tuple[LayerOverride, ...]
) -> None:
    """Raises UserError where a layer's mixer has no scores for the bias, or another number of heads."""
    if bias is None:
        return
    for mixer in (attention, *(change.piece for change in overrides if isinstance(change.piece, Mixer))):
        heads = getattr(mixer, "num_heads", None)
        if heads is None:
            raise UserError(
                f"{name} is for the scores of attention, and {type(mixer).__name__} has none: set it to none"
            )
        if heads != bias.num_heads:
            raise UserError(f"{name}.num_heads={bias.num_heads} must be the attention's num_heads={heads}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The fields that decoders, encoders and encoder-decoders share; the defaults are Llama's.

    vocab_size: tokens, special ones included.
    hidden_size: width of the residual stream.
    num_layers: blocks; of an encoder-decoder, the decoder's.
    max_positions: the longest sequence that the positions are meant for; distances alone have no end.
    attention: of every layer, or what takes its place.
    feed_forward: of every layer; none leaves it out.
    norm: of every place that has one; none leaves them out.
    tie_embeddings: whether the head is the embedding, transposed.
    overrides: layers whose attention or feed-forward differs.
    norm_placement: pre normalises what enters a sublayer, post the sum of it and the residual, sandwich what enters and
      what leaves.
    residual: whether a sublayer's result is added to what entered it, or takes its place.
    positions: added to the embeddings, or none.
    position_bias: added to the attention scores of all layers, or none.
    embedding_norm: after the embeddings, or none.
    embedding_scale: what embeddings are multiplied by.
    dropout: of the embeddings' sum and of what every sublayer returns, in training.
    logit_scale: what logits are multiplied by.
    logit_softcap: c makes logits c tanh(logits / c).
    head_bias: added to the logits; a fixed one is loaded and not trained.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    attention: Mixer
    feed_forward: FeedForward | None
    norm: Norm | None
    tie_embeddings: bool
    overrides: tuple[LayerOverride, ...] = ()
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    residual: bool = True
    positions: Positions | None = None
    position_bias: PositionBias | None = None
    embedding_norm: Norm | None = None
    embedding_scale: float = 1.0
    dropout: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: Literal["none", "trained", "fixed"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        check_rate("dropout", self.dropout)
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise UserError(f"logit_softcap={self.logit_softcap} must be above 0, or none")
        if self.norm is None and self.norm_placement != "pre":
            raise UserError(f"norm_placement={self.norm_placement!r} needs a norm")
        check_overrides("overrides", self.overrides, self.num_layers)
        check_position_bias("position_bias", self.position_bias, self.attention, self.overrides)
        limit = None if self.positions is None else self.positions.limit
        if limit is not None and self.max_positions > limit:
            raise UserError(f"max_positions={self.max_positions} is more than the {limit} that positions have")

    @property
    def length_limit(self) -> int:
        biased = self.position_bias is not None and self.positions is None
        if biased and all(getattr(mixer, "rope", None) is None for mixer, _ in self.layer_pieces()):
            return NO_LIMIT
        return self.max_positions

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        return {"layers": with_overrides((self.attention, self.feed_forward), self.num_layers, self.overrides)}

    def embedding_parts(self, *, rngs: nnx.Rngs, prefix: str = "") -> dict[str, nnx.Module]:
        """What lies between the tokens' embedding and the first block of a stack."""
        parts: dict[str, nnx.Module] = {}
        if self.positions is not None:
            name = f"{prefix}positions"
            parts[name] = self.positions.build(self.hidden_size, rngs=child(rngs, name))
        name = f"{prefix}position_bias"
        if (bias := getattr(self, name)) is not None:
            parts[name] = bias.build(rngs=child(rngs, name))
        if self.embedding_norm is not None:
            name = f"{prefix}embedding_norm"
            parts[name] = self.embedding_norm.build(self.hidden_size, rngs=child(rngs, name))
        return parts

    def final_norm(self, *, rngs: nnx.Rngs, prefix: str = "") -> dict[str, nnx.Module]:
        """The norm after the last block of a stack, which blocks that end with a norm make superfluous."""
        if self.norm is None or self.norm_placement == "post":
            return {}
        return {f"{prefix}norm": self.norm.build(self.hidden_size, rngs=child(rngs, f"{prefix}norm"))}

    def head_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """What makes logits, where it is not the embedding."""
        parts: dict[str, nnx.Module] = {}
        if not self.tie_embeddings:
            parts["lm_head"] = Projection(
                {"embed": self.hidden_size},
                {"vocab": self.vocab_size},
                bias=False,
                rngs=child(rngs, "lm_head"),
                std=EMBEDDING_STD,
            )
        if self.head_bias != "none":
            trained = self.head_bias == "trained"
            parts["head_bias"] = HeadBias(self.vocab_size, trained=trained, rngs=child(rngs, "head_bias"))
        return parts

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        del stack
        return Block(self, *pieces, rngs=rngs)
