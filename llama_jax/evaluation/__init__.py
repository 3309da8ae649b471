"""Measure a model: held-out text, benchmarks, classes, translations.

In: a language model and texts, tasks of lm-evaluation-harness or pairs. Out: an `Evaluation`, numbers by name. The
batched log-probabilities are in `scoring.py`, sliding windows in `perplexity.py`, the `LM` class of
lm-evaluation-harness in `harness.py`, classes and BLEU in `pairs.py`, `evaluate` and the callback in `evaluating.py`.
`__init__.pyi` lists what is exported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
