"""Text to token ids and back.

In: a tokenizer file of any kind, or text to train one on. Out: a `Tokenizer`. A new kind of file is a function in
`loading.READERS` that recognises it by its content; the defaults of a class of transformers are one entry of
`settings.CLASSES`; a new kind to train is a function in `training.py`. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
