"""Weight files with Meta's names: Meta's own directories, Mistral's, which are alike, and llama2.c's `.bin`."""

import re
import struct
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats.huggingface import read_directory
from llama_jax.checkpoint.formats.tensors import Tensor, Tensors, extent, joined, stored
from llama_jax.checkpoint.formats.torch_pickle import read_torch
from llama_jax.config import Json, UserError, read_json

# The dimension that model-parallel ranks split: outputs of column-parallel matrices, inputs of row-parallel ones.
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_LLAMA2C_HEADER = struct.Struct("<7i")


def is_meta(directory: Path) -> bool:
    """Return whether a directory has `params.json` and weights named `consolidated.*`."""
    one_file = (directory / f"consolidated.safetensors{end}" for end in ("", ".index.json"))
    weights = any(directory.glob("consolidated.*.pth")) or any(file.is_file() for file in one_file)
    return (directory / "params.json").is_file() and weights


def read_meta(directory: Path) -> tuple[Json, Tensors]:
    """Return `params.json` and the tensors, joined over `consolidated.NN.pth`, one file for each model-parallel rank.

    Mistral's directories have one `consolidated.safetensors`. Sources: https://github.com/meta-llama/llama
    (`llama/model.py`) and https://github.com/meta-llama/llama3. Raises UserError for a missing shard, shards that
    disagree, and damaged files.
    """
    params = read_json(directory / "params.json")
    if not isinstance(params, dict):
        raise UserError(f"'{directory / 'params.json'}' is not an object of settings")
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in params:
            raise UserError(f"'{directory / 'params.json'}' lacks '{key}'")
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        return params, read_directory(directory)
    for rank, file in enumerate(files):
        if file.name != f"consolidated.{rank:02d}.pth":
            raise UserError(f"'{directory}' lacks consolidated.{rank:02d}.pth: download it")
    shards = [read_torch(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if lacking := shards[0].keys() - shard.keys():
            raise UserError(f"'{file}' lacks '{min(lacking)}', which '{files[0].name}' has")
        if surplus := shard.keys() - shards[0].keys():
            raise UserError(f"'{file}' has '{min(surplus)}', which '{files[0].name}' lacks")
    return params, {name: _join(name, [shard[name] for shard in shards], params) for name in shards[0]}


def _join(name: str, parts: list[Tensor], params: Json) -> Tensor:
    """Return a tensor joined over its model-parallel parts."""
    if len(parts) == 1 or len(parts[0].shape) < 2:  # norms and rope.freqs: the same in every shard
        return parts[0]
    if name == "tok_embeddings.weight":
        # Llama 1 and 2 split the model dimension, Llama 3 the vocabulary: the shape shows which.
        dim = 0 if parts[0].shape[1] == params["dim"] else 1
    elif found := re.fullmatch(r"(?:.*\.)?(w[1-3]|w[qkvo]|output)\.weight", name):
        dim = _SPLIT_DIM[found[1]]
        if found[1] in ("wk", "wv"):
            # With more shards than kv heads (405B over 16) neighbours hold the same head.
            rows = params["dim"] // params["n_heads"] * (params.get("n_kv_heads") or params["n_heads"])
            parts = parts[:: max(1, sum(part.shape[0] for part in parts) // rows)]
    else:
        raise UserError(f"'{name}' is split over shards in a way that is not known")
    if len({part.shape for part in parts}) != 1:
        raise UserError(f"the shards of '{name}' differ in shape: {', '.join(str(p.shape) for p in parts)}")
    return joined(parts, dim)


def is_llama2c(file: Path) -> bool:
    """Return whether the file's header is a believable one of llama2.c's `.bin`, version 0."""
    with open(file, "rb") as stream:
        header = stream.read(_LLAMA2C_HEADER.size)
    if len(header) < _LLAMA2C_HEADER.size:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, length = _LLAMA2C_HEADER.unpack(header)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), length)
    return all(0 < size < 1 << 24 for size in sizes) and dim % heads == 0 and heads % kv_heads == 0


def read_llama2c(file: Path) -> tuple[Json, Tensors]:
    """Return the settings of a llama2.c `.bin`, version 0, as Meta's `params.json` has them, and its tensors.

    The file is seven int32 and then every tensor in float32, in a fixed order and in Meta's layout. Source:
    https://github.com/karpathy/llama2.c, `export.py` (`legacy_export`) and `run.c` (`memory_map_weights`). Raises
    UserError for another format and for a file whose size is not what its header promises.
    """
    if not is_llama2c(file):
        raise UserError(f"'{file}' is not a llama2.c file of version 0 (another version, or damaged)")
    with open(file, "rb") as stream:
        dim, hidden, layers, heads, kv_heads, vocab, length = _LLAMA2C_HEADER.unpack(stream.read(_LLAMA2C_HEADER.size))
    tied, vocab = vocab > 0, abs(vocab)  # a negative vocabulary size marks a head with separate weights
    head_dim = dim // heads
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
    around: dict[str, tuple[int, ...]] = {"norm": (dim,), "rope tables": (length * head_dim,)}  # cos and sin: computed
    if not tied:
        around["output"] = (vocab, dim)
    size = file.stat().st_size
    promised = vocab * dim + layers * sum(map(extent, per_layer.values())) + sum(map(extent, around.values()))
    if size != (promised := _LLAMA2C_HEADER.size + 4 * promised):
        raise UserError(f"'{file}' has {size} bytes where its header promises {promised}: download it again")
    shapes = {"tok_embeddings": (vocab, dim)}
    shapes |= {f"layers.{i}.{name}": shape for name, shape in per_layer.items() for i in range(layers)} | around
    tensors: Tensors = {}
    offset = _LLAMA2C_HEADER.size
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = stored(file, offset, np.dtype("<f4"), shape)
        offset += 4 * extent(shape)
    del tensors["rope tables.weight"]
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
