"""Matrix products whose gradients are products of the same dtype, in the form that XLA:CPU has fast kernels for.

Left to JAX, the gradient of a bfloat16 product with a float32 result is a product of float32 matrices. That of the
weight sums over the first dimension of both, which XLA:CPU does in float32: a fifth of the speed, where there is AMX.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from llama_jax.parallel import mesh_axis_sizes, platform


def turned(x: jax.Array) -> jax.Array:
    """Return x with its last two dimensions swapped: on a CPU in memory, and not inside of a product."""
    if platform() != "cpu":
        return x.swapaxes(-1, -2)
    rows = Layout(tuple(range(x.ndim)))
    return with_layout_constraint(with_layout_constraint(x, rows).swapaxes(-1, -2), rows)


def never(y: jax.Array) -> jax.Array:
    """Return False, as a value that cannot be had before y [...], an array of this device alone.

    For what a backward pass computes again. XLA:CPU drops barriers before it looks for equal values and orders the
    operations: it finds such a value in the forward pass and keeps it, or computes it there. No value is above
    infinity.
    """
    return y.reshape(-1)[0] > jnp.inf


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, w: jax.Array, transposed: bool, dtype: DTypeLike | None) -> jax.Array:
    """Return x w: [M, I] x [I, O] (or [O, I], transposed) -> [M, O], in `dtype`; None for the dtype of x.

    Gradients are products in the dtype of x, to which that of a float32 result is rounded.
    """
    return _forward(x, w, transposed, dtype)[0]


def _forward(
    x: jax.Array, w: jax.Array, transposed: bool, dtype: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not by calling `product`, in which the policies of recomputation would not see the dot.
    return jnp.einsum("mi,oi->mo" if transposed else "mi,io->mo", x, w, preferred_element_type=dtype), (x, w)


def _backward(
    transposed: bool, _: DTypeLike | None, residuals: tuple[jax.Array, jax.Array], d_y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    d_y = d_y.astype(x.dtype)
    d_x = jnp.einsum("mo,oi->mi" if transposed else "mo,io->mi", d_y, w)
    x = jnp.where(never(d_y), 0, x)  # else it would be turned, below, in the forward pass
    a, b = (d_y, x) if transposed else (x, d_y)
    # a^T b by a copy of the smaller one: of a head's logits the copy would cost as much as the product.
    return d_x, turned(a) @ b if a.shape[1] <= 2 * b.shape[1] else turned(turned(b) @ a)


product.defvjp(_forward, _backward)


def scaled(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x [..., *S] times w [*S]; the gradient in w is a product with ones, where all is on one device."""
    return x * w if mesh_axis_sizes() else _scaled(x, w)


@jax.custom_vjp
def _scaled(x: jax.Array, w: jax.Array) -> jax.Array:
    return x * w


def _scaled_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    products = (d_y.astype(jnp.float32) * x).reshape(-1, w.size)
    d_w = jnp.ones(len(products)) @ products  # XLA:CPU is slow in sums of columns
    return d_y * w, d_w.reshape(w.shape).astype(w.dtype)


_scaled.defvjp(lambda x, w: (x * w, (x, w)), _scaled_backward)
