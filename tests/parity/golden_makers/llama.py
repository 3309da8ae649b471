"""Llama, Meta's files of it, and what torch pickles."""

import json
import shutil
from functools import partial

import numpy as np
import torch
from golden_makers.common import GOLDENS, PROMPT_LENGTH, divide, greedy, numbered, outputs, randomize, search
from transformers import LlamaConfig, LlamaForCausalLM

BASE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LLAMA_CASES = {
    "llama_mha": {"num_key_value_heads": 4},
    "llama_gqa": {"rms_norm_eps": 1e-6},
    "llama_mqa_biases": {"num_key_value_heads": 1, "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_rope_llama3": {"head_dim": 16, "rope_parameters": LLAMA3},
    "llama_rope_yarn": {"head_dim": 16, "rope_parameters": YARN},
    "llama_rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
}


def make_llama(name: str, changes: dict) -> None:
    config = LlamaConfig(**(BASE | changes), attn_implementation="eager")
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, config.vocab_size, (2, 24)))

    def build(seed: int) -> LlamaForCausalLM:
        model = LlamaForCausalLM(config).float().eval()
        randomize(model, seed)
        divide([model.model.norm.weight], model(ids).logits.std())  # the head may be tied
        return model

    model, found = search(name, build, lambda model: greedy(lambda ids: model(ids).logits, ids[:, :PROMPT_LENGTH]))
    with outputs(numbered("layer", model.model.layers)) as hidden:
        logits = model(ids).logits.numpy()
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "expected.npz",
        ids=ids.numpy().astype(np.int32),
        logits=logits,
        generated=found["generated"].numpy().astype(np.int32),
        margin=found["margin"],
        **{key: value.numpy() for key, value in hidden.items()},
    )


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from halves (Hugging Face) to interleaved pairs (Meta)."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def make_meta(name: str, source: str, num_shards: int, vocab_parallel: bool) -> None:
    """Meta's files of the same model as `source`: Llama 2 splits the embedding's width, Llama 3 the vocabulary."""
    model = LlamaForCausalLM.from_pretrained(GOLDENS / source).float()
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    full = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
        "rope.freqs": torch.ones(3),
    }
    for i, block in enumerate(model.model.layers):
        full |= {
            f"layers.{i}.attention.wq.weight": interleave(block.self_attn.q_proj.weight, heads),
            f"layers.{i}.attention.wk.weight": interleave(block.self_attn.k_proj.weight, kv_heads),
            f"layers.{i}.attention.wv.weight": block.self_attn.v_proj.weight,
            f"layers.{i}.attention.wo.weight": block.self_attn.o_proj.weight,
            f"layers.{i}.feed_forward.w1.weight": block.mlp.gate_proj.weight,
            f"layers.{i}.feed_forward.w2.weight": block.mlp.down_proj.weight,
            f"layers.{i}.feed_forward.w3.weight": block.mlp.up_proj.weight,
            f"layers.{i}.attention_norm.weight": block.input_layernorm.weight,
            f"layers.{i}.ffn_norm.weight": block.post_attention_layernorm.weight,
        }
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for rank in range(num_shards):
        shard = {}
        for key, value in full.items():
            value = value.detach()
            if value.ndim == 2:
                by_rows = any(part in key for part in ("wq", "wk", "wv", "w1", "w3", "output"))
                if "tok_embeddings" in key:
                    by_rows = vocab_parallel
                dim, pieces, piece = (0 if by_rows else 1), num_shards, rank
                if ("wk" in key or "wv" in key) and kv_heads < num_shards:
                    pieces, piece = kv_heads, rank * kv_heads // num_shards
                value = value.chunk(pieces, dim)[piece].clone()
            shard[key] = value
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": -1,
        "multiple_of": 8,
        "norm_eps": config.rms_norm_eps,
    }
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    shutil.copy(GOLDENS / source / "expected.npz", folder)


def make_bin(name: str, source: str) -> None:
    """The model of `source` as `pytorch_model-*.bin` in two files with an index."""
    model = LlamaForCausalLM.from_pretrained(GOLDENS / source).float()
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = model.state_dict()
    keys = list(state)
    places = {key: f"pytorch_model-0000{1 + (i > len(keys) // 2)}-of-00002.bin" for i, key in enumerate(keys)}
    for file in sorted(set(places.values())):
        torch.save({key: state[key] for key in keys if places[key] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    shutil.copy(GOLDENS / source / "config.json", folder)
    shutil.copy(GOLDENS / source / "expected.npz", folder)


def make_torch_file() -> None:
    """One file with every dtype and the awkward layouts, and its values as numpy has them."""
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        dtype: torch.arange(-3, 4).to(getattr(torch, dtype))
        for dtype in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
    }
    tensors |= {
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "transposed": base.T,
        "shared_view": base[1:3, ::2],
        "expanded": torch.ones(3).expand(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    torch.save(tensors, GOLDENS / "torch.pth")
    torch.save(tensors, GOLDENS / "torch_before_1_6.pth", _use_new_zipfile_serialization=False)
    later = {"_use_new_zipfile_serialization": False, "pickle_protocol": 4}
    torch.save(tensors, GOLDENS / "torch_before_1_6_protocol_4.pth", **later)
    np.savez_compressed(
        GOLDENS / "torch_expected.npz",
        **{
            name: (t.detach().float() if t.dtype == torch.bfloat16 else t.detach()).numpy()
            for name, t in tensors.items()
        },
    )


CASES = {name: partial(make_llama, name, changes) for name, changes in LLAMA_CASES.items()} | {
    "llama_gqa_bin": partial(make_bin, "llama_gqa_bin", "llama_gqa"),
    "meta_llama2_2_shards": partial(make_meta, "meta_llama2_2_shards", "llama_gqa", 2, vocab_parallel=False),
    "meta_llama3_4_shards": partial(make_meta, "meta_llama3_4_shards", "llama_gqa", 4, vocab_parallel=True),
    "torch_file": make_torch_file,
}
