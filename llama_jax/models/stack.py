"""Blocks and stacks of blocks: what all models are made of."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.models.config import Compute, Pieces, TransformerConfig
from llama_jax.models.pipeline import pipelined
from llama_jax.nn import CrossAttention, ForwardContext, PyTree, child, drawing_from, dropout, record
from llama_jax.parallel import mesh_axis_sizes

type Aux = dict[str, jax.Array]
type NormLayer = Callable[[jax.Array], jax.Array]
# A source's keys and values in one layer, and the context of the attention to them.
type Source = tuple[dict[str, jax.Array], ForwardContext]

STATISTIC = "statistic."
PRODUCT = "product."  # before the name of a loss: its factors in each layer, [2, E]
OF = "of."  # before the name of a share: the number that it is a share of, for means over micro-batches

# What the backward pass of a layer finds saved; it computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names("projections", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer", "projections", "attention", "up"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    """A mixer, attention to a source where there is one, and a feed-forward, each with its residual and norms.

    In a parallel block the feed-forward reads what the mixer reads.

    Norms before a sublayer have Llama's names: `input_layernorm`, `cross_attention_layernorm`,
    `post_attention_layernorm`; those after it, or after the sum with the residual, are `attention_norm`,
    `cross_attention_norm` and `feed_forward_norm`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pieces: Pieces,
        *,
        cross_attention: CrossAttention | None = None,
        rngs: nnx.Rngs,
    ):
        width, (attention, feed_forward) = config.hidden_size, pieces
        self.placement, self.parallel = config.norm_placement, config.parallel != "none"
        self.residual, self.scale, self.dropout = config.residual, config.residual_scale, config.dropout

        def norm(name: str, *placements: str) -> NormLayer | None:
            if config.norm is None or self.placement not in placements:
                return None
            module: Any = config.norm.build(width, rngs=child(rngs, name))
            return module

        before, after = ("pre", "sandwich"), ("post", "sandwich", "output")
        self.input_layernorm = norm("input_layernorm", *(before if getattr(attention, "pre_norm", True) else ()))
        self.attention = attention.build(width, rngs=child(rngs, "attention"))
        self.attention_norm = norm("attention_norm", *after)
        if cross_attention is not None:
            self.cross_attention_layernorm = norm("cross_attention_layernorm", *before)
            self.cross_attention = cross_attention.build(width, rngs=child(rngs, "cross_attention"))
            self.cross_attention_norm = norm("cross_attention_norm", *after)
        if feed_forward is not None:
            own = () if config.parallel == "one_norm" else before
            self.post_attention_layernorm = norm("post_attention_layernorm", *own)
            self.feed_forward = feed_forward.build(width, rngs=child(rngs, "feed_forward"))
            self.feed_forward_norm = norm("feed_forward_norm", *after)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        ctx: ForwardContext,
        cache: PyTree = None,
        source: Source | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux, PyTree]:
        """Return the result, auxiliary arrays by name, and the cache with the inputs in it.

        `source` is what `CrossAttentionModule.keys` returned for a source, and the context of the attention to it.
        """
        # These names are for rematerialization policies, which save or offload what has them.
        x = checkpoint_name(x, "layer")
        with jax.named_scope("attention"):
            entered, normed = x, _normed(self.input_layernorm, x)
            h, cache, *found = self.attention(normed, positions=positions, ctx=ctx, cache=cache)
            record("attention", lambda: h)
            aux = _named("attention", found[0]) if found else {}
            x = self._add(x, checkpoint_name(h, "attention"), self.attention_norm, ctx, "attention")
        if source is not None:
            with jax.named_scope("cross_attention"):
                keys, source_ctx = source
                h = self.cross_attention(_normed(self.cross_attention_layernorm, x), keys, ctx=source_ctx)
                record("cross_attention", lambda: h)
                x = self._add(x, h, self.cross_attention_norm, ctx, "cross_attention")
        if hasattr(self, "feed_forward"):
            with jax.named_scope("feed_forward"):
                if not self.parallel:
                    normed = _normed(self.post_attention_layernorm, x)
                elif self.post_attention_layernorm is not None:
                    normed = self.post_attention_layernorm(entered)
                h, found = self.feed_forward(normed, ctx=ctx)
                record("feed_forward", lambda: h)
                aux |= _named("feed_forward", found)
                x = self._add(x, h, self.feed_forward_norm, ctx, "feed_forward")
        record("block", lambda: (x, aux))
        return x, aux, cache

    def _add(self, x: jax.Array, y: jax.Array, norm: NormLayer | None, ctx: ForwardContext, name: str) -> jax.Array:
        """Return the residual x joined with a sublayer's result y; `norm` is of the sum (post) or of y alone."""
        if self.placement != "post":
            y = _normed(norm, y)
        if self.scale != 1:
            y = self.scale * y
        y = dropout(y, self.dropout, ctx, name)  # before the residual, after a sandwich norm
        x = x + y if self.residual else y
        return _normed(norm, x) if self.placement == "post" else x


def _normed(norm: NormLayer | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _named(part: str, aux: Aux) -> Aux:
    """Return a module's auxiliary arrays, with statistics under the dotted names of the buffers that they are for."""
    return {
        f"{STATISTIC}{part}.{name.removeprefix(STATISTIC)}" if name.startswith(STATISTIC) else name: value
        for name, value in aux.items()
    }


def of_stack(stack: str, aux: Aux) -> Aux:
    """Return a block's auxiliary arrays under names that differ between stacks.

    Statistics get the stack's name, as buffers have it; other arrays the part of it before `layers`.
    """
    side, found = stack.removesuffix("layers"), {}
    for name, value in aux.items():
        if name.startswith(STATISTIC):
            found[f"{STATISTIC}{stack}.{name.removeprefix(STATISTIC)}"] = value
        else:
            kind = next((kind for kind in ("loss.", PRODUCT, OF) if name.startswith(kind)), "")
            found[f"{kind}{side}{name.removeprefix(kind)}"] = value
    return found


class Layers(nnx.Module):
    """A stack of blocks: `leading` ones one by one, then `repeated` ones, which are scanned over stacked parameters.

    `name` is the stack's in the model. An unrolled stack has leading blocks only.
    """

    def __init__(self, name: str, leading: Sequence[Block], repeated: Sequence[Block] = ()):
        self.name = name
        self.leading = nnx.List(leading)
        self.repeated = nnx.List(repeated)

    def __getitem__(self, index: int) -> Block:
        return self.leading[index]

    def __len__(self) -> int:
        return len(self.leading)

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks, one by one."""
        yield from self.leading
        if self.repeated:
            graphdef, state = nnx.split(self.repeated)
            for i in range(_num_repeats(state)):
                yield from nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        ctx: ForwardContext,
        source: tuple[jax.Array, ForwardContext] | None = None,
        compute: Compute,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Return the last block's result, and the layers' auxiliary arrays, each [layers that have it, ...].

        `source` is another sequence [B, S, D] and the context of the attention to it. The results of all blocks are
        appended to `outputs`, for which layers must be unrolled.
        """
        assert outputs is None or not self.repeated
        remat = compute.remat
        record("stack", lambda: (self.name, x))
        fixed = {"positions": positions, "ctx": ctx, "source": source}
        found: dict[str, list[jax.Array]] = {}
        for i, block in enumerate(self.leading):
            graphdef, state = nnx.split(nnx.List([block]))
            step = rematerialized(functools.partial(_apply_blocks, graphdef, **fixed), remat)
            x, (aux,) = step(x, (state, i))
            for name, value in aux.items():
                found.setdefault(name, []).append(value[None])  # layers without this array leave no gap
            if outputs is not None:
                outputs.append(x)
        if self.repeated:
            graphdef, state = nnx.split(self.repeated)
            if mesh_axis_sizes().get("pipeline", 1) > 1:
                assert not self.leading
                assert source is None
                return pipelined(functools.partial(_scanned, graphdef, remat), state, x, positions, ctx, compute), {}
            # Within a scan XLA cannot merge the computation with its repetition in the backward pass, so nothing has to
            # prevent it.
            step = rematerialized(functools.partial(_apply_blocks, graphdef, **fixed), remat, prevent_cse=False)
            # The number of the first layer of each repeat is for random keys only.
            first, period = len(self.leading), len(self.repeated)
            number = None if ctx.dropout_key is None else first + period * jnp.arange(_num_repeats(state))
            x, of_repeats = jax.lax.scan(step, x, (state, number))
            for name in dict.fromkeys(name for aux in of_repeats for name in aux):
                # [repeats, period, ...] -> [layers, ...]
                values = jnp.stack([aux[name] for aux in of_repeats if name in aux], axis=1)
                found.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
        return x, of_stack(self.name, {name: jnp.concatenate(values) for name, values in found.items()})


def _apply_blocks(
    graphdef: PyTree,
    x: jax.Array,
    state_and_number: tuple[PyTree, int | jax.Array | None],
    *,
    positions: jax.Array,
    ctx: ForwardContext,
    source: tuple[jax.Array, ForwardContext] | None,
) -> tuple[jax.Array, list[Aux]]:
    """Apply blocks one after another, the first of which is layer `number`; the body of a scan."""
    (state, number), found = state_and_number, []
    for i, block in enumerate(nnx.merge(graphdef, state)):
        own, of_source = ctx, None
        if ctx.dropout_key is not None:
            assert number is not None
            own = dataclasses.replace(ctx, dropout_key=jax.random.fold_in(ctx.dropout_key, number + i))
        with drawing_from(own):
            if source is not None:
                # Keys of the source are projected in the loop: for all layers at once they would take L times the
                # memory.
                source_ctx = dataclasses.replace(source[1], dropout_key=own.dropout_key)
                of_source = block.cross_attention.keys(source[0]), source_ctx
            x, aux, _ = block(x, positions=positions, ctx=own, source=of_source)
        found.append(aux)
    return x, found


def _scanned(
    graphdef: PyTree, remat: str, state: PyTree, x: jax.Array, positions: jax.Array, ctx: ForwardContext
) -> jax.Array:
    """Apply the layers of one stage of a pipeline."""
    apply = functools.partial(_apply_blocks, graphdef, positions=positions, ctx=ctx, source=None)

    def bound(x: jax.Array, layer: PyTree) -> tuple[jax.Array, list[Aux]]:
        # In the gradient of a scan, here that over ticks, JAX moves out what does not change in it: all of a stage's
        # weights would be gathered ahead, and kept. Behind a barrier that is computed again they belong to the tick.
        return apply(*jax.lax.optimization_barrier((x, layer)))

    step = apply if remat == "none" else rematerialized(bound, remat, prevent_cse=False)
    x, aux = jax.lax.scan(step, x, (state, None))
    if names := sorted({name for of_block in aux for name in of_block}):
        raise UserError(f"mesh.pipeline does not go with layers that return {', '.join(names)}: set it to 1")
    return x


def rematerialized[F: Callable[..., Any]](function: F, remat: str, *, prevent_cse: bool = True) -> F:
    """Return `function` with a backward pass that computes again what this policy does not save."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)  # type: ignore[return-value]


def _num_repeats(state: PyTree) -> int:
    return jax.tree.leaves(state)[0].shape[0]
