"""Text files to batches of token ids.

In: a `DataConfig` and a tokenizer. Out: a `Corpus` of tokenized shards on disk, and from its streams `Batches`: numpy
arrays [B, T] that are a function of (seed, step) alone. A new kind of file is a branch in `documents.py` that yields
its documents; only `batches.py` knows Grain.
"""

from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.corpus import Corpus, prepare
from llama_jax.data.documents import DataConfig, Document, read_documents, read_texts
from llama_jax.data.stream import Shard, TokenStream
from llama_jax.data.windows import Batch

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "Document",
    "Shard",
    "TokenStream",
    "ValidationBatches",
    "prepare",
    "read_documents",
    "read_texts",
]
