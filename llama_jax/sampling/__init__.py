"""Continue texts with a model.

In: a language model and prompts. Out: token ids or text, at once or piece by piece. Temperature, top-k, top-p and the
controls (functions of logits) are in `sampler.py`, the decode loop in `loop.py`, `generate` in `token_ids.py`,
`generate_text` in `text.py`, `chat` in `conversations.py`. `__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
