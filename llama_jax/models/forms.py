"""A module with its matrices in another form: quantized, or in the blocks that a CPU decodes from."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import UserError
from llama_jax.models.config import ModelConfig
from llama_jax.nn import FORMATS, Blocked, Form, PyTree, form_of
from llama_jax.parallel import platform

# Bytes of the weights between which a CPU decodes from blocks: with fewer, a step is not bound by them; more are not
# copied.
BLOCKS_FROM, BLOCKS_TO = 4 << 20, 4 << 30


def check_format(config: ModelConfig, format: str) -> None:
    """Raise UserError for a format that does not exist, and where model or device cannot have it."""
    if format not in FORMATS:
        raise UserError(f"quantize={format!r} must be one of {', '.join(FORMATS)}")
    if not config.generates:
        raise UserError(f"quantize={format} is for models that continue a text, and {type(config).__name__} does not")
    if format == "fp8":
        capability = re.match(r"\d+\.\d+", str(getattr(jax.local_devices()[0], "compute_capability", "")))
        if platform() not in ("gpu", "cuda") or capability is None or float(capability[0]) < 8.9:
            raise UserError("quantize=fp8 needs an NVIDIA GPU of compute capability 8.9 or more: take int8")


def blocks_pay(config: ModelConfig, state: PyTree) -> bool:
    """Return true where decoding from blocks is faster."""
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return config.generates and platform() == "cpu" and BLOCKS_FROM <= size <= BLOCKS_TO


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_form(graphdef: PyTree, format: str, state: PyTree) -> Any:
    """Return graph and state of a module with its matrices in a format of `FORMATS`, or in "blocks"."""
    module = nnx.merge(graphdef, state)
    table = module.embedding if module.part("lm_head") is None else None  # the head, too
    for _, node in list(nnx.iter_graph(module)):
        dims, weight = getattr(node, "summed_dims", None), getattr(node, "weight", None)
        if dims is None or weight is None or isinstance(weight, Form):
            continue
        axes = weight.get_metadata("axes")
        if format != "blocks":
            node.weight = form_of(weight[...], axes, dims, format, transposed=node is table)
        elif getattr(node, "multiplies", False):
            node.weight = Blocked(weight[...].astype(module.compute.jax_dtype), axes, dims)
    if format == "blocks" and table is not None:
        module.head_form = Blocked(table.weight[...].astype(module.compute.jax_dtype).T, (None, None), (0,))
    return nnx.split(module)
