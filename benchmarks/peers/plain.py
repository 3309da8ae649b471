"""Peer: the same Llama by its formulas in plain JAX, and optax's AdamW: what a library's speed is held against.

No blocks, chunks, scans or custom gradients. It changes only where the work does, so that a ratio to it keeps its
meaning on a busy machine.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    serve,
    training_tokens,
)

Params = dict[str, jax.Array]


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS) * weight


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of [B, T, N, H]: the two halves of each head are the pairs' first and second numbers."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * ROPE_THETA ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def loss(params: Params, tokens: jax.Array, work: Work) -> jax.Array:
    """Mean cross-entropy of the tokens after the first of each row."""
    dtype = jnp.dtype(work.get("dtype", "float32"))
    cast = {name: w.astype(dtype) for name, w in params.items()}
    x = cast["embedding.weight"][tokens]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for i in range(work["num_layers"]):
        layer = {name: w[i] for name, w in cast.items() if name.startswith("layers.")}

        def project(formula: str, x: jax.Array, name: str, layer: Params = layer) -> jax.Array:
            return jnp.einsum(formula, x, layer[f"layers.{name}_proj.weight"])

        h = norm(x, params["layers.input_layernorm.weight"][i]).astype(dtype)
        q, k, v = (project("btd,dnh->btnh", h, f"attention.{name}") for name in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (jnp.repeat(y, work["num_heads"] // work["num_kv_heads"], 2) for y in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / work["head_dim"] ** 0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), -1).astype(dtype)
        x = x + project("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), "attention.o")
        h = norm(x, params["layers.post_attention_layernorm.weight"][i]).astype(dtype)
        gate, up = (project("btd,df->btf", h, f"feed_forward.{name}") for name in ("gate", "up"))
        x = x + project("btf,fd->btd", jax.nn.silu(gate) * up, "feed_forward.down")
    head = cast["embedding.weight"].T if work["tie_embeddings"] else cast["lm_head.weight"]
    x = norm(x, params["norm.weight"]).astype(dtype)
    logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(work: Work) -> tuple[int, Run]:
    params = {name: jnp.asarray(value) for name, value in parameters(work).items()}
    decay = {name: "norm" not in name for name in params}
    adamw = optax.adamw(LEARNING_RATE, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, mask=decay)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), adamw)
    state = params, optimizer.init(params)

    @jax.jit
    def step(state: tuple, tokens: jax.Array) -> tuple:
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, tokens, work)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    batches: Iterator[np.ndarray] = training_tokens(work)

    def run(steps: int) -> list:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, value = step(state, next(batches))
            losses.append(float(value))
        return losses

    return sum(value.size for value in params.values()), run


if __name__ == "__main__":
    serve(["jax", "optax"], {"train": train})
