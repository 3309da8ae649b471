"""Models: pieces assembled into blocks, blocks into a decoder or an encoder.

In: a `ModelConfig` and parameters by name. Out: a module that turns tokens into logits.

Dimension letters everywhere: `B` batch, `T` query length, `S` key or cache length, `D` model, `N` query heads,
`K` key/value heads, `G` = N/K, `H` head dim, `F` feed-forward, `V` vocabulary, `L` layers, `E` experts.
"""

from llama_jax.models.compute import Compute
from llama_jax.models.config import LayerOverride, ModelConfig, TransformerConfig
from llama_jax.models.decoder import Decoder, DecoderConfig
from llama_jax.models.encoder import Encoder, EncoderConfig
from llama_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llama_jax.models.layout import (
    abstract_params,
    assemble,
    assemble_unrolled,
    buffers,
    flatten,
    init_params,
    is_stacked,
    layers_with,
    num_parameters,
    per_layer,
)
from llama_jax.models.model import Model, build, from_params, initialize
from llama_jax.models.mtp import MTPDecoder, MTPDecoderConfig
from llama_jax.models.transformer import Prediction, Transformer

__all__ = [
    "Compute",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LayerOverride",
    "MTPDecoder",
    "MTPDecoderConfig",
    "Model",
    "ModelConfig",
    "Prediction",
    "Transformer",
    "TransformerConfig",
    "abstract_params",
    "assemble",
    "assemble_unrolled",
    "buffers",
    "build",
    "flatten",
    "from_params",
    "init_params",
    "initialize",
    "is_stacked",
    "layers_with",
    "num_parameters",
    "per_layer",
]
