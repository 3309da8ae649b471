"""Reports: runs and sweeps as one page that needs no network.

In: directories of runs. Out: plain data (`collect`), and the page that shows it (`Report`), which can be served while a
run goes on (`watch`). What is shown is a section of `page.js`. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
