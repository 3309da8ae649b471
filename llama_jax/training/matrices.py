"""Parameters as matrices: which have one in each layer, and transformations of each layer's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from llama_jax.models import Params, is_stacked
from llama_jax.nn import PyTree


def is_matrix(name: str, value: Any) -> bool:
    """Return whether a parameter is decayed: it has two dimensions or more in each layer, and is neither a bias nor a
    table of biases (T5's of relative positions).
    """
    return value.ndim - is_stacked(name) >= 2 and not any(part.endswith(("bias", "norm")) for part in name.split("."))


def matrix_axes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (first dimension of the matrix, first of its columns) of a parameter; layers and experts come before.

    Of three dimensions or more, such as [D, N, H] of a projection to heads, those are the rows that make the matrix
    most nearly square.
    """
    first = min(is_stacked(name) + (".experts." in name), len(shape) - 1)

    def skew(split: int) -> float:
        return abs(math.log(math.prod(shape[first:split]) / math.prod(shape[split:])))

    return first, min(range(first + 1, len(shape)), key=skew, default=len(shape))


def dimension_numbers(params: PyTree) -> PyTree:
    """Return optax's description of each parameter's matrix, in the tree of the parameters."""

    def describe(path: tuple[Any, ...], x: jax.Array) -> PyTree:
        first, split = matrix_axes(path[0].key, x.shape)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, x.ndim)))

    return jax.tree_util.tree_map_with_path(describe, params)


def on_matrices(of_matrix: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the transformation that applies `of_matrix` to each layer's and expert's matrix or vector separately.

    The state has the leading dimension of the layers and experts of a parameter.
    """

    def view(name: str, x: jax.Array) -> jax.Array:
        first, split = matrix_axes(name, x.shape)
        sizes = math.prod(x.shape[:first]), math.prod(x.shape[first:split]), math.prod(x.shape[split:])
        return x.reshape(sizes[: 2 + (split < x.ndim)])

    def init(params: PyTree) -> dict[str, PyTree]:
        return {name: jax.vmap(of_matrix.init)(view(name, x)) for name, x in params.items()}

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[Params, dict[str, PyTree]]:
        new_updates: Params = {}
        new_state: dict[str, PyTree] = {}
        for name, grad in updates.items():
            views = view(name, grad), state[name], view(name, params[name])
            found: Any
            found, new_state[name] = jax.vmap(of_matrix.update)(*views)
            new_updates[name] = jnp.reshape(found, grad.shape)
        return new_updates, new_state

    return optax.GradientTransformation(init, update)
