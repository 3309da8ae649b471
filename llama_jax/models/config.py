"""Configs: the interface of all models, the fields that Transformers share, and how a model is computed."""

import abc
import collections
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config import Component, UserError
from llama_jax.nn import (
    EMBEDDING_STD,
    KERNELS,
    Embedding,
    FeedForward,
    HeadBias,
    LoRA,
    Mixer,
    Norm,
    PositionBias,
    Positions,
    Projection,
    check_at_least,
    check_rate,
    child,
)
from llama_jax.parallel import platform

# The largest length of a sequence: int32 counts as far.
NO_LIMIT = 2**31 - 1

LOSS_TOKENS = 2048  # of a device, whose logits exist at a time

type Pieces = tuple[Mixer, FeedForward | None]


def loss_chunks(chunk: int | None, rows: int, length: int, platform: str) -> int:
    """Return in how many chunks a device computes the loss of its rows; `chunk` is `Compute.loss_chunk`.

    The sum of the head's gradient is read and written for each chunk. On accelerators that takes as long as its product
    for 660 (v5p) to 2,240 tokens (v6e), by their FLOP/s and bytes/s.
    """
    if chunk is None:
        chunk = 128 if platform == "cpu" else max(1, LOSS_TOKENS >> (rows - 1).bit_length())
    return -(-length // chunk)


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution options of a run; they change nothing of what a model computes, beyond rounding.

    dtype: type of activations; auto is bfloat16 on TPU and GPU, float32 on CPU. Softmax, norms and loss stay float32.
    scan_layers: compile the repeating pattern of layers once and scan over it; off is faster on CPU.
    remat: what the backward pass computes again: none of it, a full layer, all but dots (products with weights), all
      but attention outputs, all but these and the projections of grouped-query attention; offload keeps the latter two,
      the inputs of layers and one of a gated feed-forward's two products in the memory of the host.
    attention_kernel: kernel by name (reference, blockwise, splash on TPU, cudnn on GPU), or auto.
    context: how keys and values reach the other parts of a sequence split over mesh.context; all_gather is sooner
      there, and holds all of them on every device.
    preflight: check before the first step that no piece of the model sees later tokens or returns what it must not, and
      that the attention kernel agrees with the reference; do not start otherwise.
    pipeline_microbatches: parts of a batch that go through the stages of mesh.pipeline one after another, a multiple of
      these; none takes four for each stage, or as many as the rows allow.
    pipeline_repeats: how often each part goes around the stages (the circular schedule), through as many parts of a
      stage's layers: less idle time, more sent.
    loss_chunk: positions of each row whose logits exist at a time in the loss; none takes 128 on CPU, elsewhere up to
      2,048 tokens of a device.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "projections", "attention", "offload"] = "none"
    attention_kernel: str = "auto"
    context: Literal["ring", "all_gather"] = "ring"
    pipeline_microbatches: int | None = None
    pipeline_repeats: int = 1
    loss_chunk: int | None = None
    preflight: bool = True

    def __post_init__(self) -> None:
        if self.attention_kernel != "auto" and self.attention_kernel not in KERNELS:
            raise UserError(
                f"attention_kernel={self.attention_kernel!r} does not exist: the kernels are auto, {', '.join(KERNELS)}"
            )
        check_at_least(self, 1, "pipeline_repeats", "loss_chunk", "pipeline_microbatches")

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The activation type, with auto resolved for the platform of the mesh."""
        name = self.dtype
        if name == "auto":
            name = "float32" if platform() == "cpu" else "bfloat16"
        return jnp.dtype(name)


class ModelConfig(Component):
    """Config of a model. `batch_fields` are the fields of a batch that it is trained on."""

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
    adapters: LoRA | None = None
    # Only where `has_source`: the first token of a target, and tokens that sampling never chooses.
    decoder_start_id: int
    never_written: tuple[int, ...]

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        """Return mixer and feed-forward of every layer, by stack.

        Parameters of the layers of a stack are stacked, and their names begin with the stack's: `layers.`.
        """
        raise NotImplementedError

    def layer_pieces(self) -> tuple[Pieces, ...]:
        """Return mixer and feed-forward of every layer of all stacks."""
        return tuple(pieces for stack in self.stacks().values() for pieces in stack)

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Return the modules before and after the blocks, by name."""
        raise NotImplementedError

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return the block of a layer of `stack` with these pieces."""
        raise NotImplementedError

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Any], compute: Compute) -> nnx.Module:
        """Return the model of its parts and of its `Layers` by stack."""
        raise NotImplementedError

    def tokens_of(self, name: str, target_length: int, source_length: int) -> int:
        """Return how many tokens of a row are multiplied with the matrix `name`; 0 where it is a table."""
        part = name.partition(".")[0]
        if part.endswith(("positions", "position_bias")) or (part == "embedding" and not self.tie_embeddings):
            return 0
        return target_length + source_length

    def score_flops(self, target_length: int, source_length: int) -> float:
        """Return the FLOPs of a row's forward pass in all layers' attention scores, causal ones counted at half."""
        return causal_score_flops([mixer for mixer, _ in self.layer_pieces()], target_length + source_length)

    @property
    def length_limit(self) -> int:
        """The longest sequence that the model takes: `max_positions`, where positions are more than distances."""
        return self.max_positions

    @property
    def position_limit(self) -> int | None:
        """The number of positions of the model's table; None where a formula (rotary, sines) gives any position."""
        return None

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return arguments of a call of the model, for the comparison of its logits with those of other code."""
        shape = (2, min(32, self.max_positions))
        return {"tokens": rng.integers(0, self.vocab_size, shape).astype(np.int32)}

    @property
    def needs_rng(self) -> bool:
        """True where training draws random numbers in it."""
        pieces = [piece for layer in self.layer_pieces() for piece in layer if piece is not None]
        rates = getattr(self, "dropout", 0.0), 0.0 if self.adapters is None else self.adapters.dropout
        return max(rates) > 0 or any(piece.needs_rng for piece in pieces)


def causal_score_flops(mixers: Iterable[Mixer], length: int) -> float:
    """Return the FLOPs of a row's causal scores.

    A token's keys are those before it and half of itself: half of all pairs, of which a window leaves the last.
    """
    return sum(
        times * sum(mixer.score_flops(place + 0.5) for place in range(length))
        for mixer, times in collections.Counter(mixers).items()
    )


def full_score_flops(mixers: Iterable[Mixer], length: int) -> float:
    """Return the FLOPs of a row's scores where every token attends to both sides.

    Its keys are itself and those before it, and as many after it as a window has.
    """
    return sum(
        times * (2 * sum(mixer.score_flops(keys) for keys in range(1, length + 1)) - length * mixer.score_flops(1))
        for mixer, times in collections.Counter(mixers).items()
    )


def repeating_pattern(pieces: Sequence[Hashable]) -> tuple[int, int]:
    """Return (leading, period): after `leading` layers the rest repeats every `period`, with the smallest sum."""
    total = len(pieces)
    best = (total, 0)
    for leading in range(total):
        rest = pieces[leading:]
        for period in range(1, len(rest) // 2 + 1):
            repeats = len(rest) % period == 0 and all(rest[i] == rest[i % period] for i in range(len(rest)))
            if repeats and leading + period < sum(best):
                best = (leading, period)
    return best


@dataclasses.dataclass(frozen=True)
class LayerOverride:
    """Layers whose attention or feed-forward differs from the model's."""

    layers: tuple[int, ...]
    piece: Component


def with_overrides(pieces: Pieces, num_layers: int, overrides: tuple[LayerOverride, ...]) -> tuple[Pieces, ...]:
    """Return mixer and feed-forward of every layer of a stack."""
    layers: list[Pieces] = [pieces] * num_layers
    for change in overrides:
        for i in change.layers:
            mixer, feed_forward = layers[i]
            piece = change.piece
            layers[i] = (piece, feed_forward) if isinstance(piece, Mixer) else (mixer, piece)  # type: ignore[assignment]
    return tuple(layers)


def check_hashable(config: Any) -> None:
    """Raise UserError where a piece of a config, which is a key of compiled programs, has no hash."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            hash(value)
        except TypeError as error:
            raise UserError(
                f"{field.name}={type(value).__name__} cannot be hashed ({error}): make its class a frozen dataclass "
                "whose fields are numbers, texts, tuples or other such classes"
            ) from None


def check_overrides(
    name: str, overrides: tuple[LayerOverride, ...], num_layers: int, counted: str = "num_layers"
) -> None:
    """Raise UserError where overrides name layers that do not exist, or hold no piece of a layer."""
    for change in overrides:
        for layer in change.layers:
            if not 0 <= layer < num_layers:
                raise UserError(f"{name} name layer {layer}, and {counted}={num_layers} ends at {num_layers - 1}")
        if not isinstance(change.piece, Mixer | FeedForward):
            raise UserError(f"{name} hold {change.piece!r}: it must be an attention or a feed-forward")


def check_position_bias(
    name: str, bias: PositionBias | None, attention: Mixer, overrides: tuple[LayerOverride, ...]
) -> None:
    """Raise UserError where a layer's mixer has no scores for the bias, or another number of heads."""
    if bias is None:
        return
    for mixer in (attention, *(change.piece for change in overrides if isinstance(change.piece, Mixer))):
        heads = getattr(mixer, "num_heads", None) if mixer.has_scores else None
        if heads is None:
            raise UserError(
                f"{name} is for the scores of attention, and {type(mixer).__name__} has none that take it: "
                "set it to none"
            )
        if heads != bias.num_heads:
            raise UserError(f"{name}.num_heads={bias.num_heads} must be the attention's num_heads={heads}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(ModelConfig, abc.ABC):
    """The fields that decoders, encoders and encoder-decoders share; the defaults are Llama's.

    vocab_size: number of tokens, special ones included.
    hidden_size: width of the residual stream.
    num_layers: number of blocks; of an encoder-decoder, the decoder's.
    max_positions: the longest sequence that the positions are meant for; distances alone have no end.
    attention: attention of every layer, or another mixer.
    feed_forward: feed-forward of every layer, or none.
    norm: norm of every place that has one, or none.
    tie_embeddings: use the embedding, transposed, as the head.
    overrides: layers whose attention or feed-forward differs.
    norm_placement: pre normalises what enters a sublayer, output what leaves it (OLMo 2), sandwich both, post the sum
      of its result and the residual.
    parallel: attention and feed-forward read the same input, after one norm or each after its own (Wang and Komatsuzaki
      2021), or none: the feed-forward reads the attention's sum.
    residual: add a sublayer's result to what entered it, or replace that.
    residual_scale: factor of every sublayer's result.
    positions: positions added to the embeddings, or none.
    position_bias: bias added to the attention scores of all layers, or none.
    embedding_norm: norm after the embeddings, or none.
    embedding_scale: factor of the embeddings.
    dropout: rate on the embeddings' sum and on the result of every sublayer, in training.
    logit_scale: factor of the logits.
    logit_softcap: c makes logits c tanh(logits / c).
    head_bias: bias added to the logits; a fixed one is loaded and not trained.
    adapters: train low-rank adapters of projections and nothing else, or none to train all.
    """

    sides: ClassVar[tuple[str, ...]] = ("",)
    """Beginnings of the names of parts, one for each stack: `encoder_` for an encoder-decoder's first."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    attention: Mixer
    feed_forward: FeedForward | None
    norm: Norm | None
    tie_embeddings: bool
    overrides: tuple[LayerOverride, ...] = ()
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    parallel: Literal["none", "one_norm", "own_norms"] = "none"
    residual: bool = True
    residual_scale: float = 1.0
    positions: Positions | None = None
    position_bias: PositionBias | None = None
    embedding_norm: Norm | None = None
    embedding_scale: float = 1.0
    dropout: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: Literal["none", "trained", "fixed"] = "none"
    adapters: LoRA | None = None

    def __post_init__(self) -> None:
        check_hashable(self)
        check_at_least(self, 1, "vocab_size", "hidden_size", "num_layers", "max_positions")
        check_rate("dropout", self.dropout)
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise UserError(f"logit_softcap={self.logit_softcap} must be above 0, or none")
        if self.norm is None and self.norm_placement != "pre":
            raise UserError(f"norm_placement={self.norm_placement!r} needs a norm")
        if self.parallel != "none" and not (self.norm_placement == "pre" and self.residual):
            raise UserError(f"parallel={self.parallel!r} needs norm_placement='pre' and a residual")
        check_overrides("overrides", self.overrides, self.num_layers)
        check_position_bias("position_bias", self.position_bias, self.attention, self.overrides)
        if (limit := self.position_limit) is not None and self.max_positions > limit:
            raise UserError(f"max_positions={self.max_positions} is more than the {limit} that positions have")

    @property
    def position_limit(self) -> int | None:
        return None if self.positions is None else self.positions.limit

    @property
    def length_limit(self) -> int:
        biased = self.position_bias is not None and self.positions is None
        if biased and all(getattr(mixer, "rope", None) is None for mixer, _ in self.layer_pieces()):
            return NO_LIMIT
        return self.max_positions

    @abc.abstractmethod
    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Any], compute: Compute) -> nnx.Module: ...

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        return {"layers": with_overrides((self.attention, self.feed_forward), self.num_layers, self.overrides)}

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        width = self.hidden_size
        parts: dict[str, nnx.Module] = {"embedding": Embedding(self.vocab_size, width, rngs=child(rngs, "embedding"))}
        for side in self.sides:
            positions, bias, embedding_norm, norm = (
                f"{side}{name}" for name in ("positions", "position_bias", "embedding_norm", "norm")
            )
            if self.positions is not None:
                parts[positions] = self.positions.build(width, rngs=child(rngs, positions))
            if (bias_config := getattr(self, bias)) is not None:
                parts[bias] = bias_config.build(rngs=child(rngs, bias))
            if self.embedding_norm is not None:
                parts[embedding_norm] = self.embedding_norm.build(width, rngs=child(rngs, embedding_norm))
            # Blocks that end with a norm make one after the last of them superfluous.
            if self.norm is not None and self.norm_placement != "post":
                parts[norm] = self.norm.build(width, rngs=child(rngs, norm))
        if not self.tie_embeddings:
            dims = {"embed": width}, {"vocab": self.vocab_size}
            parts["lm_head"] = Projection(*dims, bias=False, rngs=child(rngs, "lm_head"), std=EMBEDDING_STD)
        if self.head_bias != "none":
            trained = self.head_bias == "trained"
            parts["head_bias"] = HeadBias(self.vocab_size, trained=trained, rngs=child(rngs, "head_bias"))
        return parts
