"""The decoder: embedding, blocks, norm, head."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.config import Component, UserError
from llama_jax.models.compute import REMAT_POLICIES, Compute
from llama_jax.nn import FeedForward, Mixer, Norm
from llama_jax.nn.attention.context import unzigzag, zigzag
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.parameters import Projection, child, gather, lookup, matmul, parameter

# Of the embedding and the head: logits start near zero and the first loss near ln V.
EMBEDDING_STD = 0.02


class ModelConfig(Component):
    """Config of a model: what every room below needs to know of one. `batch_fields` are those it is trained on."""

    batch_fields: ClassVar[frozenset[str]]

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    tie_embeddings: bool

    def layer_pieces(self) -> tuple[tuple[Mixer, FeedForward], ...]:
        """Attention and feed-forward of every layer."""
        raise NotImplementedError

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """What stands around the blocks, by name."""
        raise NotImplementedError

    def build_block(self, pieces: tuple[Mixer, FeedForward], *, rngs: nnx.Rngs) -> "Block":
        """The block of a layer with these pieces."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LayerOverride:
    """Layers whose attention or feed-forward differs from the model's."""

    layers: tuple[int, ...]
    piece: Component


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A causal language model of pre-norm blocks.

    vocab_size: tokens, special ones included.
    hidden_size: width of the residual stream.
    num_layers: blocks.
    max_positions: the longest sequence that the positions are meant for.
    attention: of every layer.
    feed_forward: of every layer.
    norm: before attention, before the feed-forward and at the end.
    tie_embeddings: whether the head is the embedding, transposed.
    overrides: layers whose attention or feed-forward differs.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    attention: Mixer
    feed_forward: FeedForward
    norm: Norm
    tie_embeddings: bool
    overrides: tuple[LayerOverride, ...] = ()

    batch_fields = frozenset(
        ("tokens", "targets", "weights", "positions", "segment_ids", "prefix", "source_tokens", "source_positions")
    )

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for change in self.overrides:
            for layer in change.layers:
                if not 0 <= layer < self.num_layers:
                    raise UserError(
                        f"overrides name layer {layer}, and num_layers={self.num_layers} ends at {self.num_layers - 1}"
                    )
            if not isinstance(change.piece, Mixer | FeedForward):
                raise UserError(f"overrides hold {change.piece!r}: it must be an attention or a feed-forward")

    def layer_pieces(self) -> tuple[tuple[Mixer, FeedForward], ...]:
        layers: list[tuple[Mixer, FeedForward]] = [(self.attention, self.feed_forward)] * self.num_layers
        for change in self.overrides:
            for i in change.layers:
                mixer, feed_forward = layers[i]
                piece = change.piece
                layers[i] = (piece, feed_forward) if isinstance(piece, Mixer) else (mixer, piece)  # type: ignore[assignment]
        return tuple(layers)

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        parts: dict[str, nnx.Module] = {
            "embedding": Embedding(self.vocab_size, self.hidden_size, rngs=child(rngs, "embedding")),
            "norm": self.norm.build(self.hidden_size, rngs=child(rngs, "norm")),
        }
        if not self.tie_embeddings:
            parts["lm_head"] = Projection(
                {"embed": self.hidden_size},
                {"vocab": self.vocab_size},
                bias=False,
                rngs=child(rngs, "lm_head"),
                std=EMBEDDING_STD,
            )
        return parts

    def build_block(self, pieces: tuple[Mixer, FeedForward], *, rngs: nnx.Rngs) -> "Block":
        return Block(self, *pieces, rngs=rngs)


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "weight", (vocab_size, width), ("vocab", "embed"), std=EMBEDDING_STD)

    def __call__(self, tokens: Int[Array, "b t"], dtype: Any) -> Float[Array, "b t d"]:
        return lookup(self.weight[...].astype(dtype), tokens)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, attention: Mixer, feed_forward: FeedForward, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.input_layernorm = config.norm.build(width, rngs=child(rngs, "input_layernorm"))
        self.attention = attention.build(width, rngs=child(rngs, "attention"))
        self.post_attention_layernorm = config.norm.build(width, rngs=child(rngs, "post_attention_layernorm"))
        self.feed_forward = feed_forward.build(width, rngs=child(rngs, "feed_forward"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], mask: AttentionMask, cache: Any = None
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array], Any]:
        with jax.named_scope("attention"):
            y, cache = self.attention(self.input_layernorm(x), positions=positions, mask=mask, cache=cache)
            x = x + checkpoint_name(y, "attention")
        with jax.named_scope("feed_forward"):
            y, aux = self.feed_forward(self.post_attention_layernorm(x), mask=mask)
            x = x + y
        return x, aux, cache


class Layers(nnx.Module):
    """Blocks one after another: `prefix` ones by themselves, then `pattern` scanned over its stacked parameters."""

    def __init__(self, prefix: list[Block], pattern: list[Block] | None = None):
        self.prefix = nnx.List(prefix)
        self.pattern = nnx.List(pattern or [])

    def __getitem__(self, index: int) -> Block:
        return self.prefix[index]

    def __len__(self) -> int:
        return len(self.prefix)

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], mask: AttentionMask, remat: str = "none"
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        def run(blocks: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            graphdef, state = nnx.split(blocks)

            def body(state: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
                total: dict[str, jax.Array] = {}
                for block in nnx.merge(graphdef, state):
                    x, aux, _ = block(x, positions=positions, mask=mask)
                    total = _add(total, aux)
                return x, total

            if remat != "none":
                body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=blocks is not self.pattern)
            if blocks is not self.pattern:
                return body(state, x)
            x, aux = jax.lax.scan(lambda x, state: body(state, x), x, state)
            return x, jax.tree.map(lambda a: a.sum(0), aux)

        total: dict[str, jax.Array] = {}
        for block in self.prefix:
            x, aux = run(nnx.List([block]), x)
            total = _add(total, aux)
        if self.pattern:
            x, aux = run(self.pattern, x)
            total = _add(total, aux)
        return x, total


def _add(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return a | {name: a[name] + value if name in a else value for name, value in b.items()}


class Decoder(nnx.Module):
    """Tokens to logits. Made by `assemble` from parameters by name, or by `build`."""

    def __init__(self, config: ModelConfig, parts: dict[str, nnx.Module], layers: Layers, compute: Compute):
        self.config, self.compute = config, compute
        self.embedding: Any = parts["embedding"]
        self.layers = layers
        self.norm = parts["norm"]
        self.lm_head: Any = parts.get("lm_head")

    def trunk(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        prefix: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        """Final hidden states, and the layers' summed auxiliary scalars. Positions default to 0, 1, 2...

        Tokens whose `prefix` is 1 are seen by all of their document, by what stands before them too. Where a context
        axis splits the sequence, all of these are in zigzag order (`nn.attention.context`).
        """
        if positions is None:
            positions = zigzag(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        mask = AttentionMask(
            segment_ids=segment_ids,
            prefix=prefix,
            kernel=self.compute.attention_kernel,
            context=self.compute.context,
        )
        x = self.embedding(tokens, self.compute.jax_dtype)
        x, aux = self.layers(x, positions=positions, mask=mask, remat=self.compute.remat)
        return self.norm(x), aux

    def head_weight(self) -> jax.Array:
        """What `head` multiplies with, as it is stored: [V, D] where tied, else [D, V]; transposing would copy it."""
        weight = (self.embedding if self.lm_head is None else self.lm_head).weight
        return weight[...].astype(self.compute.jax_dtype)

    def head(self, hidden: Float[Array, "b t d"], weight: jax.Array) -> Float[Array, "b t v"]:
        """float32 logits."""
        tied = self.lm_head is None
        weight = gather(weight, ("vocab", "embed") if tied else ("embed", "vocab"))
        return matmul(hidden, weight, out_axis="vocab", transposed=tied, dtype=jnp.float32)

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

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """float32 logits."""
        return self.head(hidden, self.head_weight())

    def init_cache(self, batch: int, length: int) -> list[Any]:
        """Empty caches of all layers for `length` positions."""
        return [block.attention.init_cache(batch, length, self.compute.jax_dtype) for block in self.layers.prefix]

    def extend(
        self, tokens: Int[Array, "b t"], *, cache: list[Any], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b t d"], list[Any]]:
        """Hidden states of T more tokens in rows that hold `lengths` already, and the cache with them in it.

        Layers have to be unrolled: with the cache as a scan output or carry decoding is up to twice as slow.
        """
        assert not self.layers.pattern
        index = lengths[:, None] + jnp.arange(tokens.shape[1])
        mask = AttentionMask(q_index=index, kernel=self.compute.attention_kernel)
        x = self.embedding(tokens, self.compute.jax_dtype)
        new = []
        for block, layer_cache in zip(self.layers.prefix, cache, strict=True):
            x, _, layer_cache = block(x, positions=index, mask=mask, cache=layer_cache)
            new.append(layer_cache)
        return self.norm(x), new
