"""The encoder: every token sees all others of its text. Heads say what a masked token was, or what the text is."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.models.block import Aux, Layers
from llama_jax.models.compute import Compute
from llama_jax.models.config import TransformerConfig, full_score_flops
from llama_jax.models.parts import Embedding
from llama_jax.models.transformer import Batch, LossTerm, Transformer
from llama_jax.nn import (
    ACTIVATIONS,
    Activation,
    AttentionMask,
    Norm,
    Projection,
    check_rate,
    child,
    dropout,
    gather,
    matmul,
    unzigzag,
    zigzag,
)
from llama_jax.parallel import shard

# Parts that read the first token of a text alone.
FIRST_TOKEN_PARTS = ("pooler", "pair_head", "classifier_dense", "classifier")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """A model of texts that are there as a whole (Devlin et al. 2019, BERT; Liu et al. 2019, RoBERTa).

    num_token_types: kinds of tokens, each with a vector that is added to its embeddings; 0 for none.
    head_transform: activation of a layer, normalised, between the last block and the head of masked tokens, or none.
    pooler: a layer with tanh that reads the first token.
    pair_head: whether the second of two texts follows the first, read from the pooler.
    num_classes: kinds of texts that a classifier tells apart; 0 for none.
    classifier: what the classifier reads: the pooler (BERT), or a dense layer with tanh of its own (RoBERTa).
    classifier_dropout: rate before the classifier; none for `dropout`.
    """

    num_token_types: int = 0
    head_transform: Activation | None = None
    pooler: bool = False
    pair_head: bool = False
    num_classes: int = 0
    classifier: Literal["pooler", "dense"] = "pooler"
    classifier_dropout: float | None = None

    generates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_token_types", "num_classes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        check_rate("classifier_dropout", self.classifier_dropout or 0.0)
        if self.head_transform is not None and self.norm is None:
            raise UserError(f"head_transform={self.head_transform!r} needs a norm")
        for name, wants in (("pair_head", self.pair_head), ("num_classes", self.num_classes)):
            if wants and not self.pooler and (name == "pair_head" or self.classifier == "pooler"):
                raise UserError(f"{name}={wants} needs pooler=true, which it reads from")

    @property
    def batch_fields(self) -> frozenset[str]:  # type: ignore[override]
        names = {"tokens", "targets", "weights", "positions", "segment_ids", "prefix"}
        names |= {"token_types"} if self.num_token_types > 1 else set()
        names |= {"pair_targets", "pair_weights"} if self.pair_head else set()
        return frozenset(names | ({"class_targets"} if self.num_classes else set()))

    def build_parts(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        width, wide = self.hidden_size, {"embed": self.hidden_size}
        parts: dict[str, nnx.Module] = {"embedding": Embedding(self.vocab_size, width, rngs=child(rngs, "embedding"))}
        if self.num_token_types:
            name = "token_type_embedding"
            parts[name] = Embedding(self.num_token_types, width, rngs=child(rngs, name))
        parts |= self.embedding_parts(rngs=rngs) | self.final_norm(rngs=rngs)
        if self.head_transform is not None:
            assert self.norm is not None
            parts["head_transform"] = HeadTransform(
                width, self.head_transform, self.norm, rngs=child(rngs, "head_transform")
            )
        outputs = {
            "pooler": width if self.pooler else 0,
            "pair_head": 2 if self.pair_head else 0,
            "classifier_dense": width if self.num_classes and self.classifier == "dense" else 0,
            "classifier": self.num_classes,
        }
        for name, size in outputs.items():
            if size:
                parts[name] = Projection(wide, {"_out": size}, bias=True, rngs=child(rngs, name))
        return parts | self.head_parts(rngs=rngs)

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute) -> "Encoder":
        return Encoder(self, parts, stacks, compute)

    def tokens_of(self, name: str, target_length: int, source_length: int) -> int:
        part = name.partition(".")[0]
        if part == "token_type_embedding":
            return 0
        if part in FIRST_TOKEN_PARTS:
            return 1
        return super().tokens_of(name, target_length, source_length)

    def score_flops(self, target_length: int, source_length: int) -> float:
        """FLOPs of a row's forward pass in all layers' attention scores, in full: every token sees every other."""
        return full_score_flops([mixer for mixer, _ in self.layer_pieces()], target_length + source_length)

    def example(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        found = super().example(rng)
        if self.num_token_types > 1:
            found["token_types"] = rng.integers(0, self.num_token_types, found["tokens"].shape).astype(np.int32)
        return found

    @property
    def needs_rng(self) -> bool:
        return super().needs_rng or (self.num_classes > 0 and bool(self.classifier_dropout))


class HeadTransform(nnx.Module):
    """norm(activation(dense(x)))."""

    def __init__(self, width: int, activation: Activation, norm: Norm, *, rngs: nnx.Rngs):
        self.activation = activation
        self.dense = Projection({"embed": width}, {"_out": width}, bias=True, rngs=child(rngs, "dense"))
        self.norm: Any = norm.build(width, rngs=child(rngs, "norm"))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class Encoder(Transformer):
    """Tokens to logits of what they were, to a vector of the text, and to its class."""

    layers: Layers

    def trunk(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        key: jax.Array | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionMask, Aux]:
        """Final hidden states, the mask that they were made with, and the layers' auxiliary arrays.

        Where a context axis splits the sequence, all of these are in zigzag order (`nn.attention.context`). `key` is
        for dropout; `outputs` is given what every block gives.
        """
        places = jnp.arange(tokens.shape[1])
        bias = self.bias(places[None], places)
        mask = self.mask(causal=False, segment_ids=segment_ids, bias=bias, dropout_key=key)
        kinds: Any = 0
        if (table := self.part("token_type_embedding")) is not None:
            token_types = jnp.zeros_like(tokens) if token_types is None else token_types
            kinds = table(token_types, self.compute.jax_dtype)
        elif token_types is not None:
            raise UserError("token_types are given to a model with num_token_types=0: leave them out")
        x = self.embed(tokens, positions, mask, add=kinds)
        x, aux = self.layers(x, positions=positions, mask=mask, remat=self.compute.remat, outputs=outputs)
        return self.normed(x), mask, aux

    def __call__(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b _"] | Float[Array, "b t v"]:
        """float32 logits of the head that the model has: of the text's classes [B, C] where it tells any apart, else
        of what stands at every position, or stood there before it was masked, [B, T, V].

        `mask` [B, T] is 1 at tokens and 0 at padding, which nothing sees; what the logits are at padding means nothing.
        `segment_ids` [B, T] tell apart texts of one row. `token_types` default to 0, and `positions` to how many tokens
        of the same text stand before.
        """
        return (self.token_logits if self.part("classifier") is None else self.class_logits)(tokens, **others)

    def token_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b t v"]:
        """float32 logits of what stands at every position, for the arguments of a call."""
        return self.logits(self.encoded(tokens, **others))

    def encoded(
        self,
        tokens: Int[Array, "b t"],
        *,
        mask: Int[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> Float[Array, "b t d"]:
        """Final hidden states, in the order of the text; the arguments are those of a call."""
        if mask is not None:
            segment_ids = mask if segment_ids is None else segment_ids * mask
        if positions is None:
            positions = _places(tokens, segment_ids)
        arguments = {"positions": positions, "segment_ids": segment_ids, "token_types": token_types}
        tokens, arguments = jax.tree.map(zigzag, (tokens, arguments))
        return unzigzag(self.trunk(tokens, outputs=outputs, **arguments)[0])

    def hidden_states(self, tokens: Int[Array, "b t"], **others: Any) -> dict[str, list[Float[Array, "b t d"]]]:
        """What every block gives for the arguments of a call, by stack."""
        outputs: list[jax.Array] = []
        self.encoded(tokens, outputs=outputs, **others)
        return {"layers": [unzigzag(x) for x in outputs]}

    def pooled(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b d"]:
        """What the pooler makes of the first token, for the arguments of a call."""
        return self._pool(_first(self.encoded(tokens, **others)))[:, 0]

    def pair_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b two"]:
        """float32 logits of whether the second text follows the first (entry 0, as released) or not, of a call's
        arguments."""
        self._need("pair_head", "pair_head=true")
        x = self._pool(_first(self.encoded(tokens, **others)))
        return self._first_token_head(x, self._weight("pair_head"))[:, 0]

    def class_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b c"]:
        """float32 logits of the text's classes, for the arguments of a call."""
        self._need("classifier", "num_classes")
        x = self._classified(_first(self.encoded(tokens, **others)), self.mask(causal=False))
        return self._first_token_head(x, self._weight("classifier"))[:, 0]

    def main_logits(self, **inputs: Any) -> Float[Array, "b _ c"]:
        logits = self(**inputs)
        return logits[:, None] if logits.ndim == 2 else logits

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return super().logits(self._transformed(hidden))

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        """Classes alone where the batch has them; else masked tokens, and whether texts follow where it asks."""
        hidden, mask, aux = self.trunk(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            token_types=batch.get("token_types"),
            key=key,
        )
        # Heads that read first tokens read every position: a packed row has many texts, and other weights are 0.
        head = self._first_token_head
        if "class_targets" in batch:
            x, weight = self._classified(hidden, mask), self._weight("classifier")
            return [LossTerm("loss", x, batch["class_targets"], batch["weights"], head, weight)], aux
        x = self._transformed(hidden)
        found = [LossTerm("loss", x, batch["targets"], batch["weights"], self.head, self.head_weight())]
        if "pair_targets" in batch:
            # Released heads say "follows" with entry 0, the data with 1.
            x, targets, weight = self._pool(hidden), 1 - batch["pair_targets"], self._weight("pair_head")
            found.append(LossTerm("pair_loss", x, targets, batch["pair_weights"], head, weight))
        return found, aux

    def _transformed(self, hidden: jax.Array) -> jax.Array:
        transform = self.part("head_transform")
        return hidden if transform is None else transform(hidden)

    def _pool(self, hidden: jax.Array) -> jax.Array:
        self._need("pooler", "pooler=true")
        return jnp.tanh(self.part("pooler")(hidden))

    def _classified(self, hidden: jax.Array, mask: AttentionMask) -> jax.Array:
        """What the classifier multiplies."""
        config = self.config
        assert isinstance(config, EncoderConfig)
        rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        if config.classifier == "pooler":
            x = self._pool(hidden)
        else:
            x = jnp.tanh(self.part("classifier_dense")(dropout(hidden, rate, mask, "classifier_dense")))
        return dropout(x, rate, mask, "classifier")

    def _weight(self, part: str) -> dict[str, jax.Array]:
        module, dtype = self.part(part), self.compute.jax_dtype
        return {"weight": module.weight[...].astype(dtype), "bias": module.bias[...]}

    def _first_token_head(self, x: Float[Array, "b t d"], weight: dict[str, jax.Array]) -> Float[Array, "b t c"]:
        logits = matmul(x, gather(weight["weight"], ("embed", None)), out_axis=None, dtype=jnp.float32)
        return logits + weight["bias"].astype(jnp.float32)

    def _need(self, part: str, option: str) -> None:
        if self.part(part) is None:
            raise UserError(f"this model has no {part}: make or train one with {option}")


def _places(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """How many tokens of the same text stand before each."""
    index = jnp.arange(tokens.shape[1])
    if segment_ids is None:
        return jnp.broadcast_to(index, tokens.shape)
    segments = shard(segment_ids, "batch", None)
    before = (segments[:, :, None] == segments[:, None]) & (index[:, None] > index)
    return before.sum(-1, dtype=jnp.int32)


def _first(hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, 1, D]."""
    return shard(hidden, "batch", None, None)[:, :1]
