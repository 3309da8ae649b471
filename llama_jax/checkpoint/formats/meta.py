"""Meta's own directories: `params.json` and `consolidated.NN.pth`, one file for each model-parallel rank.

Mistral's are alike, with one `consolidated.safetensors`.

https://github.com/meta-llama/llama (`llama/model.py`) and https://github.com/meta-llama/llama3. Column-parallel
matrices are split over their outputs (dim 0), row-parallel ones over their inputs (dim 1); norms are in every file.
"""

import re
from pathlib import Path

from llama_jax.checkpoint.formats.huggingface import read_directory
from llama_jax.checkpoint.formats.tensors import Joined, Tensor, Tensors
from llama_jax.checkpoint.formats.torch_pickle import read_torch
from llama_jax.config import UserError, read_json

_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def is_meta(directory: Path) -> bool:
    """Whether a directory has Meta's layout."""
    one_file = (directory / f"consolidated.safetensors{end}" for end in ("", ".index.json"))
    weights = any(directory.glob("consolidated.*.pth")) or any(file.is_file() for file in one_file)
    return (directory / "params.json").is_file() and weights


def read_meta(directory: Path) -> tuple[dict, Tensors]:
    """`params.json` and the tensors joined over the model-parallel shards, none of them read yet.

    Raises UserError for a missing shard, shards that disagree, and damaged files.
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
    tensors: Tensors = {}
    for name in shards[0]:
        for file, shard in zip(files, shards, strict=True):
            if name not in shard:
                raise UserError(f"'{file}' lacks '{name}', which '{files[0].name}' has")
        tensors[name] = _join(name, [shard[name] for shard in shards], params)
    for file, shard in zip(files, shards, strict=True):
        for name in shard.keys() - tensors.keys():
            raise UserError(f"'{file}' has '{name}', which '{files[0].name}' lacks")
    return params, tensors


def _join(name: str, parts: list[Tensor], params: dict) -> Tensor:
    if len(parts) == 1 or len(parts[0].shape) < 2:  # norms and rope.freqs: the same in every shard
        return parts[0]
    if name == "tok_embeddings.weight":
        # Llama 1 and 2 split the model dimension, Llama 3 the vocabulary; the shape tells which.
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
    return Joined(tuple(parts), dim)
