"""The two shapes that the speed figures are about, and how much of each a turn does."""

STORIES15M = {
    "vocab_size": 32000,
    "hidden_size": 288,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 48,
    "intermediate_size": 768,
    "tie_embeddings": True,
}
LLAMA56M = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1376,
    "tie_embeddings": False,
}

TRAIN_STEP = {
    "stories15m": STORIES15M | {"task": "train", "batch_size": 8, "sequence_length": 256},
    "56m": LLAMA56M | {"task": "train", "batch_size": 4, "sequence_length": 512},
}
# What needs no gradient: the loss of the same batches, and the first token after long prompts.
FORWARD = {f"{name}-evaluate": work | {"task": "evaluate"} for name, work in TRAIN_STEP.items()} | {
    f"{name}-prefill": shape | {"task": "prefill", "batch_size": 4, "prompt_length": 512, "new_tokens": 1}
    for name, shape in {"stories15m": STORIES15M, "56m": LLAMA56M}.items()
}
FORWARD_VARIANTS = {"torch-compiled": {"compiled": True, "static_cache": True}}
# Beside float32; torch's are what its users take: `torch.compile`, and autocast of the forward pass and the loss.
TRAIN_VARIANTS = {
    "llama_jax-bf16": {"dtype": "bfloat16"},
    "plain-bf16": {"dtype": "bfloat16"},
    "torch-compiled": {"compiled": True},
    "torch-compiled-bf16": {"compiled": True, "dtype": "bfloat16"},
}
DECODE = {
    f"stories15m-batch{b}": STORIES15M | {"task": "decode", "batch_size": b, "prompt_length": 8, "new_tokens": 128}
    for b in (1, 8, 32)
}
# What changes the work, and so the tokens; `products` are a step's products of matrices alone, the same bytes read.
DECODE_VARIANTS = {
    "llama_jax-int8": {"quantize": "int8"},
    "llama_jax-bf16": {"dtype": "bfloat16"},
    "llama_jax-products": {"products": True},
    "torch-compiled": {"static_cache": True},
    "llamacpp-q8_0": {"quantize": "q8_0"},
}


def tokens_per_step(work: dict) -> int:
    """Tokens that one step trains on or evaluates, that one decoding generates, or of the prompts of one prefill."""
    length = {"decode": "new_tokens", "prefill": "prompt_length"}.get(work["task"], "sequence_length")
    return work["batch_size"] * work[length]
