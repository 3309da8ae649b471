"""Looking inside a model: small functions that return numpy arrays, in dataclasses with a `plot()`.

In: what `load` returns, a run or a config, and a text. Out: attention maps, a logit lens, norms of activations,
gradients and updates, the load of experts, decay with distance, sizes of caches. They see what modules give to
`record` while a forward pass is traced, so that a new piece needs no line here. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
