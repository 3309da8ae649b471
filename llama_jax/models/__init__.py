"""Models: pieces assembled into blocks, blocks into a decoder, an encoder or both.

In: a `ModelConfig` and parameters by name. Out: a module that turns tokens into logits.

Dimension letters everywhere: `B` batch, `T` query length, `S` key or cache length, `D` model, `N` query heads,
`K` key/value heads, `G` = N/K, `H` head dim, `F` feed-forward, `V` vocabulary, `L` layers, `E` experts.
"""

from llama_jax.models.cache import (
    cache_bytes as cache_bytes,
    cache_bytes_per_token as cache_bytes_per_token,
    cache_shapes as cache_shapes,
    nbytes as nbytes,
)
from llama_jax.models.config import (
    Compute as Compute,
    LayerOverride as LayerOverride,
    ModelConfig as ModelConfig,
    TransformerConfig as TransformerConfig,
    loss_chunks as loss_chunks,
)
from llama_jax.models.decoder import Decoder as Decoder, DecoderConfig as DecoderConfig
from llama_jax.models.encoder import Encoder as Encoder, EncoderConfig as EncoderConfig
from llama_jax.models.encoder_decoder import (
    EncoderDecoder as EncoderDecoder,
    EncoderDecoderConfig as EncoderDecoderConfig,
)
from llama_jax.models.inputs import check_ids as check_ids
from llama_jax.models.layout import (
    ADAPTERS as ADAPTERS,
    Params as Params,
    abstract_params as abstract_params,
    assemble as assemble,
    buffers as buffers,
    flatten as flatten,
    frozen as frozen,
    init_params as init_params,
    is_stacked as is_stacked,
    layer_rngs as layer_rngs,
    layers_with as layers_with,
    num_parameters as num_parameters,
    per_layer as per_layer,
)
from llama_jax.models.merging import merge_adapters as merge_adapters
from llama_jax.models.model import (
    LossTerm as LossTerm,
    Model as Model,
    Transformer as Transformer,
    build as build,
    from_params as from_params,
    initialize as initialize,
)
from llama_jax.models.mtp import MTPDecoder as MTPDecoder, MTPDecoderConfig as MTPDecoderConfig
from llama_jax.models.pipeline import check_pipeline as check_pipeline, num_microbatches as num_microbatches
from llama_jax.models.stack import OF as OF, PRODUCT as PRODUCT, STATISTIC as STATISTIC, Layers as Layers
