"""A module with quantized matrices, and the copies of matrices from which a CPU decodes."""

import functools
import re
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from llama_jax.config import UserError
from llama_jax.models.config import ModelConfig, TransformerConfig
from llama_jax.nn import FORMATS, PyTree, form_of, join
from llama_jax.parallel import platform

JOINED_UP_TO = 1 << 22  # numbers of matrices together from which one product is no faster
HEAD_FROM = 1 << 20  # numbers of a head from which a step on a CPU is bound by reading it


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


def copy_pays(config: ModelConfig) -> bool:
    """Return true where decoding is faster with a tied head as [D, V], a copy of the embedding."""
    if not isinstance(config, TransformerConfig) or not config.tie_embeddings:
        return False
    return config.vocab_size * config.hidden_size >= HEAD_FROM


def join_small(module: nnx.Module, dtype: DTypeLike) -> None:
    """Join small matrices of the same inputs, of which a step on a CPU is bound by beginning their products."""
    for _, node in list(nnx.iter_graph(module)):
        projections = getattr(node, "same_inputs", ())
        size = sum(projection.weight[...].size for projection in projections)
        if len(projections) > 1 and size <= JOINED_UP_TO and all(p.adapter is None for p in projections):
            join(*projections, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantized(graphdef: PyTree, format: str, state: PyTree) -> Any:
    """Return graph and state of a module with its matrices in a format of `FORMATS`."""
    module = nnx.merge(graphdef, state)
    table = module.embedding if module.part("lm_head") is None else None  # the head, too
    for _, node in list(nnx.iter_graph(module)):
        if (dims := getattr(node, "summed_dims", None)) is not None:
            axes = node.weight.get_metadata("axes")
            node.weight = form_of(node.weight[...], axes, dims, format, transposed=node is table)
    return nnx.split(module)
