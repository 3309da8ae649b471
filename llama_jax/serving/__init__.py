"""Serve a model by HTTP, as OpenAI's interface has it.

In: a loaded language model. Out: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`, and a
page at `/`. `requests.py` reads bodies into prompts and a `SamplingConfig`, `worker.py` runs the engine in a thread,
`answers.py` writes what comes back as JSON and event streams, `app.py` has the routes and limits, `running.py` the
process. A field of `SamplingConfig` is a field of the bodies without a line here; OpenAI's other names for them are in
`requests.py`: ALIASES.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
