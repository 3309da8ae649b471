"""Corpora to batches of token ids.

In: a `DataConfig` and a tokenizer. Out: a `Dataset` of tokenized shards on disk, and `Batches` of it: numpy arrays
[B, T] that are a function of (seed, step) alone. `readers` turn files into records, `corpus` records into shards of
tokens, `objectives` documents into examples, and `rows` examples into rows of a batch.
"""

import lazy_loader

# Imported when a name is used: a process that makes shards needs neither JAX nor Grain.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
