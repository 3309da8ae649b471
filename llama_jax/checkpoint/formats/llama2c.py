"""llama2.c's `.bin`, version 0: seven int32, then every tensor in float32, in a fixed order.

https://github.com/karpathy/llama2.c, `export.py` (`legacy_export`) and `run.c` (`memory_map_weights`). The tensors
come out under Meta's names, because that is the layout they have.
"""

import struct
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats.tensors import Stored, Tensors
from llama_jax.config import UserError

_HEADER = struct.Struct("<7i")


def is_llama2c(file: Path) -> bool:
    """Whether the file's header is a believable one of version 0."""
    with open(file, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, length = _HEADER.unpack(header)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), length)
    return all(0 < size < 1 << 24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0


def read_llama2c(file: Path) -> tuple[dict, Tensors]:
    """What Meta's `params.json` would say (and `hidden_dim`, `max_seq_len`), and the tensors, none of them read yet.

    Raises UserError for another format and for a file whose size is not what its header promises.
    """
    if not is_llama2c(file):
        raise UserError(f"'{file}' is not a llama2.c file of version 0 (another version, or damaged)")
    with open(file, "rb") as stream:
        dim, hidden, layers, heads, kv_heads, vocab, length = _HEADER.unpack(stream.read(_HEADER.size))
    tied, vocab = vocab > 0, abs(vocab)  # a negative vocabulary size says that the head has weights of its own
    head_dim = dim // heads
    tensors: Tensors = {}
    offset = _HEADER.size

    def take(name: str, *shape: int) -> None:
        nonlocal offset
        tensors[name] = tensor = Stored(file, offset, np.dtype("<f4"), shape)
        offset += tensor.extent * 4

    take("tok_embeddings.weight", vocab, dim)
    per_layer = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_heads * head_dim, dim),
        "attention.wv": (kv_heads * head_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    for name, shape in per_layer.items():
        for layer in range(layers):
            take(f"layers.{layer}.{name}.weight", *shape)
    take("norm.weight", dim)
    offset += 4 * length * head_dim  # cos and sin tables, which are computed
    if not tied:
        take("output.weight", vocab, dim)
    if (size := file.stat().st_size) != offset:
        raise UserError(f"'{file}' has {size} bytes where its header promises {offset}: download it again")
    params = {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": vocab,
        "norm_eps": 1e-5,
        "max_seq_len": length,
    }
    return params, tensors
