"""Mixture of experts: a feed-forward of which every token meets a part.

In: a `Router`, which chooses. Out: `Experts`, a `FeedForward`. A new way to route is one dataclass with its module in
`routers.py`, or in a notebook; `dispatch.py` brings tokens to experts and back, whoever chose.
"""

from llama_jax.nn.experts.experts import Experts
from llama_jax.nn.experts.routers import (
    GShardRouter,
    Router,
    RouterModule,
    Routing,
    SigmoidTopK,
    SoftmaxTopK,
    SwitchRouter,
)

__all__ = [
    "Experts",
    "GShardRouter",
    "Router",
    "RouterModule",
    "Routing",
    "SigmoidTopK",
    "SoftmaxTopK",
    "SwitchRouter",
]
