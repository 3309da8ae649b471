"""Language models in JAX: exact against the original weights, sharded on any mesh, measured.

    import llama_jax
    lm = llama_jax.load("runs/tiny_python")
    logits = lm.model(tokens)

The packages, in the order of the data: config, files, remote, parallel, tokenizers, data, nn, models, zoo, training,
checkpoint, sampling, evaluation, planning, run. docs/architecture.md has the map. What is exported is listed in
`__init__.pyi` and imported when it is first used.
"""

from llama_jax import installation

installation.check()

import lazy_loader  # noqa: E402

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
