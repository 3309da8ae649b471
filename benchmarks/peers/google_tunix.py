"""Peer: google-tunix's Llama 3: the jitted step of its PeftTrainer (full parameters), and its Sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
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


def build(work: Work) -> Llama3:
    config = ModelConfig(
        num_layers=work["num_layers"],
        vocab_size=work["vocab_size"],
        embed_dim=work["hidden_size"],
        hidden_dim=work["intermediate_size"],
        num_heads=work["num_heads"],
        head_dim=work["head_dim"],
        num_kv_heads=work["num_kv_heads"],
        rope_theta=int(ROPE_THETA),
        norm_eps=NORM_EPS,
        weight_tying=work["tie_embeddings"],
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    weights = parameters(work)

    def put(variable: nnx.Variable, value: np.ndarray) -> None:
        assert variable.shape == value.shape, (variable.shape, value.shape)
        variable.set_value(jnp.asarray(value))

    put(model.embedder.input_embedding, weights["embedding.weight"])
    put(model.final_norm.w, weights["norm.weight"])
    if not work["tie_embeddings"]:
        put(model.lm_head.w, weights["lm_head.weight"])
    for i, layer in enumerate(model.layers):
        stacked = {name.removeprefix("layers."): w[i] for name, w in weights.items() if name.startswith("layers.")}
        put(layer.input_layernorm.w, stacked["input_layernorm.weight"])
        put(layer.post_attention_layernorm.w, stacked["post_attention_layernorm.weight"])
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            put(getattr(layer.attn, name).w, stacked[f"attention.{name}.weight"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, name).kernel, stacked[f"feed_forward.{name}.weight"])
    return model


def count(model: Llama3) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def train(work: Work) -> tuple[int, Run]:
    model = build(work)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            LEARNING_RATE,
            *BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            mask=lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree),
        ),
    )

    def model_input(tokens: jax.Array) -> dict:
        mask = jnp.ones_like(tokens, bool)
        return {
            "input_tokens": tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9))
    trainer = trainer.with_gen_model_input_fn(model_input)
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    batches = training_tokens(work)

    def run(steps: int) -> list:
        losses = [step(next(batches))[0] for _ in range(steps)]
        jax.block_until_ready(nnx.state(model))
        return [float(loss) for loss in losses]

    return count(model), run


class Ids:
    """A tokenizer whose text is the token ids themselves: the sampler accepts only strings."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return -1  # never generated: no row stops early

    def pad_id(self) -> int:
        return -2


def decode(work: Work) -> tuple[int, Run]:
    model = build(work)
    # The sampler rounds prompts up to a power of two; the prompts' length is one already.
    cache = CacheConfig(
        cache_size=work["prompt_length"] + work["new_tokens"],
        num_layers=work["num_layers"],
        num_kv_heads=work["num_kv_heads"],
        head_dim=work["head_dim"],
    )
    sampler = Sampler(model, Ids(), cache)
    prompts = [" ".join(map(str, row)) for row in prompt_tokens(work)]

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        for _ in range(steps):
            output = sampler(prompts, max_generation_steps=new_tokens)
        return [np.asarray(row).tolist() for row in output.tokens]

    return count(model), run


if __name__ == "__main__":
    serve(["google-tunix", "jax", "flax"], {"train": train, "decode": decode})
