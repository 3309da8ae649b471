"""Weight files of other projects: a path comes in, a mapping from tensor name to lazily read tensor goes out.

Every reader returns `Tensors`. A new file format is one module here; `zoo/` defines what the names in it mean.
"""

from llama_jax.checkpoint.formats.gguf import (
    architecture_of as architecture_of,
    config_json as config_json,
    read_gguf as read_gguf,
)
from llama_jax.checkpoint.formats.gptq_awq import dequantized as dequantized, read_quantization as read_quantization
from llama_jax.checkpoint.formats.huggingface import (
    has_weights as has_weights,
    read_directory as read_directory,
    read_safetensors as read_safetensors,
    write_safetensors as write_safetensors,
)
from llama_jax.checkpoint.formats.meta import (
    is_llama2c as is_llama2c,
    is_meta as is_meta,
    read_llama2c as read_llama2c,
    read_meta as read_meta,
)
from llama_jax.checkpoint.formats.mxfp4 import from_mxfp4 as from_mxfp4
from llama_jax.checkpoint.formats.tensors import (
    BLOCK_BYTES as BLOCK_BYTES,
    Slices as Slices,
    Tensor as Tensor,
    Tensors as Tensors,
    block_scaled as block_scaled,
    cut as cut,
    equal as equal,
    item as item,
    joined as joined,
    rounded as rounded,
    split as split,
    stack as stack,
    stored as stored,
    transposed as transposed,
    with_scales as with_scales,
)
from llama_jax.checkpoint.formats.torch_pickle import read_torch as read_torch
