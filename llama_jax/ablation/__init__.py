"""Ablations: variants of a run, each with several seeds, and what they show with intervals.

In: a `RunConfig`, and what its variants change. Out: a directory with `sweep.json` and a run directory for each variant
and seed, and the `Sweep`, its table and plots. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
