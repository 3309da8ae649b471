"""The pieces of a model, each a small frozen config dataclass with the module that it builds.

In: a width and a stream of random keys, `config.build(width, rngs=rngs)`. Out: an NNX module. A new attention, norm or
feed-forward is one file here, or one class in a notebook: derive the config from `Mixer`, `FeedForward` or `Norm`.
"""

from llama_jax.nn.attention.grouped_query import GroupedQuery
from llama_jax.nn.feed_forward import SwiGLU
from llama_jax.nn.mixer import FeedForward, Mixer
from llama_jax.nn.norms import Norm, RMSNorm
from llama_jax.nn.positions import LinearScaling, Llama3Scaling, NTKScaling, Rope, RopeScaling, YarnScaling

__all__ = [
    "FeedForward",
    "GroupedQuery",
    "LinearScaling",
    "Llama3Scaling",
    "Mixer",
    "NTKScaling",
    "Norm",
    "RMSNorm",
    "Rope",
    "RopeScaling",
    "SwiGLU",
    "YarnScaling",
]
