"""The block, the same for all models, and a stack of them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.models.compute import REMAT_POLICIES
from llama_jax.nn import AttentionMask, FeedForward, Mixer, child, dropout

type Aux = dict[str, jax.Array]
STATISTIC = "statistic."
OF = "of."  # before the name of a share: what it is a share of, for means over parts of a batch


class Block(nnx.Module):
    """A mixer, attention to another sequence where there is one, and a feed-forward, each with its residual and norms.

    The norms of what enters have Llama's names: `input_layernorm`, `cross_attention_layernorm`,
    `post_attention_layernorm`; those of what leaves, or of the sum with the residual, are `attention_norm`,
    `cross_attention_norm` and `feed_forward_norm`.
    """

    def __init__(
        self,
        config: Any,
        attention: Mixer,
        feed_forward: FeedForward | None,
        *,
        cross_attention: Any = None,
        rngs: nnx.Rngs,
    ):
        width, norms = config.hidden_size, config.norm
        self.placement, self.residual, self.dropout = config.norm_placement, config.residual, config.dropout

        def norm(name: str, *placements: str) -> Any:
            if norms is None or self.placement not in placements:
                return None
            return norms.build(width, rngs=child(rngs, name))

        before, after = ("pre", "sandwich"), ("post", "sandwich")
        self.input_layernorm = norm("input_layernorm", *before)
        self.attention = attention.build(width, rngs=child(rngs, "attention"))
        self.attention_norm = norm("attention_norm", *after)
        if cross_attention is not None:
            self.cross_attention_layernorm = norm("cross_attention_layernorm", *before)
            self.cross_attention = cross_attention.build(width, rngs=child(rngs, "cross_attention"))
            self.cross_attention_norm = norm("cross_attention_norm", *after)
        if feed_forward is not None:
            self.post_attention_layernorm = norm("post_attention_layernorm", *before)
            self.feed_forward = feed_forward.build(width, rngs=child(rngs, "feed_forward"))
            self.feed_forward_norm = norm("feed_forward_norm", *after)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        mask: AttentionMask,
        cache: Any = None,
        source: tuple[Any, AttentionMask] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux, Any]:
        """`source`: the keys and values of another sequence, as `CrossAttention.keys` gives them, and who sees them."""
        aux: Aux = {}

        def mix(x: jax.Array) -> jax.Array:
            nonlocal cache
            y, cache, *found = self.attention(x, positions=positions, mask=mask, cache=cache)
            aux.update(_named("attention", *found))
            return checkpoint_name(y, "attention")

        def transform(x: jax.Array) -> jax.Array:
            y, found = self.feed_forward(x, mask=mask)
            aux.update(_named("feed_forward", found))
            return y

        with jax.named_scope("attention"):
            x = self._sublayer(x, mix, self.input_layernorm, self.attention_norm, mask, "attention")
        if source is not None:
            keys, source_mask = source
            with jax.named_scope("cross_attention"):
                x = self._sublayer(
                    x,
                    lambda x: self.cross_attention(x, keys, mask=source_mask),
                    self.cross_attention_layernorm,
                    self.cross_attention_norm,
                    mask,
                    "cross_attention",
                )
        if hasattr(self, "feed_forward"):
            with jax.named_scope("feed_forward"):
                before, after = self.post_attention_layernorm, self.feed_forward_norm
                x = self._sublayer(x, transform, before, after, mask, "feed_forward")
        return x, aux, cache

    def _sublayer(
        self, x: jax.Array, f: Callable[[jax.Array], jax.Array], before: Any, after: Any, mask: AttentionMask, name: str
    ) -> jax.Array:
        y = f(x if before is None else before(x))
        if after is not None and self.placement == "sandwich":
            y = after(y)
        y = dropout(y, self.dropout, mask, name)
        x = x + y if self.residual else y
        return after(x) if after is not None and self.placement == "post" else x


def _named(part: str, aux: Aux | None = None) -> Aux:
    """A module's auxiliary arrays, its statistics under the dotted names of the buffers that they are for."""
    return {
        f"{STATISTIC}{part}.{name.removeprefix(STATISTIC)}" if name.startswith(STATISTIC) else name: value
        for name, value in (aux or {}).items()
    }


def of_stack(stack: str, aux: Aux) -> Aux:
    """A block's auxiliary arrays under names that tell them from those of other stacks: statistics get the stack's
    whole, as buffers do, and others what stands before its `layers`."""
    prefix = stack.removesuffix("layers")
    found = {}
    for name, value in aux.items():
        kind = next((kind for kind in ("loss.", OF) if name.startswith(kind)), "")
        whole = name.startswith(STATISTIC)
        own = f"{kind}{prefix}{name.removeprefix(kind)}"
        found[f"{STATISTIC}{stack}.{name.removeprefix(STATISTIC)}" if whole else own] = value
    return found


class Layers(nnx.Module):
    """Blocks one after another: `prefix` ones by themselves, then `pattern` scanned over its stacked parameters.

    `name` is the stack's in the model.
    """

    def __init__(self, name: str, prefix: list[Any], pattern: list[Any] | None = None):
        self.name = name
        self.prefix = nnx.List(prefix)
        self.pattern = nnx.List(pattern or [])

    def __getitem__(self, index: int) -> Any:
        return self.prefix[index]

    def __len__(self) -> int:
        return len(self.prefix)

    def blocks(self) -> Iterator[Any]:
        """All blocks, one by one."""
        yield from self.prefix
        if self.pattern:
            graphdef, state = nnx.split(self.pattern)
            for i in range(jax.tree.leaves(state)[0].shape[0]):
                yield from nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        mask: AttentionMask,
        source: tuple[jax.Array, AttentionMask] | None = None,
        remat: str = "none",
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """What the last block gives, and the layers' auxiliary arrays, each [layers that have it, ...].

        `source` is another sequence [B, S, D] and who sees it. What every block gives is appended to `outputs`, for
        which layers must be unrolled.
        """
        assert outputs is None or not self.pattern

        def run(blocks: Any, x: jax.Array, index: Any) -> tuple[jax.Array, list[Aux]]:
            graphdef, state = nnx.split(blocks)

            def body(state: Any, x: jax.Array, index: Any) -> tuple[jax.Array, list[Aux]]:
                found = []
                for i, block in enumerate(nnx.merge(graphdef, state)):
                    own, own_source = mask, source
                    if mask.dropout_key is not None:
                        key = jax.random.fold_in(mask.dropout_key, index + i)
                        own = dataclasses.replace(mask, dropout_key=key)
                    if source is not None:
                        own_source = block.cross_attention.keys(source[0]), _with_key(source[1], own)
                    x, aux, _ = block(x, positions=positions, mask=own, source=own_source)
                    found.append(aux)
                return x, found

            if remat != "none":
                body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=blocks is not self.pattern)
            if blocks is not self.pattern:
                return body(state, x, index)
            return jax.lax.scan(lambda x, of_repeat: body(of_repeat[0], x, of_repeat[1]), x, (state, index))

        found: dict[str, list[jax.Array]] = {}
        for i, block in enumerate(self.prefix):
            x, (aux,) = run(nnx.List([block]), x, i)
            for name, value in aux.items():
                found.setdefault(name, []).append(value[None])
            if outputs is not None:
                outputs.append(x)
        if self.pattern:
            repeats, period = jax.tree.leaves(nnx.state(self.pattern))[0].shape[0], len(self.pattern)
            # Layer numbers are only for random keys.
            index = None if mask.dropout_key is None else len(self.prefix) + period * jnp.arange(repeats)
            x, of_pattern = run(self.pattern, x, index)
            for name in dict.fromkeys(name for aux in of_pattern for name in aux):
                values = jnp.stack([aux[name] for aux in of_pattern if name in aux], axis=1)
                found.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
        return x, of_stack(self.name, {name: jnp.concatenate(values) for name, values in found.items()})


def _with_key(mask: AttentionMask, own: AttentionMask) -> AttentionMask:
    return dataclasses.replace(mask, dropout_key=own.dropout_key)
