"""Peer: transformers' Llama in PyTorch, eager or compiled: a training step with the fused AdamW, and `generate`."""

import numpy as np
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from worker import (
    BETAS,
    CLIP,
    EPS,
    LEARNING_RATE,
    NORM_EPS,
    ROPE_THETA,
    WEIGHT_DECAY,
    Run,
    Work,
    parameters,
    prompt_tokens,
    serve,
    training_tokens,
)

PROJECTIONS = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "mlp.gate_proj": "feed_forward.gate_proj",
    "mlp.up_proj": "feed_forward.up_proj",
    "mlp.down_proj": "feed_forward.down_proj",
}


def build(work: Work) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=work["vocab_size"],
        hidden_size=work["hidden_size"],
        intermediate_size=work["intermediate_size"],
        num_hidden_layers=work["num_layers"],
        num_attention_heads=work["num_heads"],
        num_key_value_heads=work["num_kv_heads"],
        head_dim=work["head_dim"],
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=work["tie_embeddings"],
        max_position_embeddings=2048,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    weights = parameters(work)
    embedding, norm = weights["embedding.weight"], weights["norm.weight"]
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    state["lm_head.weight"] = embedding if work["tie_embeddings"] else weights["lm_head.weight"].T
    d = work["hidden_size"]
    for i in range(work["num_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{name}.weight"] = weights[f"layers.{name}.weight"][i]
        for theirs, name in PROJECTIONS.items():
            w = weights[f"layers.{name}.weight"][i]
            matrix = w.reshape(-1, d) if name == "attention.o_proj" else w.reshape(w.shape[0], -1)
            state[f"model.layers.{i}.{theirs}.weight"] = matrix.T
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(w)) for name, w in state.items()})
    return model


def train(work: Work) -> tuple[int, Run]:
    model = build(work).train()
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    batches = training_tokens(work)
    forward = torch.compile(model) if work.get("compiled") else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=work.get("dtype") == "bfloat16")

    def run(steps: int) -> list:
        losses = []
        for _ in range(steps):
            tokens = torch.from_numpy(next(batches).astype(np.int64))
            with autocast:
                loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    return sum(w.numel() for w in weights), run


def evaluate(work: Work) -> tuple[int, Run]:
    model = build(work).eval()
    batches = training_tokens(work)
    forward = torch.compile(model) if work.get("compiled") else model

    @torch.no_grad()
    def run(steps: int) -> list:
        tokens = [torch.from_numpy(next(batches).astype(np.int64)) for _ in range(steps)]
        return [forward(input_ids=x, labels=x, use_cache=False).loss.item() for x in tokens]

    return sum(w.numel() for w in model.parameters()), run


def decode(work: Work) -> tuple[int, Run]:
    model = build(work).eval()
    prompts = torch.from_numpy(prompt_tokens(work).astype(np.int64))
    mask = torch.ones_like(prompts)
    options = {}
    if work.get("static_cache"):  # which transformers compiles on a CPU only where it is asked to
        compiled = CompileConfig(fullgraph=True)
        compiled._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compiled}

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        for _ in range(steps):
            output = model.generate(
                prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options
            )
        return output[:, work["prompt_length"] :].tolist()

    return sum(w.numel() for w in model.parameters()), run


if __name__ == "__main__":
    serve(["torch", "transformers"], {"train": train, "evaluate": evaluate, "decode": decode, "prefill": decode})
