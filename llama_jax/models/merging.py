"""Low-rank adapters merged into the weights that they adapt."""

import dataclasses
import functools
import string
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.models.config import ModelConfig
from llama_jax.models.layout import ADAPTERS, Params


def merge_adapters[C: ModelConfig](config: C, params: Params) -> tuple[C, Params]:
    """Return config and parameters of the same model without adapters: W + scale A B in place of W, A and B."""
    if config.adapters is None:
        return config, params
    merged = {name: value for name, value in params.items() if not name.endswith(ADAPTERS)}
    for name in params.keys() - merged.keys():
        if name.endswith(ADAPTERS[0]):
            weight, b = (name.removesuffix(ADAPTERS[0]) + end for end in (".weight", ADAPTERS[1]))
            merged[weight] = _sum(config.adapters.scale, params[weight], params[name], params[b])
    changed: Any = dataclasses.replace(config, adapters=None)  # type: ignore[type-var]
    return changed, merged


@functools.partial(jax.jit, static_argnums=0)
def _sum(scale: float, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return [L, *in, *out] + scale [L, *in, R] [L, R, *out], summed in float32, in the type and sharding of W."""
    num_in = a.ndim - 1  # with the layers
    dims = string.ascii_lowercase[: weight.ndim]
    formula = f"{dims[:num_in]}r,{dims[0]}r{dims[num_in:]}->{dims}"
    sharding = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(weight).sharding
    product = jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, out_sharding=sharding)
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)
