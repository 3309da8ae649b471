"""The pieces of a model, each a small frozen config dataclass with the module that it builds.

In: a width and a stream of random keys, `config.build(width, rngs=rngs)`. Out: an NNX module. A new attention, norm or
feed-forward is one file here, or one class in a notebook: derive the config from `Mixer`, `FeedForward` or `Norm`, and
its module from `MixerModule` or `FeedForwardModule`.
"""

from llama_jax.nn.adapters import (
    ALL_PROJECTIONS as ALL_PROJECTIONS,
    LoRA as LoRA,
    drawing_from as drawing_from,
)
from llama_jax.nn.attention.accelerated import LANES as LANES
from llama_jax.nn.attention.attend import (
    FASTEST as FASTEST,
    KERNELS as KERNELS,
    Call as Call,
    attend as attend,
    attention_weights as attention_weights,
    calls_of_attend as calls_of_attend,
    choose as choose,
)
from llama_jax.nn.attention.blockwise import (
    KEY_BLOCK as KEY_BLOCK,
    MAX_QUERY_BLOCKS as MAX_QUERY_BLOCKS,
    MIN_QUERY_BLOCK as MIN_QUERY_BLOCK,
)
from llama_jax.nn.attention.context import unzigzag as unzigzag, zigzag as zigzag
from llama_jax.nn.attention.grouped_query import (
    CrossAttention as CrossAttention,
    CrossAttentionModule as CrossAttentionModule,
    GroupedQuery as GroupedQuery,
)
from llama_jax.nn.attention.latent import LatentAttention as LatentAttention
from llama_jax.nn.attention.ring import (
    HELD as HELD,
    is_ring as is_ring,
    line_of as line_of,
    ring_of as ring_of,
)
from llama_jax.nn.attention.sparse import SparseLatentAttention as SparseLatentAttention
from llama_jax.nn.base import (
    FeedForward as FeedForward,
    FeedForwardModule as FeedForwardModule,
    ForwardContext as ForwardContext,
    Mask as Mask,
    Mixer as Mixer,
    MixerModule as MixerModule,
    PyTree as PyTree,
    check_above_zero as check_above_zero,
    check_at_least as check_at_least,
    check_rate as check_rate,
    record as record,
    recording as recording,
)
from llama_jax.nn.delta import GatedDeltaNet as GatedDeltaNet
from llama_jax.nn.draws import draw as draw, dropout as dropout
from llama_jax.nn.experts.exchange import sends_assignments as sends_assignments, taken_rows as taken_rows
from llama_jax.nn.experts.experts import Experts as Experts, ExpertsModule as ExpertsModule
from llama_jax.nn.experts.routers import (
    GShardRouter as GShardRouter,
    Router as Router,
    RouterModule as RouterModule,
    Routing as Routing,
    SigmoidTopK as SigmoidTopK,
    SoftmaxTopK as SoftmaxTopK,
    SwitchRouter as SwitchRouter,
)
from llama_jax.nn.feed_forward import (
    ACTIVATIONS as ACTIVATIONS,
    MLP as MLP,
    Activation as Activation,
    GatedLinearUnit as GatedLinearUnit,
    SwiGLU as SwiGLU,
)
from llama_jax.nn.mamba import Mamba2 as Mamba2
from llama_jax.nn.norms import LayerNorm as LayerNorm, Norm as Norm, RMSNorm as RMSNorm
from llama_jax.nn.parameters import (
    EMBEDDING_STD as EMBEDDING_STD,
    Buffer as Buffer,
    Embedding as Embedding,
    HeadBias as HeadBias,
    Keys as Keys,
    Projection as Projection,
    buffer as buffer,
    cast_and_gather as cast_and_gather,
    child as child,
    embed_lookup as embed_lookup,
    gather as gather,
    join as join,
    matmul as matmul,
    parameter as parameter,
    seed_key as seed_key,
    seed_value as seed_value,
)
from llama_jax.nn.positions import (
    Alibi as Alibi,
    LearnedPositions as LearnedPositions,
    PositionBias as PositionBias,
    PositionBiasModule as PositionBiasModule,
    Positions as Positions,
    PositionsModule as PositionsModule,
    RelativeBias as RelativeBias,
    SinusoidalPositions as SinusoidalPositions,
)
from llama_jax.nn.quantized import (
    FORMATS as FORMATS,
    Form as Form,
    form_of as form_of,
    multiplied as multiplied,
)
from llama_jax.nn.recurrent import (
    GRU as GRU,
    LSTM as LSTM,
    BidirectionalRNN as BidirectionalRNN,
    ElmanRNN as ElmanRNN,
    NGram as NGram,
)
from llama_jax.nn.rope import (
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    LongRopeScaling as LongRopeScaling,
    NTKScaling as NTKScaling,
    Rope as Rope,
    RopeScaling as RopeScaling,
    YarnScaling as YarnScaling,
)
