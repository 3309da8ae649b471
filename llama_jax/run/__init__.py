"""A run: its directory, and the loop that connects the other packages.

In: a `RunConfig` and a directory. Out: the same directory with metrics, checkpoints and samples in it. A new metric is
a line in `training.py`; a new destination of metrics is a `Logger`. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
