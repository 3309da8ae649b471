"""Mixture of experts: a feed-forward of which every token uses a part.

In: a `Router`, which chooses. Out: `Experts`, a `FeedForward`. A new way to route is one dataclass with its module in
`routers.py`, or in a notebook; `dispatch.py` brings tokens to experts and back for all of them.
"""
