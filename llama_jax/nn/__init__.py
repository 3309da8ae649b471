"""The pieces of a model, each a small frozen config dataclass with the module that it builds.

In: a width and a stream of random keys, `config.build(width, rngs=rngs)`. Out: an NNX module. A new attention, norm or
feed-forward is one file here, or one class in a notebook: derive the config from `Mixer`, `FeedForward` or `Norm`, what
it builds from `MixerModule` or `FeedForwardModule`.
"""

from llama_jax.nn.absolute_positions import LearnedPositions, Positions, PositionsModule, SinusoidalPositions
from llama_jax.nn.attention.cross import CrossAttention, CrossAttentionModule
from llama_jax.nn.attention.grouped_query import GroupedQuery
from llama_jax.nn.attention.kernels import attend
from llama_jax.nn.attention.latent import LatentAttention
from llama_jax.nn.attention.sparse import SparseLatentAttention
from llama_jax.nn.experts import Experts, GShardRouter, Router, SigmoidTopK, SoftmaxTopK, SwitchRouter
from llama_jax.nn.feed_forward import MLP, GatedLinearUnit, SwiGLU
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import FeedForward, FeedForwardModule, Mixer, MixerModule
from llama_jax.nn.norms import LayerNorm, Norm, RMSNorm
from llama_jax.nn.parameters import Projection, child, parameter, seed_key, seed_value, use
from llama_jax.nn.position_bias import Alibi, PositionBias, PositionBiasModule, RelativeBias
from llama_jax.nn.positions import LinearScaling, Llama3Scaling, NTKScaling, Rope, RopeScaling, YarnScaling
from llama_jax.nn.recurrent import GRU, LSTM, BidirectionalRNN, ElmanRNN, NGram

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "Alibi",
    "AttentionMask",
    "BidirectionalRNN",
    "CrossAttention",
    "CrossAttentionModule",
    "ElmanRNN",
    "Experts",
    "FeedForward",
    "FeedForwardModule",
    "GShardRouter",
    "GatedLinearUnit",
    "GroupedQuery",
    "LatentAttention",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "Mixer",
    "MixerModule",
    "NGram",
    "NTKScaling",
    "Norm",
    "PositionBias",
    "PositionBiasModule",
    "Positions",
    "PositionsModule",
    "Projection",
    "RMSNorm",
    "RelativeBias",
    "Rope",
    "RopeScaling",
    "Router",
    "SigmoidTopK",
    "SinusoidalPositions",
    "SoftmaxTopK",
    "SparseLatentAttention",
    "SwiGLU",
    "SwitchRouter",
    "YarnScaling",
    "attend",
    "child",
    "parameter",
    "seed_key",
    "seed_value",
    "use",
]
