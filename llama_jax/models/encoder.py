"""The encoder: every token attends to all others of its text. Heads predict masked tokens, or classify the text."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.models.config import Compute, Pieces, TransformerConfig, full_score_flops
from llama_jax.models.inputs import check_length
from llama_jax.models.model import Batch, LossTerm, Transformer
from llama_jax.models.stack import Aux, Block, Layers
from llama_jax.nn import (
    ACTIVATIONS,
    Activation,
    Embedding,
    ForwardContext,
    Mask,
    Norm,
    Projection,
    check_at_least,
    check_rate,
    child,
    dropout,
    gather,
    matmul,
    unzigzag,
    zigzag,
)
from llama_jax.parallel import shard

# Parts that use the first token of a text alone.
FIRST_TOKEN_PARTS = ("pooler", "pair_head", "classifier_dense", "classifier")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """A bidirectional model of whole texts (Devlin et al. 2019, BERT; Liu et al. 2019, RoBERTa).

    num_token_types: kinds of tokens, each with a vector that is added to its embeddings; 0 for none.
    head_transform: activation of a layer, normalised, between the last block and the head of masked tokens, or none.
    head_transform_bias: a bias on that layer.
    pooler: a layer with tanh on the first token.
    pair_head: a head on the pooler that predicts if the second of two texts follows the first.
    num_classes: classes of texts that a classifier distinguishes; 0 for no classifier.
    classifier: input of the classifier: the pooler (BERT), or a separate layer with tanh (dense, RoBERTa) or ReLU
      (relu_dense, DistilBERT).
    classifier_dropout: rate before the classifier; none for `dropout`.
    """

    num_token_types: int = 0
    head_transform: Activation | None = None
    head_transform_bias: bool = True
    pooler: bool = False
    pair_head: bool = False
    num_classes: int = 0
    classifier: Literal["pooler", "dense", "relu_dense"] = "pooler"
    classifier_dropout: float | None = None

    generates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "num_token_types", "num_classes")
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
        width, parts = self.hidden_size, super().build_parts(rngs=rngs)
        if self.num_token_types:
            name = "token_type_embedding"
            parts[name] = Embedding(self.num_token_types, width, rngs=child(rngs, name))
        if self.head_transform is not None:
            assert self.norm is not None
            key = child(rngs, "head_transform")
            options = {"bias": self.head_transform_bias, "rngs": key}
            parts["head_transform"] = HeadTransform(width, self.head_transform, self.norm, **options)
        outputs = {
            "pooler": width if self.pooler else 0,
            "pair_head": 2 if self.pair_head else 0,
            "classifier_dense": width if self.num_classes and self.classifier != "pooler" else 0,
            "classifier": self.num_classes,
        }
        for name, size in outputs.items():
            if size:
                parts[name] = Projection({"embed": width}, {"_out": size}, bias=True, rngs=child(rngs, name))
        return parts

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        return Block(self, pieces, rngs=rngs)

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

    def __init__(self, width: int, activation: Activation, norm: Norm, *, bias: bool, rngs: nnx.Rngs):
        self.activation = activation
        self.dense = Projection({"embed": width}, {"_out": width}, bias=bias, rngs=child(rngs, "dense"))
        self.norm: Any = norm.build(width, rngs=child(rngs, "norm"))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class Encoder(Transformer):
    """Tokens to logits of masked tokens, to a vector of the text, and to its class."""

    inputs = ("tokens", "mask", "token_types", "positions", "segment_ids")
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
    ) -> tuple[Float[Array, "b t d"], ForwardContext, Aux]:
        """Return final hidden states, the context they were made with, and the layers' auxiliary arrays.

        Where a context axis splits the sequence, all arrays are in zigzag order (`nn/attention/context.py`). `key` is
        for dropout; the results of all blocks are appended to `outputs`.
        """
        added: Any = 0
        if (table := self.part("token_type_embedding")) is not None:
            token_types = jnp.zeros_like(tokens) if token_types is None else token_types
            added = table(token_types, self.compute.jax_dtype)
        elif token_types is not None:
            raise UserError("token_types are given to a model with num_token_types=0: leave them out")
        mask = Mask(causal=False, segment_ids=segment_ids)
        return self.run_stack(tokens, positions, mask, add=added, key=key, outputs=outputs)

    def __call__(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b _"] | Float[Array, "b t v"]:
        """Return float32 logits of the model's head: of classes [B, C] with a classifier, else of tokens [B, T, V].

        `mask` [B, T] is 1 at tokens and 0 at padding, to which nothing attends; logits at padding mean nothing.
        `segment_ids` [B, T] separate texts of one row. `token_types` default to 0, and `positions` to the number of
        tokens of the same text before each.
        """
        return (self.token_logits if self.part("classifier") is None else self.class_logits)(tokens, **others)

    def token_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b t v"]:
        """Return float32 logits of the token at every position, for the arguments of a call."""
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
        """Return final hidden states, in the order of the text, for the arguments of a call."""
        if mask is not None:
            segment_ids = mask if segment_ids is None else segment_ids * mask
        if positions is None:
            if segment_ids is None:
                check_length(self.config, tokens.shape[1])
            positions = _default_positions(tokens, segment_ids)
        arguments = {"positions": positions, "segment_ids": segment_ids, "token_types": token_types}
        tokens, arguments = jax.tree.map(zigzag, (tokens, arguments))
        return unzigzag(self.trunk(tokens, outputs=outputs, **arguments)[0])

    def hidden_states(self, tokens: Int[Array, "b t"], **others: Any) -> dict[str, list[Float[Array, "b t d"]]]:
        """Return the results of every block for the arguments of a call, by stack."""
        outputs: list[jax.Array] = []
        self.encoded(tokens, outputs=outputs, **others)
        return {"layers": [unzigzag(x) for x in outputs]}

    def pooled(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b d"]:
        """Return the pooler's vector of the first token, for the arguments of a call."""
        return self._pool(_first(self.encoded(tokens, **others)))[:, 0]

    def pair_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b two"]:
        """Return float32 logits of the second text following the first (entry 0, as released) or not.

        The arguments are those of a call.
        """
        self._need("pair_head", "pair_head=true")
        x = self._pool(_first(self.encoded(tokens, **others)))
        return self._first_token_head(x, self._weight("pair_head"))[:, 0]

    def class_logits(self, tokens: Int[Array, "b t"], **others: Any) -> Float[Array, "b c"]:
        """Return float32 logits of the text's classes, for the arguments of a call."""
        self._need("classifier", "num_classes")
        x = self._classifier_inputs(_first(self.encoded(tokens, **others)), ForwardContext())
        return self._first_token_head(x, self._weight("classifier"))[:, 0]

    def main_logits(self, **inputs: Any) -> Float[Array, "b _ c"]:
        logits = self(**inputs)
        return logits[:, None] if logits.ndim == 2 else logits

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return super().logits(self._transformed(hidden))

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        """Return the term of classes alone where the batch has them; else that of masked tokens, and of pairs."""
        hidden, ctx, aux = self.trunk(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            token_types=batch.get("token_types"),
            key=key,
        )
        # Heads of first tokens are computed at every position, for a packed row has many texts; other weights are 0.
        head = self._first_token_head
        if "class_targets" in batch:
            x, weight = self._classifier_inputs(hidden, ctx), self._weight("classifier")
            return [LossTerm("loss", x, batch["class_targets"], batch["weights"], head, weight)], aux
        found = [self.main_term(self._transformed(hidden), batch)]
        if "pair_targets" in batch:
            # Entry 0 of released heads means "follows"; in the data 1 does.
            x, targets, weight = self._pool(hidden), 1 - batch["pair_targets"], self._weight("pair_head")
            found.append(LossTerm("pair_loss", x, targets, batch["pair_weights"], head, weight))
        return found, aux

    def _transformed(self, hidden: jax.Array) -> jax.Array:
        transform = self.part("head_transform")
        return hidden if transform is None else transform(hidden)

    def _pool(self, hidden: jax.Array) -> jax.Array:
        self._need("pooler", "pooler=true")
        return jnp.tanh(self.part("pooler")(hidden))

    def _classifier_inputs(self, hidden: jax.Array, ctx: ForwardContext) -> jax.Array:
        config = self.config
        assert isinstance(config, EncoderConfig)
        rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        if config.classifier == "pooler":
            x = self._pool(hidden)
        elif config.classifier == "relu_dense":
            x = jax.nn.relu(self.part("classifier_dense")(hidden))
        else:
            x = jnp.tanh(self.part("classifier_dense")(dropout(hidden, rate, ctx, "classifier_dense")))
        return dropout(x, rate, ctx, "classifier")

    def _weight(self, part: str) -> dict[str, jax.Array]:
        module, dtype = self.part(part), self.compute.jax_dtype
        return {"weight": module.weight[...].astype(dtype), "bias": module.bias[...]}

    def _first_token_head(self, x: Float[Array, "b t d"], weight: dict[str, jax.Array]) -> Float[Array, "b t c"]:
        logits = matmul(x, gather(weight["weight"], ("embed", None)), out_axis=None, dtype=jnp.float32)
        return logits + weight["bias"].astype(jnp.float32)

    def _need(self, part: str, option: str) -> None:
        if self.part(part) is None:
            raise UserError(f"this model has no {part}: make or train one with {option}")


def _default_positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Return the number of tokens of the same text before each."""
    index = jnp.arange(tokens.shape[1])
    if segment_ids is None:
        return jnp.broadcast_to(index, tokens.shape)
    segments = shard(segment_ids, "batch", None)
    # A dense [B, T, T] comparison: texts of one segment need not be consecutive.
    before = (segments[:, :, None] == segments[:, None]) & (index[:, None] > index)
    return before.sum(-1, dtype=jnp.int32)


def _first(hidden: jax.Array) -> jax.Array:
    """Return the first token's hidden state, [B, T, D] -> [B, 1, D]."""
    return shard(hidden, "batch", None, None)[:, :1]
