"""Tensors and config of a GGUF file, under the names that the families have for them.

llama.cpp's names of tensors and of metadata: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py; the
layouts are those of its converters. A Llama's queries and keys have the rotary pairs interleaved, as in Meta's files:
the files of this architecture are read with Meta's names.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.formats.tensors import BFLOAT16, Slices, Tensor, Tensors, cut, item, stored, transposed
from llama_jax.config import Json, UserError
from llama_jax.gguf_header import Entry, Header
from llama_jax.nn import Llama3Scaling, Rope

# Types of tensors whose elements are numbers, by number.
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: BFLOAT16}


def _tensor(name: str, entry: Entry) -> Tensor:
    """Return a tensor, in float32 where it is quantized. Raises UserError for a type or size that cannot be."""
    dtype = _PLAIN.get(entry.kind)
    block, nbytes, dequantize = (1, dtype.itemsize, None) if dtype is not None else _quantization(name, entry)
    *rows, width = entry.shape or (1,)
    size = math.prod(rows) * -(-width // block) * nbytes
    if width % block or entry.offset + size > entry.file.stat().st_size:
        raise UserError(f"'{entry.file}' is truncated or damaged: '{name}' does not fit into it: download it again")
    if dtype is not None:
        return stored(entry.file, entry.offset, dtype, entry.shape)
    raw = stored(entry.file, entry.offset, np.dtype(np.uint8), (*rows, width // block * nbytes))

    def fetch(slices: Slices) -> np.ndarray:
        found = np.asarray(raw.read(slices[:-1]))
        if found.size == 0 or dequantize is None:
            return np.empty((*found.shape[:-1], width), np.float32)[..., slices[-1]]
        with np.errstate(all="ignore"):  # the scales of a damaged file may be any number
            return dequantize(found)[..., slices[-1]]

    return Tensor(entry.shape, np.dtype(np.float32), fetch)


def _quantization(name: str, entry: Entry) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    """Return the elements and the bytes of a block, and what makes float32 of rows of blocks."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError:
        raise UserError(
            f"'{entry.file}' has quantized weights, which need the package gguf: pip install 'llama_jax[gguf]'"
        ) from None
    try:
        kind = GGMLQuantizationType(entry.kind)
        block, nbytes = GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise UserError(f"'{entry.file}' has '{name}' in type {entry.kind}, which is not known") from None
    return block, nbytes, lambda rows: quants.dequantize(rows, kind)


class Architecture(NamedTuple):
    """An architecture of llama.cpp as a family here, with its names by llama.cpp's.

    `keys` of the metadata are without the architecture, `names` of tensors without `blk.N.`, for which the family has
    `layer` and N.
    """

    model_type: str
    layer: str
    keys: Mapping[str, str]
    names: Mapping[str, str]


_SIZES = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
_LLAMA = Architecture("llama", "layers.", _SIZES | {"attention.key_length": "head_dim"}, {
    "token_embd": "tok_embeddings", "output_norm": "norm", "attn_norm": "attention_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate", "ffn_gate_exps": "feed_forward.experts.{}.w1",
    "ffn_up_exps": "feed_forward.experts.{}.w3", "ffn_down_exps": "feed_forward.experts.{}.w2",
})  # fmt: skip
_GPT2 = Architecture("gpt2", "transformer.h.", {
    "embedding_length": "n_embd", "block_count": "n_layer", "attention.head_count": "n_head",
    "feed_forward_length": "n_inner", "context_length": "n_positions",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}, {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
})  # fmt: skip
_GLM = Architecture("glm", "model.layers.", _SIZES, {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
})  # fmt: skip
ARCHITECTURES = {"llama": _LLAMA, "gpt2": _GPT2, "chatglm": _GLM}
# Keys that the shapes of the tensors decide, or that change no logit.
_DECIDED = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}


def architecture_of(path: Path, header: Header) -> Architecture:
    """Return the architecture of a file. Raises UserError for one that no family here has."""
    name = header.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"'{path}' has general.architecture={name!r}, and of GGUF files {', '.join(ARCHITECTURES)} are read: take "
            "the release that these weights were made from"
        )
    found = ARCHITECTURES[name]
    return found._replace(model_type="mixtral") if header.metadata.get("llama.expert_count") else found


def config_json(path: Path, header: Header) -> Json:
    """Return the config.json that says what the metadata say.

    Raises UserError for a key that nobody reads and that may change a logit, and for sizes that cannot be.
    """
    kind, entries = architecture_of(path, header), header.entries
    prefix = f"{header.metadata['general.architecture']}."
    given = {name: value for key, value in header.metadata.items() if (name := key.removeprefix(prefix)) != key}

    def take(key: str, default: Any = None) -> Any:
        value = given.pop(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:  # of each layer
            value = value[0]
        limit = len(entries) if key == "block_count" else 1 << 30
        if isinstance(value, int | float) and not -limit <= value <= limit:
            raise UserError(f"'{path}' has {prefix}{key}={value}, and no model has: it is damaged, download it again")
        return value

    data = {name: value for key, name in kind.keys.items() if (value := take(key)) not in (None, 0)}
    data["vocab_size"] = entries["token_embd.weight"].shape[0] if "token_embd.weight" in entries else 0
    data["tie_word_embeddings"] = "output.weight" not in entries
    heads, width = data.get("num_attention_heads"), data.get("hidden_size")
    if kind is not _GPT2 and type(heads) is int and type(width) is int and heads > 0:
        data.setdefault("num_key_value_heads", heads)
        share, turned = (2 if kind is _GLM else 1), given.get("rope.dimension_count")  # GLM turns half of a head
        size = data.setdefault("head_dim", share * turned if kind is _GLM and type(turned) is int else width // heads)
        only = {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size // share}
        for key, value in only.items():
            if (found := take(key, value)) != value:
                raise UserError(f"'{path}' has {prefix}{key}={found}, and only {value} is supported here")
        data["rope_scaling"] = _rope_scaling(path, header, data, take)
    if kind is _GLM:
        data["attention_bias"] = any(name.endswith(("attn_qkv.bias", "attn_q.bias")) for name in entries)
    for key, value in given.items():
        if key not in _DECIDED and value not in (None, False, 0, "", []):
            raise UserError(
                f"'{path}' has {prefix}{key}={value!r}, which is not supported; where it changes no logit, pass "
                f"--ignore-config-keys {prefix}{key}"
            )
    return data


def _rope_scaling(path: Path, header: Header, data: Json, take: Callable[..., Any]) -> Json | None:
    """Return `rope_scaling` of config.json; `take(key, default)` takes a value of the metadata."""
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor") or take("rope.scale_linear")
    length = take("rope.scaling.original_context_length")
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    if kind in ("none", "linear") and (entry := header.entries.get("rope_freqs.weight")) is not None:
        # Llama 3.1's scaling is in the file as what every frequency is divided by.
        found = np.asarray(_tensor("rope_freqs.weight", entry).read(), np.float32)
        factor = float(str(found.max(initial=1)))
        if found.shape == (data["head_dim"] // 2,) and found.min() >= 1 and factor < math.inf:
            plain = Rope(float(data.get("rope_theta", 10_000.0)), None).frequencies(data["head_dim"])
            between = (found > 1.001) & (found < 0.999 * factor)  # on the ramp, which shows the original length
            keep = (1 / found - 1 / factor) / (1 - 1 / factor) if factor > 1 else found
            lengths = (2 * math.pi / plain * (1 + 3 * keep))[between]
            scaling = Llama3Scaling(factor, 1.0, 4.0, round(float(lengths[0])) if lengths.size else 8192)
            if np.allclose(found, plain / scaling.frequencies(plain, 0.0, 0), rtol=1e-3):
                own = dataclasses.asdict(scaling)
                length = own.pop("original_max_positions")
                return {"rope_type": "llama3", "original_max_position_embeddings": length, **own}
        raise UserError(f"'{path}' has rope_freqs.weight, and its values are not those of Llama 3.1's scaling")
    return {"rope_type": kind, "factor": factor} if kind != "none" and factor not in (None, 0, 1) else None


def read_gguf(path: Path, header: Header, config: Json) -> Tensors:
    """Return the tensors of a file under the names of its family; `config` is its `config_json`.

    Experts of a layer are one tensor in the file, in older ones several. Raises UserError for types that are not
    known and for tensors that do not fit into the file.
    """
    kind, tensors = architecture_of(path, header), {}
    for name, entry in header.entries.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+?)(?:\.(\d+))?\.(weight|bias)", name)
        if name == "rope_freqs.weight" or match is None:
            tensors |= {} if match else {name: _tensor(name, entry)}
            continue
        layer, own, expert, end = match.groups()
        theirs, tensor = kind.names.get(f"{own}_exps" if expert else own, own), _tensor(name, entry)
        place = f"{kind.layer}{layer}." if layer else ""
        if expert or ("{}" in theirs and len(tensor.shape) == 3):
            parts = {int(expert): tensor} if expert else {i: item(tensor, i) for i in range(tensor.shape[0])}
            tensors |= {f"{place}{theirs.format(i)}.{end}": part for i, part in parts.items()}
        elif own == "attn_qkv" and kind is _GLM:
            tensors |= _cut_heads(f"{place}self_attn", end, tensor, config)
        else:  # GPT-2's own matrices are [in, out]
            turns = kind is _GPT2 and layer and len(tensor.shape) == 2
            tensors[f"{place}{theirs}.{end}"] = transposed(tensor) if turns else tensor
    return tensors


def _cut_heads(place: str, end: str, whole: Tensor, config: Json) -> Tensors:
    """Return the projections of queries, keys and values that are joined in `whole`."""
    keys = config["num_key_value_heads"] * config["head_dim"]
    rows = whole.shape[0] if whole.shape else 0
    stops = [0, rows - 2 * keys, rows - keys, rows]
    return {f"{place}.{name}_proj.{end}": cut(whole, 0, *stops[i : i + 2]) for i, name in enumerate("qkv")}
