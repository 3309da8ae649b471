"""A decoder that learns to predict more than the next token (multi-token prediction; "DeepSeek-V3", 2024, 2.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.models.config import Compute, Pieces
from llama_jax.models.decoder import Decoder, DecoderConfig
from llama_jax.models.model import Batch, LossTerm
from llama_jax.models.stack import Aux, Block, Layers, of_stack, rematerialized
from llama_jax.nn import ForwardContext, Mask, Projection, PyTree, check_at_least, child, unzigzag, zigzag
from llama_jax.parallel import shard

STACK = "mtp_layers"


@dataclasses.dataclass(frozen=True)
class MTPDecoderConfig(DecoderConfig):
    """A causal language model that in training also predicts tokens after the next, one with each further block.

    Further blocks share the embedding and the head; generation uses them as a draft alone (draft="mtp").

    num_mtp_layers: number of further tokens to predict.
    mtp_weight: factor of the mean of the further losses.
    """

    num_mtp_layers: int = 0
    mtp_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "num_mtp_layers", "mtp_weight")
        if self.num_mtp_layers and self.norm is None:
            raise UserError(f"num_mtp_layers={self.num_mtp_layers} needs a norm: what it joins has to be of one size")

    def stacks(self) -> dict[str, tuple[Pieces, ...]]:
        further = ((self.attention, self.feed_forward),) * self.num_mtp_layers
        return super().stacks() | ({STACK: further} if further else {})

    def build_block(self, stack: str, pieces: Pieces, *, rngs: nnx.Rngs) -> nnx.Module:
        return (MTPBlock if stack == STACK else Block)(self, pieces, rngs=rngs)

    def build_model(self, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute) -> "MTPDecoder":
        return MTPDecoder(self, parts, stacks, compute)

    def tokens_of(self, name: str, target_length: int, source_length: int) -> int:
        # The head is used once more with each further token.
        times = 1 + self.num_mtp_layers if name.startswith(("lm_head.", "embedding.")) else 1
        return times * super().tokens_of(name, target_length, source_length)


class MTPBlock(Block):
    """A block on the hidden state of each position, joined with the token that follows (equations 21 and 22)."""

    def __init__(self, config: MTPDecoderConfig, pieces: Pieces, *, rngs: nnx.Rngs):
        super().__init__(config, pieces, rngs=rngs)
        width = config.hidden_size
        assert config.norm is not None
        self.enorm: Any = config.norm.build(width, rngs=child(rngs, "enorm"))
        self.hnorm: Any = config.norm.build(width, rngs=child(rngs, "hnorm"))
        self.eh_proj = Projection({"embed": 2 * width}, {"_width": width}, bias=False, rngs=child(rngs, "eh_proj"))
        self.norm: Any = config.norm.build(width, rngs=child(rngs, "norm"))

    def joined(self, hidden: Float[Array, "b t d"], embedded: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the block's inputs, of hidden states and the embeddings of the tokens that follow."""
        return self.eh_proj(jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1))


class MTPDecoder(Decoder):
    """A `Decoder` with further blocks, for training and for guesses of tokens after the next."""

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        """Return the term of the next token, then with each further block that of one token later.

        A further block uses the normalised final hidden states of the main model, or those of the block before.
        """
        (main,), aux = super().loss_terms(batch, key=key)
        terms, hidden, config = [main], main.hidden, self.config
        assert isinstance(config, MTPDecoderConfig)
        further = self.part(STACK)
        for depth, block in enumerate(further.blocks() if further is not None else (), 1):
            # Their random keys go on where the layers' end.
            own_key = None if key is None else jax.random.fold_in(key, config.num_layers + depth)
            hidden, found = self._deeper(block, hidden, batch, depth, own_key)
            for name, value in of_stack(STACK, found).items():
                # [further blocks, ...], like the layers of a stack
                aux[name] = jnp.concatenate([aux[name], value[None]]) if name in aux else value[None]
            segment_ids = batch["segment_ids"]
            same = (_shifted(segment_ids, depth, fill=-1) == segment_ids).astype(batch["weights"].dtype)
            terms.append(
                dataclasses.replace(
                    main,
                    name=f"mtp_{depth}_loss",
                    hidden=hidden,
                    targets=_shifted(batch["targets"], depth),
                    weights=_shifted(batch["weights"], depth) * same,  # targets in another document are no targets
                    coefficient=config.mtp_weight / config.num_mtp_layers,
                )
            )
        return terms, aux

    def mtp_logits(
        self, tokens: Int[Array, "b t"], *, segment_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b u v"]:
        """Return float32 logits of the token after the next, at every position that has a next token: U = T - 1."""
        further, (rows, length) = self.part(STACK), tokens.shape
        if further is None:
            raise UserError("a model with num_mtp_layers=0 predicts nothing but the next token: set it to 1 or more")
        batch = {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(length), (rows, length))}
        batch = jax.tree.map(zigzag, batch | ({} if segment_ids is None else {"segment_ids": segment_ids}))
        hidden, _ = self.trunk(**batch)
        hidden, _ = self._deeper(next(further.blocks()), hidden, batch, 1, None)
        return shard(self.logits(unzigzag(hidden)), "batch", None, "vocab")[:, :-1]

    def init_further_cache(self, batch: int, length: int) -> list[PyTree]:
        """Return empty caches of the further blocks for `length` positions."""
        further = self.part(STACK).leading
        return [block.attention.init_cache(batch, length, self.compute.jax_dtype) for block in further]

    def extend_further(
        self,
        depth: int,
        hidden: Float[Array, "b t d"],
        tokens: Int[Array, "b t"],
        *,
        cache: PyTree,
        lengths: Int[Array, " b"],
    ) -> tuple[Float[Array, "b t d"], PyTree]:
        """Return the hidden states of a further block (0 is the first) at T more positions, and its cache with them.

        `hidden` are those of the block before, `tokens` the ones `depth + 1` places later. The rows hold `lengths`.
        """
        block = self.part(STACK).leading[depth]
        positions, ctx = self.cache_context(tokens.shape[1], [cache], lengths, None)
        inputs = block.joined(hidden, self.embed(tokens, positions, ctx))
        x, _, cache = block(inputs, positions=positions, ctx=ctx, cache=cache)
        return block.norm(x), cache

    def _deeper(
        self, block: MTPBlock, hidden: jax.Array, batch: Batch, depth: int, key: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """Return the normalised hidden states of a further block, and its auxiliary arrays."""
        positions = batch["positions"]
        mask = Mask(segment_ids=batch.get("segment_ids"), prefix=batch.get("prefix"))
        ctx = self.row_context(mask, positions.shape[1], key)
        embedded = self.embed(_shifted(batch["tokens"], depth), positions, ctx)
        graphdef, state = nnx.split(block)

        def body(state: PyTree, hidden: jax.Array, embedded: jax.Array, ctx: ForwardContext) -> tuple[jax.Array, Aux]:
            block = nnx.merge(graphdef, state)
            x, aux, _ = block(block.joined(hidden, embedded), positions=positions, ctx=ctx)
            return block.norm(x), aux

        return rematerialized(body, self.compute.remat)(state, hidden, embedded, ctx)


def _shifted(x: jax.Array, by: int, fill: int = 0) -> jax.Array:
    """Return each row of the text moved `by` places to the left, with `fill` after its end."""
    whole = shard(unzigzag(x), "batch", None)  # neighbours in the text are on other devices in zigzag order
    by = min(by, whole.shape[1])
    return zigzag(jnp.pad(whole[:, by:], ((0, 0), (0, by)), constant_values=fill))
