"""Products of groups of rows, one group for each expert, with the experts' matrices."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llama_jax.nn.products import turned
from llama_jax.parallel import platform

# Rows that a product takes of one expert at a time; groups are padded to a multiple. Other platforms have `ragged_dot`.
BLOCKS = {"cpu": 64, "gpu": 256, "cuda": 256}

type Product = Callable[[jax.Array, jax.Array], jax.Array]
# The network of an expert: rows [..., D] and matrices by name, multiplied by the product alone -> [..., D].
type Body = Callable[[jax.Array, dict[str, jax.Array], Product], jax.Array]


@dataclasses.dataclass(frozen=True)
class Groups:
    """How rows of experts lie in slots: one group after the other, each padded to whole blocks.

    block: rows of a block; 1 where `ragged_dot` multiplies groups of any size.
    num_slots: number of slots, enough for the rows however they are distributed.
    """

    block: int
    num_slots: int

    @staticmethod
    def of(num_rows: int, num_experts: int) -> "Groups":
        """Return the slots of at most `num_rows` rows in all."""
        block, largest = 1, BLOCKS.get(platform(), 1)
        while block < min(largest, num_rows / num_experts):
            block *= 2
        # Each expert's last block may be partly empty, and no more blocks than rows have one.
        return Groups(block, num_rows if largest == 1 else block * min(num_rows, num_rows // block + num_experts))

    def first(self, counts: Int[Array, "*d e"]) -> Int[Array, "*d e"]:
        """Return the first slot of each expert's rows, from their numbers."""
        blocks = self._blocks(counts)
        return self.block * (jnp.cumsum(blocks, -1) - blocks)

    def _blocks(self, counts: jax.Array) -> jax.Array:
        return (counts + self.block - 1) // self.block

    def product(self, counts: Int[Array, " e"]) -> Product:
        """Return the product of rows in slots [num_slots, I] with their experts' matrices [E, I, O]."""
        if platform() not in BLOCKS:
            return lambda rows, w: jax.lax.ragged_dot(rows, w, counts)
        # `ragged_dot` would multiply every row with every expert.
        ends = jnp.cumsum(self._blocks(counts))
        number = jnp.searchsorted(ends, jnp.arange(self.num_slots // self.block), side="right")
        of_block = jnp.minimum(number, counts.shape[0] - 1)
        return lambda rows, w: _blocked(*alike(rows, w), of_block, ends)


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Mark arrays in a `shard_map` as varying over all mesh axes over which any of them varies."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


@jax.custom_vjp
def _blocked(rows: jax.Array, w: jax.Array, of_block: jax.Array, ends: jax.Array) -> jax.Array:
    """Multiply each block of rows with its expert's matrix: [blocks * M, I] x [E, I, O] -> [blocks * M, O].

    `of_block` is the expert of each block, `ends` the number of blocks up to each expert's last.
    """
    return _each_block(rows, w, of_block, ends, transposed=False)


def _each_block(rows, w, of_block, ends, *, transposed: bool):
    size = rows.shape[0] // of_block.shape[0]

    def step(i, out):
        w_i = jax.lax.dynamic_index_in_dim(w, of_block[i], keepdims=False)
        y = jnp.einsum("mo,io->mi" if transposed else "mi,io->mo", _block(rows, i, size), w_i)
        return jax.lax.dynamic_update_slice_in_dim(out, y, i * size, 0)

    out = zeros_like((rows.shape[0], w.shape[1 if transposed else 2]), rows)
    return jax.lax.fori_loop(0, ends[-1], step, out)


def _blocked_forward(rows, w, of_block, ends):
    return _blocked(rows, w, of_block, ends), (rows, w, of_block, ends)


def _blocked_backward(residuals, d_out):
    rows, w, of_block, ends = residuals
    size = rows.shape[0] // of_block.shape[0]

    def of_expert(expert, d_w):
        def add(i, total):
            part = jnp.dot(turned(_block(rows, i, size)), _block(d_out, i, size), preferred_element_type=jnp.float32)
            return total + part

        first = jnp.where(expert > 0, ends[expert - 1], 0)
        total = jax.lax.fori_loop(first, ends[expert], add, zeros_like(w.shape[1:], rows, jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(d_w, total.astype(d_w.dtype), expert, 0)

    d_w = zeros_like(w.shape, rows)
    d_w = jax.lax.fori_loop(0, w.shape[0], of_expert, d_w)
    return _each_block(d_out, w, of_block, ends, transposed=True), d_w, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _block(rows, i, size):
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def zeros_like(shape, rows, dtype=None):
    """Return zeros that vary over the same mesh axes as `rows`: a loop's carry has to keep its type."""
    return alike(jnp.zeros(shape, dtype or rows.dtype), rows)[0]
