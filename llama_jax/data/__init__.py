"""Corpora to batches of token ids.

In: a `DataConfig` and a tokenizer. Out: a `Dataset` of tokenized shards on disk, and `Batches` of it: numpy arrays
[B, T] that are a function of (seed, step) alone. A new kind of file is a reader in `readers/`, a new objective a file
in `objectives/`; only `batches.py` knows Grain.
"""

from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.config import DataConfig, Source, Stage
from llama_jax.data.corpus import Corpus
from llama_jax.data.dataset import Dataset, prepare_dataset
from llama_jax.data.documents import read_pieces, read_texts
from llama_jax.data.objectives import Causal, Vocabulary
from llama_jax.data.prepare import prepare, prepare_shards
from llama_jax.data.stream import Shard, TokenStream
from llama_jax.data.windows import Batch

__all__ = [
    "Batch",
    "Batches",
    "Causal",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Shard",
    "Source",
    "Stage",
    "TokenStream",
    "ValidationBatches",
    "Vocabulary",
    "prepare",
    "prepare_dataset",
    "prepare_shards",
    "read_pieces",
    "read_texts",
]
