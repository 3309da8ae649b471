"""Matrices in int8, int4 and fp8, and the products of few rows on a CPU.

A form takes the place of a module's parameter. `form[...]` is the matrix in float32, from which every computation works
on every mesh (a GPU's product converts it on the way); `form.product(x)` computes from the stored bytes, on a CPU.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.parallel import fitting, mesh_axis_sizes, platform, reshape, shard

GROUP = 128  # most inputs that share a scale in int4
TERMS = 16  # products that the CPU adds up in registers before it writes their sum
LEAST_TERMS = 4
FORMATS = ("int8", "int4", "fp8")

type Axes = tuple[str | None, ...]


class Form(nnx.Module):
    """A matrix that is stored in another form; it is read and multiplied like a parameter.

    `inputs` are the dimensions over which a product sums. A `transposed` one is stored with its two dimensions swapped.
    """

    def __init__(self, axes: Axes, inputs: tuple[int, ...], *, transposed: bool = False):
        self.axes, self.inputs, self.transposed = axes, inputs, transposed

    def get_metadata(self, name: str) -> Axes:
        """Return the logical axes of the matrix, as a parameter does."""
        assert name == "axes"
        return self.axes[::-1] if self.transposed else self.axes

    def __getitem__(self, index: object) -> jax.Array:
        """Return the whole matrix (`form[...]`) in float32."""
        assert index is ...
        return self.dense().T if self.transposed else self.dense()

    def dense(self) -> jax.Array:
        """Return the matrix as its dimensions are stored."""
        raise NotImplementedError

    def product(self, x: Float[Array, "n i"]) -> Float[Array, "n o"] | None:
        """Return x times the matrix with its outputs as one dimension, in float32; None as of `multiplied`."""
        raise NotImplementedError

    def rows(self, index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return rows of a table, without a mesh."""
        return self[...][index]


class Scaled(Form):
    """Values of 8 bits, and for every output the scale that they are multiplied by."""

    def __init__(self, matrix: jax.Array, axes: Axes, inputs: tuple[int, ...], dtype: DTypeLike, *, transposed: bool):
        super().__init__(axes, inputs, transposed=transposed)
        self.values, self.scale = map(nnx.Variable, _scaled(matrix, inputs, dtype))

    def dense(self) -> jax.Array:
        return self.values[...].astype(jnp.float32) * self.scale[...]

    def product(self, x: Float[Array, "n i"]) -> Float[Array, "n o"] | None:
        x, values = x.astype(jnp.float32), self.values[...]
        values, scale = values.reshape(x.shape[1], -1), self.scale[...].reshape(1, -1)
        if values.dtype != jnp.int8:
            return None
        if len(x) <= 2 and _terms(x.shape[1]) >= LEAST_TERMS:
            return unrolled(x, values) * scale
        # x to 15 bits by two int8, so that two exact integer products take the place of a conversion of all values.
        unit = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / 127
        high = jnp.round(x / unit)
        both = jnp.concatenate([high, jnp.round((x / unit - high) * 254)]).astype(jnp.int8)
        y = jnp.einsum("td,df->tf", both, values, preferred_element_type=jnp.int32).astype(jnp.float32)
        high, low = jnp.split(y, 2)
        return (high + low / 254) * unit * scale

    def rows(self, index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        values, scale = (x[...].T if self.transposed else x[...] for x in (self.values, self.scale))
        return values[index].astype(jnp.float32) * scale[index]


class Grouped(Form):
    """Values of 4 bits, two in a byte, and a scale for every output and group of at most 128 inputs.

    The last dimension of inputs is stored as [groups, half of a group]: the low bits are the group's first half.
    """

    def __init__(self, matrix: jax.Array, axes: Axes, inputs: tuple[int, ...], *, transposed: bool):
        super().__init__(axes, inputs, transposed=transposed)
        self.values, self.scale = map(nnx.Variable, _grouped(matrix, axes, inputs[-1]))

    def dense(self) -> jax.Array:
        packed, dim = self.values[...], self.inputs[-1]
        values = jnp.concatenate([(packed << 4) >> 4, packed >> 4], dim + 1).astype(jnp.float32) * self.scale[...]
        groups, group = values.shape[dim : dim + 2]
        shape = (*values.shape[:dim], groups * group, *values.shape[dim + 2 :])
        split = (*self.axes[:dim], fitting(self.axes[dim], groups), *self.axes[dim + 1 :])
        return shard(reshape(values, shape, *split), *self.axes)

    def product(self, x: Float[Array, "n i"]) -> Float[Array, "n o"] | None:
        dim = self.inputs[-1]
        half = self.values[...].shape[dim + 1]
        terms = _terms(half, TERMS // 2)
        if len(x) > 8 or terms < LEAST_TERMS:
            return None
        x, packed = variant(x.astype(jnp.float32), self.values[...])
        # Every sum is of one group, the partial sum's scale with it.
        packed = packed.reshape(-1, half // terms, terms, math.prod(packed.shape[dim + 2 :]))
        scale = self.scale[...].reshape(len(packed), 1, -1)
        low, high = jnp.split(x.reshape(len(x), len(packed), 2 * half), 2, -1)
        shape = (*packed.shape[:3], 1)
        low, high = (part.reshape(len(x), *shape) for part in (low, high))

        def term(j: int) -> jax.Array:
            byte = packed[:, :, j]
            first = ((byte << 4) >> 4).astype(jnp.float32) * low[:, :, :, j]
            return first + (byte >> 4).astype(jnp.float32) * high[:, :, :, j]

        sums = _tree(term, terms) * scale
        return _folded(sums.reshape(len(x), -1, sums.shape[-1]))


def form_of(
    matrix: jax.Array, axes: Sequence[str | None], inputs: tuple[int, ...], format: str, *, transposed: bool = False
) -> Form:
    """Return a matrix in one of `FORMATS`; `transposed` stores one of two dimensions with them swapped.

    What has no groups of at least 16 and an even number of inputs is int8 in place of int4.
    """
    axes = tuple(axes)
    if transposed:
        matrix, axes, inputs = matrix.T, axes[::-1], tuple(1 - i for i in inputs)
    if format == "int4" and _group(matrix.shape[inputs[-1]]) >= 16:
        return Grouped(matrix, axes, inputs, transposed=transposed)
    dtype = jnp.float8_e4m3fn if format == "fp8" else jnp.int8
    return Scaled(matrix, axes, inputs, dtype, transposed=transposed)


def multiplied(x: jax.Array, weight: nnx.Variable | jax.Array | Form, num_dims: int) -> jax.Array | None:
    """Return x [..., *inputs], of `num_dims` dimensions of inputs, times a matrix: [..., O] in float32.

    It is for a CPU without a mesh, and None where the product with the dense matrix is as fast.
    """
    if platform() != "cpu" or mesh_axis_sizes():
        return None
    lead = x.shape[: x.ndim - num_dims]
    rows = x.reshape(math.prod(lead), -1)
    y = None
    if isinstance(weight, Form):
        y = weight.product(rows)
    elif len(rows) == 1 and weight[...].dtype == x.dtype == jnp.bfloat16 and _terms(rows.shape[1]) >= LEAST_TERMS:
        y = unrolled(rows, weight[...].reshape(rows.shape[1], -1))
    return None if y is None else y.reshape(*lead, -1)


def unrolled(x: Float[Array, "n i"], matrix: jax.Array) -> Float[Array, "n o"]:
    """Return x times a matrix [I, O] in float32: sums of up to 16 products written out, then sums of those.

    Compiled by XLA:CPU it converts values in vector registers, reads them once and adds outputs next to each other. A
    dot of one row would convert the whole matrix first, or sum along a vector, one addition waiting for the other.
    """
    terms = _terms(matrix.shape[0])
    x, matrix = variant(x.astype(jnp.float32), matrix)
    matrix, x = matrix.reshape(-1, terms, matrix.shape[1]), x.reshape(len(x), -1, terms, 1)
    return _folded(_tree(lambda j: matrix[:, j].astype(jnp.float32) * x[:, :, j], terms))


def variant(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both, the matrix as a function of x: XLA would else convert it once, before the loop, to four bytes."""
    return jax.lax.optimization_barrier((x, matrix))


def _folded(sums: Float[Array, "n c o"]) -> Float[Array, "n o"]:
    """Return the sum over C."""
    while (size := sums.shape[1]) > 1:
        sums = jax.lax.optimization_barrier(sums)  # each stage a loop of its own
        terms = size if size <= 2 * TERMS else _terms(size)
        if terms < LEAST_TERMS:
            return sums.sum(1)
        sums = sums.reshape(len(sums), -1, terms, sums.shape[2])
        sums = _tree(lambda j, sums=sums: sums[:, :, j], terms)
    return sums[:, 0]


def _tree(term: Callable[[int], jax.Array], count: int) -> jax.Array:
    """Return the sum of `count` terms by pairs: additions that wait for no other."""
    terms = [term(j) for j in range(count)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def _terms(size: int, most: int = TERMS) -> int:
    return max(n for n in range(1, most + 1) if size % n == 0)


def _group(size: int) -> int:
    """Return the largest even divisor of at most 128, or 0."""
    return max((n for n in range(2, GROUP + 1, 2) if size % n == 0), default=0)


def _scaled(matrix: jax.Array, inputs: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    matrix, whole = matrix.astype(jnp.float32), dtype == jnp.int8
    largest = 127.0 if whole else float(jnp.finfo(dtype).max)
    scale = _never_zero(jnp.abs(matrix).max(inputs, keepdims=True) / largest)
    values = matrix / scale
    return (jnp.round(values) if whole else values).astype(dtype), scale


def _grouped(matrix: jax.Array, axes: Axes, dim: int) -> tuple[jax.Array, jax.Array]:
    size, group = matrix.shape[dim], _group(matrix.shape[dim])
    shape = (*matrix.shape[:dim], size // group, group, *matrix.shape[dim + 1 :])
    axes = (*axes[: dim + 1], None, *axes[dim + 1 :])
    matrix = shard(matrix, *axes[:dim], None, *axes[dim + 2 :])  # a group may cross the border of two devices
    values = shard(reshape(matrix, shape, *axes[:dim], None, *axes[dim + 1 :]), *axes).astype(jnp.float32)
    scale = _never_zero(jnp.abs(values).max(dim + 1, keepdims=True) / 7)
    low, high = jnp.split(jnp.round(values / scale).astype(jnp.int8), 2, dim + 1)
    return (low & 15) | (high << 4), scale


def _never_zero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)
