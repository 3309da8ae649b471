"""Peer: llama.cpp by llama-cpp-python: greedy decoding of as many sequences as the work has rows."""

import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from worker import NORM_EPS, ROPE_THETA, Run, Work, parameters, prompt_tokens, serve

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
NUM_THREADS = 2
CONTEXT = 256  # positions of a sequence


def write(path: Path, work: Work, quantized: bool) -> int:
    """Write the work's weights as a GGUF file, matrices in F32 or Q8_0; returns the number of parameters."""
    d, h = work["hidden_size"], work["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(d)
    writer.add_block_count(work["num_layers"])
    writer.add_feed_forward_length(work["intermediate_size"])
    writer.add_head_count(work["num_heads"])
    writer.add_head_count_kv(work["num_kv_heads"])
    writer.add_key_length(h)
    writer.add_value_length(h)
    writer.add_rope_dimension_count(h)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(work["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, values: np.ndarray) -> None:
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantized and values.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))

    weights = parameters(work)
    add("token_embd.weight", weights["embedding.weight"])
    add("output_norm.weight", weights["norm.weight"])
    if not work["tie_embeddings"]:
        add("output.weight", weights["lm_head.weight"].T)
    for name, theirs in NAMES.items():
        for i, w in enumerate(weights[f"layers.{name}.weight"]):
            if w.ndim > 1:
                w = w.reshape(-1, d).T if name == "attention.o_proj" else w.reshape(len(w), -1).T
            if theirs in ("attn_q", "attn_k"):  # the two halves of a head alternate in llama.cpp's files
                w = w.reshape(-1, 2, h // 2, d).swapaxes(1, 2).reshape(w.shape)
            add(f"blk.{i}.{theirs}.weight", w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(w.size for w in weights.values())


def decode(work: Work) -> tuple[int, Run]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        num_parameters = write(path, work, work.get("quantize") == "q8_0")
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    prompts = prompt_tokens(work)
    rows = len(prompts)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = CONTEXT * rows
    options.n_batch = options.n_ubatch = 512
    options.n_seq_max = rows
    options.n_threads = options.n_threads_batch = NUM_THREADS
    if "quantize" not in work:  # its flash attention is off by 2e-3 in the logits, and its cache is float16
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(prompts.size, 0, 1)

    def forward(tokens: np.ndarray, start: int) -> np.ndarray:
        """Run tokens [B, T] at the positions from `start`; returns the best token after each row."""
        batch.n_tokens = tokens.size
        for i, ((row, t), token) in enumerate(np.ndenumerate(tokens)):
            batch.token[i], batch.pos[i] = int(token), start + t
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = t == tokens.shape[1] - 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        last = np.arange(1, rows + 1) * tokens.shape[1] - 1
        shape = (work["vocab_size"],)
        logits = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, int(i)), shape) for i in last]
        return np.array([row.argmax() for row in logits])

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        for _ in range(steps):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            tokens = [forward(prompts, 0)]
            for i in range(new_tokens - 1):
                tokens.append(forward(tokens[-1][:, None], prompts.shape[1] + i))
        return np.stack(tokens, 1).tolist()

    return num_parameters, run


if __name__ == "__main__":
    serve(["llama-cpp-python"], {"decode": decode})
