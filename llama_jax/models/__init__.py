"""Models: pieces assembled into blocks, blocks into a decoder.

In: a `ModelConfig` and parameters by name. Out: a module that turns tokens into logits.

Dimension letters everywhere: `B` batch, `T` query length, `S` key or cache length, `D` model, `N` query heads,
`K` key/value heads, `G` = N/K, `H` head dim, `F` feed-forward, `V` vocabulary, `L` layers, `E` experts.
"""

from llama_jax.models.compute import Compute
from llama_jax.models.decoder import Decoder, DecoderConfig, LayerOverride, ModelConfig
from llama_jax.models.layout import (
    abstract_params,
    assemble,
    assemble_unrolled,
    flatten,
    init_params,
    layers_with,
    num_parameters,
    per_layer,
)
from llama_jax.models.model import Model, build, from_params, initialize

__all__ = [
    "Compute",
    "Decoder",
    "DecoderConfig",
    "LayerOverride",
    "Model",
    "ModelConfig",
    "abstract_params",
    "assemble",
    "assemble_unrolled",
    "build",
    "flatten",
    "from_params",
    "init_params",
    "initialize",
    "layers_with",
    "num_parameters",
    "per_layer",
]
