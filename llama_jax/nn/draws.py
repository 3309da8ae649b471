"""Random numbers in training: functions of the step's key, the layer, a name and the place in the batch.

They are the same on every mesh. Code that draws for the numbers of a sequence calls `draw`, and not `jax.random`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from llama_jax.nn.attention.context import AXIS, splits
from llama_jax.nn.base import ForwardContext
from llama_jax.parallel import mesh_axis_sizes, reshape, spec

type Axes = tuple[str | None, ...]


def draw(
    sample: Callable[..., jax.Array], ctx: ForwardContext, name: str, shape: tuple[int, ...], axes: Axes
) -> Shaped[Array, "..."]:
    """Return `sample(key, shape=, out_sharding=)` with these logical axes, where `sample` is of `jax.random`.

    `name` tells it from the layer's other draws. Where a context axis splits dimension 1, a sequence, the result is in
    zigzag order, and each token has what it has in the order of the text.
    """
    key = ctx.random_key(name)
    if axes[1] != "sequence" or not splits(shape[1]):
        return sample(key, shape=shape, out_sharding=spec(*axes, shape=shape))
    size = mesh_axis_sizes()[AXIS]
    # The shape [2, n] of the chunks changes no number. A device draws one early and one late chunk: its own late one is
    # drawn by its mirror image, and sent.
    chunks = (shape[0], 2, size, shape[1] // (2 * size), *shape[2:])
    split = spec(axes[0], None, "sequence", None, *axes[2:], shape=chunks)
    drawn = sample(key, shape=chunks, out_sharding=split)
    return reshape(jnp.stack([drawn[:, 0], jnp.flip(drawn[:, 1], 1)], 2), shape, *axes)


def kept(rate: float, ctx: ForwardContext, name: str, shape: tuple[int, ...], axes: Axes) -> Bool[Array, "..."]:
    """Return a draw that is false at this rate."""
    return draw(functools.partial(jax.random.bernoulli, p=1 - rate), ctx, name, shape, axes)


def dropout(
    x: Float[Array, "b *rest"],
    rate: float,
    ctx: ForwardContext,
    name: str,
    axes: Axes = ("batch", "sequence", None),
) -> Float[Array, "b *rest"]:
    """Zero each number at this rate and scale up the others (Srivastava et al. 2014); do nothing outside of training.

    `name` tells it from the layer's other dropouts; `axes` are the logical axes of x's dimensions. What is zeroed does
    not depend on the mesh.
    """
    if rate == 0 or ctx.dropout_key is None:
        return x
    return jnp.where(kept(rate, ctx, name, x.shape, axes), x / (1 - rate), 0).astype(x.dtype)
