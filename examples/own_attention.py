"""Train with an attention of your own, which scores by the cosine of queries and keys.

python examples/own_attention.py TEXT_FILES RUN_DIRECTORY [key=value ...]
"""

import dataclasses
import sys

import jax.numpy as jnp

import llama_jax
from llama_jax.nn import Mixer, MixerModule, Projection, attend, child


@dataclasses.dataclass(frozen=True)
class CosineAttention(Mixer):
    num_heads: int = 4
    head_dim: int = 64

    def build(self, width, *, rngs):
        return CosineAttentionModule(self, width, rngs=rngs)


class CosineAttentionModule(MixerModule):
    def __init__(self, config, width, *, rngs):
        outer, heads = {"embed": width}, {"heads": config.num_heads, "_head_dim": config.head_dim}
        self.q_proj = Projection(outer, heads, bias=False, rngs=child(rngs, "q_proj"))
        self.k_proj = Projection(outer, heads, bias=False, rngs=child(rngs, "k_proj"))
        self.o_proj = Projection(heads, outer, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(self, x, *, positions, ctx, cache=None):
        q, k = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (self.q_proj(x), self.k_proj(x)))
        k = k.swapaxes(1, 2)  # [B, T, N, H] -> [B, N, T, H]; keys are values too
        return self.o_proj(attend(q, k, k, ctx, scale=10.0)), cache


def main(texts: str, directory: str, *changes: str) -> None:
    keys = {"data.path": texts, "data.exclude": (), "num_steps": 100, "logging.sample_prompts": ()}
    keys |= {"model.attention": CosineAttention(), **dict(change.split("=", 1) for change in changes)}
    config = llama_jax.load_config("tiny_python", keys)
    run = llama_jax.train(config, directory, components=(CosineAttention,))  # no cache, so it cannot sample
    print("loss", [round(row["loss"], 2) for row in run.metrics()])


if __name__ == "__main__":
    main(*sys.argv[1:])
