"""Parameters and the projection that every module uses.

A parameter is declared once, with shape, logical axes and initialiser. Its first value depends on the seed and on its
name alone: a module hands each child `child(rngs, name)`, so neither the mesh, nor scanning, nor a new neighbour
changes it.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import UserError
from llama_jax.nn.adapters import LoRA, current_context
from llama_jax.nn.draws import dropout
from llama_jax.nn.products import never, product
from llama_jax.nn.quantized import Form, multiplied
from llama_jax.parallel import axes_of, einsum, fitting, mesh_axis_sizes, platform, reshape, shard, spec

# Of first values of the embedding and the head: logits start near zero and the first loss near ln V.
EMBEDDING_STD = 0.02


def seed_value(seed: int) -> np.ndarray:
    """Return a seed as an argument of jitted functions: uint32, or where it does not fit, its high and low half, [2].

    Raises UserError outside of [0, 2**64).
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"seed={seed} must be at least 0 and below 2**64, a whole number")
    high, low = divmod(int(seed), 2**32)
    return np.array([high, low] if high else low, np.uint32)


def seed_key(seed: int | np.ndarray | jax.Array) -> jax.Array:
    """Return the random key of a seed or of its `seed_value`: `jax.random.key` for all 64 bits."""
    seed = seed_value(seed) if isinstance(seed, int) else jnp.asarray(seed)
    key = jax.random.key(seed if seed.ndim == 0 else seed[1])
    return key if seed.ndim == 0 else jax.random.fold_in(key, seed[0])


class Keys(nnx.Rngs):
    """The key stream of a module: NNX's stream with the module's dotted name, the root key and the model's adapters."""

    def __init__(self, root: jax.Array, path: str = "", adapters: LoRA | None = None):
        super().__init__(params=jax.random.fold_in(root, zlib.crc32(path.encode())))
        self.root = nnx.data(root)
        self.path = nnx.static(path)
        self.adapters = nnx.static(adapters)


def child(rngs: nnx.Rngs, name: str) -> Keys:
    """Return the key stream of the child called `name`."""
    # The whole dotted name is folded into the root key at once: a chain of folds compiles slowly.
    if isinstance(rngs, Keys):
        return Keys(rngs.root, f"{rngs.path}.{name}", rngs.adapters)
    return Keys(rngs["params"].key[...], f".{name}")


def parameter(
    rngs: nnx.Rngs, name: str, shape: Sequence[int], axes: Sequence[str | None], *, std: float | None
) -> nnx.Param:
    """Return a float32 parameter: normal with standard deviation `std`; with `std=None` ones.

    `axes` are the logical axes of its dimensions.
    """
    partition = spec(*axes, shape=shape)
    if std is None:
        value = jnp.ones(shape, jnp.float32, out_sharding=partition)
    else:
        key = child(rngs, name)["params"].key[...]
        value = std * jax.random.normal(key, tuple(shape), jnp.float32, out_sharding=partition)
    return nnx.Param(value, axes=tuple(axes))


class Buffer(nnx.Variable):
    """State that no gradient trains: `update(value, statistic)` returns its next value after a step.

    The statistic is the auxiliary array `statistic.NAME` of the module, its mean over the micro-batches; both have a
    leading dimension of the layers that have the buffer.
    """


def buffer(value: jax.Array, update: Callable[[jax.Array, jax.Array], jax.Array] | None) -> Buffer:
    """Return a buffer with its first value, whole on every device; `update=None` if it never changes."""
    return Buffer(value, axes=(None,) * value.ndim, update=update)


def cast_and_gather(param: nnx.Variable | Form, dtype: DTypeLike) -> jax.Array:
    """Return a parameter's value for the computation: cast, then gathered over the axis that only storage splits."""
    return gather(param[...].astype(dtype), param.get_metadata("axes"))


def gather(value: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Return a stored value with these logical axes, gathered along those that only storage splits."""
    return shard(value, *_gathered(axes))


def embed_lookup(table: Float[Array, "v d"], index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Return rows of a table as it is stored; split over the vocabulary, it is never gathered whole."""
    if not mesh_axis_sizes():
        return _rows(table, index)
    index = shard(index, "batch", "sequence")
    batch_axes = tuple(axis for entry in axes_of(index) for axis in entry)
    if not set(axes_of(table)[1]) <= set(batch_axes):
        table = shard(table, "vocab", None)  # the gather below must be over axes along which the indices differ
    axes, stored = axes_of(table)

    # `shard_map`: the compiler would gather the table, or scatter its gradient over all devices.
    def local(table: jax.Array, index: jax.Array) -> jax.Array:
        # Below these lines a gradient belongs to one device; their transposes sum it over the devices.
        if stored:
            table = jax.lax.all_gather(table, stored, axis=1, tiled=True)
        table = jax.lax.pcast(table, tuple(axis for axis in batch_axes if axis not in stored), to="varying")
        if not axes:
            return _rows(table, index)
        # Each device looks up the rows that it has; zeros elsewhere, and the sum is the embedding.
        index = index - jax.lax.axis_index(axes) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        return jax.lax.psum(jnp.where(here[..., None], _rows(table, jnp.where(here, index, 0)), 0), axes)

    out = spec("batch", "sequence", None, shape=(*index.shape, table.shape[1]))
    return jax.shard_map(local, out_specs=out)(table, index)


@jax.custom_vjp
def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="clip")


def _rows_forward(table, index):
    return _rows(table, index), (table, index)


def _rows_backward(residuals, d_rows):
    # Summed in float32: the gradient of a frequent token's row is a sum of thousands.
    table, index = residuals
    zeros = jnp.full(table.shape, never(d_rows), jnp.float32)  # made when they are needed
    d_table = zeros.at[index].add(d_rows.astype(jnp.float32))
    return d_table.astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


class Projection(nnx.Module):
    """y = x W + b, contracting the last dimensions of x; each side may have several (heads x head_dim).

    With an adapter, y = x W + b + scale (x A) B.
    """

    def __init__(
        self, in_dims: dict[str, int], out_dims: dict[str, int], *, bias: bool, rngs: nnx.Rngs, std: float | None = None
    ):
        # Dims are {logical axis: size}; axes that only name a size (`_head_dim`) begin with `_`, and are never split.
        self.in_shape, self.out_shape = tuple(in_dims.values()), tuple(out_dims.values())
        self.in_axes, self.out_axes = _axes(in_dims), _axes(out_dims)
        fan_in = math.prod(self.in_shape)
        std = fan_in**-0.5 if std is None else std
        shape, axes = self.in_shape + self.out_shape, self.in_axes + self.out_axes
        self.weight: nnx.Variable | Form = parameter(rngs, "weight", shape, axes, std=std)
        self.bias = parameter(rngs, "bias", self.out_shape, self.out_axes, std=0.0) if bias else None
        self.joined: nnx.Variable | None = nnx.data(None)  # of the first of several, see `join`
        self.adapter: LoRA | None = None
        if isinstance(rngs, Keys) and rngs.adapters is not None and rngs.adapters.covers(rngs.path):
            self.adapter, self.path = rngs.adapters, rngs.path
            rank, none = (rngs.adapters.rank,), (None,)
            # The deviation of PEFT's first values, which are uniform.
            self.lora_a = parameter(rngs, "lora_a", self.in_shape + rank, self.in_axes + none, std=(3 * fan_in) ** -0.5)
            self.lora_b = parameter(rngs, "lora_b", rank + self.out_shape, none + self.out_axes, std=0.0)

    @property
    def summed_dims(self) -> tuple[int, ...]:
        """The dimensions of the weight over which a product sums."""
        return tuple(range(len(self.in_shape)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, T, *in_dims] to [B, T, *out_dims], in the dtype of x."""
        inputs, outputs = (self.in_shape, self.in_axes), (self.out_shape, self.out_axes)
        if (y := multiplied(x, self.weight, len(self.in_shape))) is not None:
            y = y.astype(x.dtype).reshape(*y.shape[:-1], *self.out_shape)
        elif platform() == "tpu":  # heads are dimensions of the product, in the order of attention: nothing is copied
            i, o = "ij"[: len(self.in_shape)], "op"[: len(self.out_shape)]
            axes = "batch", "sequence", *_gathered(self.out_axes)
            y = einsum(f"bt{i},{i}{o}->bt{o}", x, cast_and_gather(self.weight, x.dtype), out=axes)
        else:
            y = _in_dims(matmul(*_operands(x, self.weight, inputs, outputs)), outputs)
        if self.adapter is not None:
            rank, barrier = ((self.adapter.rank,), (None,)), jax.lax.optimization_barrier
            axes = ("batch", "sequence", *_gathered(self.in_axes))
            # Between barriers: XLA would merge these products with that of W, and round W's sums in another order.
            h = barrier(dropout(x, self.adapter.dropout, current_context(), f"lora{self.path}", axes))
            low = matmul(*_operands(h, self.lora_a, inputs, rank))
            low = _in_dims(matmul(*_operands(low, self.lora_b, rank, outputs)), outputs)
            y = y + barrier(self.adapter.scale * low)
        return y if self.bias is None else y + cast_and_gather(self.bias, x.dtype)

    def matrix(self, dtype: DTypeLike) -> jax.Array:
        """Return [*in_dims, *out_dims] with the adapter in it, gathered for the computation."""
        weight = cast_and_gather(self.weight, dtype)
        if self.adapter is None:
            return weight
        a, b = cast_and_gather(self.lora_a, dtype), cast_and_gather(self.lora_b, dtype)
        return weight + self.adapter.scale * jnp.tensordot(a, b, 1, out_sharding=jax.typeof(weight).sharding)


def join(*projections: Projection, dtype: DTypeLike) -> None:
    """Give the first of projections of the same inputs the matrices of all, side by side: [I, O + O + ...]."""
    size = math.prod(projections[0].in_shape)
    matrices = [projection.weight[...].reshape(size, -1).astype(dtype) for projection in projections]
    projections[0].joined = nnx.Variable(jnp.concatenate(matrices, 1))


def joined_products(x: jax.Array, *projections: Projection) -> list[jax.Array] | None:
    """Return what joined projections make of the same inputs [B, T, *in_dims], by one product; None of others."""
    if (first := projections[0]).joined is None:
        return None
    x = x.reshape(*x.shape[: x.ndim - len(first.in_shape)], -1)
    y = multiplied(x, first.joined, 1)
    y = matmul(x, first.joined[...].astype(x.dtype)) if y is None else y.astype(x.dtype)
    ends = np.cumsum([math.prod(projection.out_shape) for projection in projections])
    parts = jnp.split(y, ends[:-1].tolist(), -1)
    found = [part.reshape(*x.shape[:-1], *p.out_shape) for part, p in zip(parts, projections, strict=True)]
    return [y if p.bias is None else y + p.bias[...].astype(y.dtype) for y, p in zip(found, projections, strict=True)]


type _Side = tuple[tuple[int, ...], tuple[str | None, ...]]


def _operands(
    x: jax.Array, weight: nnx.Variable | Form, inputs: _Side, outputs: _Side
) -> tuple[jax.Array, jax.Array, str | None, str | None]:
    """Return the arguments of `matmul` for x [B, T, *inputs] and a stored matrix between these sides."""
    (in_shape, in_axes), (out_shape, out_axes) = inputs, outputs
    stored = fitting(in_axes[0], in_shape[0]), fitting(out_axes[0], out_shape[0])
    in_axis, out_axis = _gathered(stored)
    # Reshaped to two dimensions before it is gathered: a reshape after that would hide from XLA that the gradient,
    # a sum that is then split, is a reduce-scatter.
    w = reshape(weight[...].astype(x.dtype), (math.prod(in_shape), math.prod(out_shape)), *stored)
    w = gather(w, stored)
    # Where `in_axis` is split (heads, mlp) each device has a part of every sum, and the result is their all-reduce.
    lead = x.shape[: x.ndim - len(in_shape)]
    return reshape(x, (*lead, w.shape[0]), "batch", "sequence", in_axis), w, in_axis, out_axis


def _in_dims(y: jax.Array, side: _Side) -> jax.Array:
    """Return [B, T, product of the side's shape] as [B, T, *shape]."""
    shape, axes = side
    axis = _gathered([fitting(axes[0], shape[0])])[0]
    return reshape(y, (*y.shape[:-1], *shape), "batch", "sequence", axis, *(None,) * (len(shape) - 1))


class Embedding(nnx.Module):
    """Vectors of tokens, or of anything else that is numbered."""

    summed_dims = (1,)  # as the head that it may be, too

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.weight: nnx.Variable | Form = parameter(
            rngs, "weight", (vocab_size, width), ("vocab", "embed"), std=EMBEDDING_STD
        )

    def __call__(self, tokens: Int[Array, "b t"], dtype: DTypeLike) -> Float[Array, "b t d"]:
        """Return the tokens' vectors in this dtype."""
        if isinstance(self.weight, Form) and not mesh_axis_sizes():
            return self.weight.rows(tokens).astype(dtype)
        return embed_lookup(self.weight[...].astype(dtype), tokens)


class HeadBias(nnx.Module):
    """A number for each token, added to its logit; trained, or only loaded."""

    def __init__(self, vocab_size: int, *, trained: bool, rngs: nnx.Rngs):
        if trained:
            self.bias: Any = parameter(rngs, "bias", (vocab_size,), ("vocab",), std=0.0)
        else:
            self.bias = buffer(jnp.zeros(vocab_size, jnp.float32), None)


def matmul(
    x: jax.Array,
    w: jax.Array,
    in_axis: str | None = None,
    out_axis: str | None = None,
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return x w: [B, T, I] x [I, O] (or [O, I], transposed) -> [B, T, O], in `dtype`; None for the dtype of x.

    `in_axis` and `out_axis` are the logical axes of I and O.
    """
    (b, t, i), dims, o = x.shape, "fd" if transposed else "df", w.shape[0 if transposed else 1]
    batch, sequence, out_axis = fitting("batch", b), fitting("sequence", t), fitting(out_axis, o)
    if mesh_axis_sizes().get("context", 1) > 1:
        sharding = spec(batch, sequence, out_axis)
        return jnp.einsum(f"btd,{dims}->btf", x, w, preferred_element_type=dtype, out_sharding=sharding)
    # XLA:CPU compiles the weight gradient of a three-dimensional product badly: flatten batch and sequence, unless the
    # sequence is split too (merging two split dimensions is a shuffle).
    x = reshape(x, (b * t, i), batch, in_axis)
    if x.dtype == w.dtype and not mesh_axis_sizes():
        y = product(x, w, transposed, dtype)
    else:
        y = jnp.einsum(f"td,{dims}->tf", x, w, preferred_element_type=dtype, out_sharding=spec(batch, out_axis))
    return reshape(y, (b, t, o), batch, sequence, out_axis)


def _gathered(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(None if axis == "embed" else axis for axis in axes)  # `fsdp` splits storage, never a computation


def _axes(dims: dict[str, int]) -> tuple[str | None, ...]:
    return tuple(None if name.startswith("_") else name for name in dims)
