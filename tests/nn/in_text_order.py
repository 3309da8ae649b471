"""Attention on the current mesh, of arrays in the order of the text."""

import jax

from llama_jax.nn import ForwardContext
from llama_jax.nn.attention import attend as kernels, context
from llama_jax.parallel import shard


def attention_and_gradients(q, k, v, direction, ctx: ForwardContext, *, scale: float):
    """`attend` and its gradients along `direction`; where a context axis splits the rows, there and back."""

    def value(q, k, v):
        place = lambda x: context.zigzag(x.swapaxes(1, 2)).swapaxes(1, 2)  # noqa: E731
        y = kernels.attend(context.zigzag(q), place(k), place(v), jax.tree.map(context.zigzag, ctx), scale=scale)
        return context.unzigzag(y)

    out, pull = jax.vjp(value, q, k, v)
    return out, *pull(shard(direction, "batch", "sequence", "heads", None))
