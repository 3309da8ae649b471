"""Corpora to batches of token ids.

In: a `DataConfig` and a tokenizer. Out: a `Corpus` of tokenized shards on disk, and from its streams `Batches`: numpy
arrays [B, T] that are a function of (seed, step) alone. A new kind of file is a reader in `readers/`; only `batches.py`
knows Grain.
"""

from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus import Corpus
from llama_jax.data.documents import read_texts
from llama_jax.data.prepare import prepare, prepare_shards
from llama_jax.data.stream import Shard, TokenStream
from llama_jax.data.windows import Batch

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "Shard",
    "TokenStream",
    "ValidationBatches",
    "prepare",
    "prepare_shards",
    "read_texts",
]
