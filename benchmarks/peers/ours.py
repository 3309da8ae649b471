"""This library: `make_train_step` and `generate`, as a user would call them."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
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

from llama_jax.models import Compute, DecoderConfig, from_params
from llama_jax.nn import GroupedQuery, RMSNorm, Rope, SwiGLU
from llama_jax.run.hardware import settle
from llama_jax.training import CPU_COMPILER_OPTIONS, AdamW, init_state, make_eval_step, make_train_step

COMPUTE = Compute(dtype="float32", scan_layers=False)


def model_config(work: Work) -> DecoderConfig:
    heads = {name: work[name] for name in ("num_heads", "num_kv_heads", "head_dim")}
    return DecoderConfig(
        vocab_size=work["vocab_size"],
        hidden_size=work["hidden_size"],
        num_layers=work["num_layers"],
        max_positions=1024,
        attention=GroupedQuery(**heads, rope=Rope(ROPE_THETA, None), qkv_bias=False, out_bias=False),
        feed_forward=SwiGLU(work["intermediate_size"], bias=False),
        norm=RMSNorm(NORM_EPS),
        tie_embeddings=work["tie_embeddings"],
    )


def weights(work: Work) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in parameters(work).items()}


def count(params: dict[str, jax.Array]) -> int:
    return sum(value.size for value in params.values())


def train(work: Work) -> tuple[int, Run]:
    optimizer = AdamW(
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        final_fraction=1.0,
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        clip_norm=CLIP,
    )
    hyper = optimizer.hyper(num_steps=1000)
    compute = dataclasses.replace(COMPUTE, dtype=work.get("dtype", "float32"))
    step = make_train_step(model_config(work), compute, compiler_options=CPU_COMPILER_OPTIONS)
    params = weights(work)
    num_parameters = count(params)
    state = init_state(params, hyper)
    batches, taken = training_tokens(work), itertools.count()

    def run(steps: int) -> list:
        nonlocal state
        losses = []
        for _ in range(steps):
            tokens = batch(next(batches))
            settle(next(taken), step, state, tokens, hyper)  # as `train` does
            state, metrics = step(state, tokens, hyper)
            losses.append(float(metrics["loss"]))
        return losses

    return num_parameters, run


def evaluate(work: Work) -> tuple[int, Run]:
    step, params, batches = make_eval_step(model_config(work), COMPUTE), weights(work), training_tokens(work)

    def run(steps: int) -> list:
        sums = [step(params, batch(next(batches))) for _ in range(steps)]
        return [float(nats / targets) for nats, targets in sums]

    return count(params), run


def batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0  # the target of the last token is not in the batch
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segment_ids = np.ones(tokens.shape, np.int32)
    targets = np.roll(tokens, -1, axis=1)
    fields = {"targets": targets, "weights": weights, "segment_ids": segment_ids, "positions": positions}
    return {"tokens": tokens} | fields


def decode(work: Work) -> tuple[int, Run]:
    from llama_jax.sampling import generate

    params = weights(work)
    if work.get("products"):
        return count(params), products(work, params)
    compute = dataclasses.replace(COMPUTE, dtype=work.get("dtype", "float32"))
    model = from_params(model_config(work), params, compute)
    if "quantize" in work:
        model = model.quantized(work["quantize"])
    prompt = prompt_tokens(work)

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        for _ in range(steps):
            tokens = np.asarray(generate(model, prompt, max_new_tokens=new_tokens))
        return tokens[:, prompt.shape[1] :].tolist()

    return count(params), run


def products(work: Work, params: dict[str, jax.Array]) -> Run:
    """Return the products of decoding alone: every matrix [I, O] times one vector of each row, nothing else."""
    matrices = []
    for name, value in params.items():
        if value.ndim >= 3:
            inputs = 2 if "o_proj" in name else 1
            size = math.prod(value.shape[1 : 1 + inputs])
            matrices += [jnp.array(layer.reshape(size, -1)) for layer in value]
    matrices.append(jnp.array(params["embedding.weight"].T if work["tie_embeddings"] else params["lm_head.weight"]))

    @jax.jit
    def steps_of(matrices: list[jax.Array], scale: jax.Array, count: jax.Array) -> jax.Array:
        def step(_: jax.Array, scale: jax.Array) -> jax.Array:
            # Each vector depends on the product before, as in a model.
            for matrix in matrices:
                x = jnp.full((work["batch_size"], len(matrix)), scale)
                scale = (x @ matrix).max() * 0 + 1
            return scale

        return jax.lax.fori_loop(0, count, step, scale)

    def run(steps: int, new_tokens: int = work["new_tokens"]) -> list:
        return [float(steps_of(matrices, jnp.float32(1), steps * new_tokens))]

    return run


if __name__ == "__main__":
    serve(["jax", "flax"], {"train": train, "evaluate": evaluate, "decode": decode, "prefill": decode})
