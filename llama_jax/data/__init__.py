"""Corpora to batches of token ids.

In: a `DataConfig` and a tokenizer. Out: a `Dataset` of tokenized shards on disk, and `Batches` of it: numpy arrays
[B, T] that are a function of (seed, step) alone. A new kind of file is a reader in `readers/`, a new objective a file
in `objectives/`; only `batches.py` knows Grain.
"""

from llama_jax.data.batches import Batches as Batches, ValidationBatches as ValidationBatches
from llama_jax.data.chat import ChatTemplate as ChatTemplate, chat_prompt as chat_prompt, turn_ends as turn_ends
from llama_jax.data.config import DataConfig as DataConfig, Source as Source, Stage as Stage
from llama_jax.data.corpus import Corpus as Corpus
from llama_jax.data.dataset import Dataset as Dataset, prepare_dataset as prepare_dataset
from llama_jax.data.documents import read_pieces as read_pieces, read_texts as read_texts
from llama_jax.data.files import find_files as find_files
from llama_jax.data.objectives.base import SequenceToSequence as SequenceToSequence, Vocabulary as Vocabulary
from llama_jax.data.objectives.classification import Classification as Classification
from llama_jax.data.objectives.left_to_right import Causal as Causal
from llama_jax.data.prepare import prepare as prepare, prepare_shards as prepare_shards
from llama_jax.data.readers import plan_shards as plan_shards
from llama_jax.data.stream import Shard as Shard, TokenStream as TokenStream
from llama_jax.data.windows import Batch as Batch
