"""GGUF files of Hugging Face directories, written by llama.cpp's own writer in the layouts of its converters."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Kind
from sentencepiece import sentencepiece_model_pb2

from llama_jax.checkpoint.formats import read_directory

LAYERS = {
    "llama": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "mlp.gate_up_proj": "ffn_up", "block_sparse_moe.gate": "ffn_gate_inp",
    },
    "gpt2": {
        "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
}  # fmt: skip
OTHERS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's halves of rotary pairs as neighbours."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def named(data: dict[str, Any], tensors: dict[str, np.ndarray], *, fused: bool = False) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names; `fused` joins queries, keys and values."""
    kind = data["model_type"]
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        stem, _, end = name.rpartition(".")
        if stem in OTHERS:
            found[f"{OTHERS[stem]}.{end}"] = value
            continue
        layer, own = stem.removeprefix("model.layers.").removeprefix("transformer.h.").split(".", 1)
        if ".experts." in own:
            continue
        if kind == "gpt2" and value.ndim == 2:
            value = value.T
        if kind in ("llama", "mixtral") and own.endswith(("q_proj", "k_proj")):
            value = permute(value, data["num_attention_heads" if "q_proj" in own else "num_key_value_heads"])
        found[f"blk.{layer}.{LAYERS['gpt2' if kind == 'gpt2' else 'llama'][own]}.{end}"] = value
    if kind == "mixtral":
        for layer in range(data["num_hidden_layers"]):
            for own, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                place = f"model.layers.{layer}.block_sparse_moe.experts"
                parts = [tensors[f"{place}.{i}.{w}.weight"] for i in range(data["num_local_experts"])]
                found[f"blk.{layer}.ffn_{own}_exps.weight"] = np.stack(parts)
    if fused:
        for name in [name for name in found if ".attn_q." in name]:
            parts = [found.pop(name.replace("attn_q", f"attn_{c}")) for c in "qkv"]
            found[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return found


def add_sizes(writer: gguf.GGUFWriter, data: dict[str, Any]) -> None:
    if data["model_type"] == "gpt2":
        writer.add_block_count(data["n_layer"])
        writer.add_context_length(data["n_positions"])
        writer.add_embedding_length(data["n_embd"])
        writer.add_feed_forward_length(4 * data["n_embd"])
        writer.add_head_count(data["n_head"])
        writer.add_layer_norm_eps(data["layer_norm_epsilon"])
        return
    head_dim = data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"]
    writer.add_block_count(data["num_hidden_layers"])
    writer.add_context_length(data["max_position_embeddings"])
    writer.add_embedding_length(data["hidden_size"])
    writer.add_feed_forward_length(data["intermediate_size"])
    writer.add_head_count(data["num_attention_heads"])
    writer.add_head_count_kv(data["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(data["rms_norm_eps"])
    writer.add_rope_freq_base(data["rope_parameters"]["rope_theta"])
    glm = data["model_type"] == "glm"
    writer.add_rope_dimension_count(head_dim // 2 if glm else head_dim)
    if not glm:
        writer.add_vocab_size(data["vocab_size"])
    if data["model_type"] == "mixtral":
        writer.add_expert_count(data["num_local_experts"])
        writer.add_expert_used_count(data["num_experts_per_tok"])


def rope_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1's divisors of the frequencies (meta-llama/llama-models, apply_scaling)."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (turns - low) / (high - low)
        slowed = rope["factor"] if turns < low else 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if turns > high else slowed)
    return np.array(factors, np.float32)


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, pre: str) -> None:
    if (file := directory / "tokenizer.model").is_file():
        model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
        processor = sentencepiece.SentencePieceProcessor(str(file))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.piece for piece in model.pieces])
        writer.add_token_scores([piece.score for piece in model.pieces])
        writer.add_token_types([piece.type for piece in model.pieces])
        writer.add_bos_token_id(processor.bos_id())
        writer.add_eos_token_id(processor.eos_id())
        writer.add_unk_token_id(processor.unk_id())
        return
    data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in data["added_tokens"]}
    ids = data["model"]["vocab"] | {token["content"]: i for i, token in added.items()}
    texts = {i: text for text, i in ids.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(max(texts) + 1)]
    types = [gguf.TokenType.NORMAL if i in texts else gguf.TokenType.UNUSED for i in range(len(tokens))]
    for i, token in added.items():
        types[i] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        token = settings.get(f"{name}_token", config.get(f"{name}_token_id"))
        token = token["content"] if isinstance(token, dict) else token
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            add(ids[token] if isinstance(token, str) else token)


def write_gguf(
    directory: Path,
    file: Path,
    *,
    pre: str = "gpt-2",
    encode: Callable[[str, np.ndarray], tuple[np.ndarray, Kind | None]] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    fused: bool = False,
) -> Path:
    """Write the model of `directory`; `encode` returns the bytes of a tensor and their type, `extra` adds metadata."""
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tensors = {name: np.array(tensor.read()) for name, tensor in read_directory(directory).items()}
    architecture: str = {"glm": "chatglm", "mixtral": "llama"}.get(data["model_type"]) or data["model_type"]
    writer = gguf.GGUFWriter(file, architecture)
    add_sizes(writer, data)
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        add_tokenizer(writer, directory, pre)
    settings = directory / "tokenizer_config.json"
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    if (jinja := directory / "chat_template.jinja").is_file():
        template = jinja.read_text(encoding="utf-8")
    if template is not None:
        writer.add_chat_template(template)
    if extra is not None:
        extra(writer)
    found = named(data, tensors, fused=fused)
    if data.get("rope_parameters", {}).get("rope_type") == "llama3":
        found["rope_freqs.weight"] = rope_factors(data["rope_parameters"], data["head_dim"])
    for name, value in found.items():
        value, kind = (value, None) if encode is None or value.ndim < 2 else encode(name, value)
        writer.add_tensor(name, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
