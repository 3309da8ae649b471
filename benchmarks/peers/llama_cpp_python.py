"""Peer: llama.cpp by llama-cpp-python, float32 and Q8_0: greedy decoding of one text."""

import os
import tempfile
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama
from worker import NORM_EPS, ROPE_THETA, Run, Work, parameters, prompt_tokens, serve

MATRICES = {
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows [O, I] of queries or keys in llama.cpp's order: the halves of a head take turns."""
    outputs, inputs = matrix.shape
    return matrix.reshape(heads, 2, outputs // heads // 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)


def write(path: Path, work: Work) -> int:
    """Write the weights as a GGUF file and return their number."""
    weights, d = parameters(work), work["hidden_size"]
    kind = gguf.GGMLQuantizationType.Q8_0 if work.get("quantize") == "q8_0" else gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(d)
    writer.add_block_count(work["num_layers"])
    writer.add_feed_forward_length(work["intermediate_size"])
    writer.add_head_count(work["num_heads"])
    writer.add_head_count_kv(work["num_kv_heads"])
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_rope_dimension_count(work["head_dim"])
    writer.add_vocab_size(work["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)

    add("token_embd.weight", weights["embedding.weight"])
    add("output_norm.weight", weights["norm.weight"])
    if not work["tie_embeddings"]:
        add("output.weight", weights["lm_head.weight"].T)
    for i in range(work["num_layers"]):
        add(f"blk.{i}.attn_norm.weight", weights["layers.input_layernorm.weight"][i])
        add(f"blk.{i}.ffn_norm.weight", weights["layers.post_attention_layernorm.weight"][i])
        for ours, theirs in MATRICES.items():
            w = weights[f"layers.{ours}.weight"][i]
            matrix = (w.reshape(-1, d) if "o_proj" in ours else w.reshape(w.shape[0], -1)).T
            heads = {"attn_q": work["num_heads"], "attn_k": work["num_kv_heads"]}.get(theirs)
            add(f"blk.{i}.{theirs}.weight", interleaved(matrix, heads) if heads else matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(value.size for value in weights.values())


def decode(work: Work) -> tuple[int, Run]:
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = write(Path(folder) / "model.gguf", work)
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        model = Llama(str(Path(folder) / "model.gguf"), n_ctx=256, n_threads=threads, n_gpu_layers=0, verbose=False)
    prompt = prompt_tokens(work)[0].tolist()

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        for _ in range(steps):
            model.reset()
            model.eval(prompt)
            tokens = []
            for _ in range(new_tokens):
                tokens.append(int(np.argmax(np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),)))))
                if len(tokens) < new_tokens:
                    model.eval(tokens[-1:])
        return [tokens]

    return num_parameters, run


if __name__ == "__main__":
    serve(["llama_cpp_python"], {"decode": decode})
