from .batches import (
    Batches as Batches,
    ValidationBatches as ValidationBatches,
    batches_passed as batches_passed,
)
from .chat import (
    ChatTemplate as ChatTemplate,
    DirectoryChat as DirectoryChat,
    chat_prompt as chat_prompt,
    turn_ends as turn_ends,
)
from .config import DataConfig as DataConfig, Source as Source, Stage as Stage
from .corpus.corpus import (
    Corpus as Corpus,
    Shard as Shard,
    TokenStream as TokenStream,
    damaged_files as damaged_files,
)
from .corpus.documents import ScoredBytes as ScoredBytes, read_pieces as read_pieces, read_texts as read_texts
from .corpus.files import find_files as find_files
from .corpus.prepare import (
    cache_directory as cache_directory,
    corpus_directory as corpus_directory,
    prepare_corpus as prepare_corpus,
    prepare_shards as prepare_shards,
    texts_hash as texts_hash,
)
from .dataset import Dataset as Dataset, prepare_dataset as prepare_dataset
from .objectives import (
    Causal as Causal,
    Classification as Classification,
    Objective as Objective,
    Preference as Preference,
    SequenceToSequence as SequenceToSequence,
    Vocabulary as Vocabulary,
)
from .readers import Record as Record, add_reader as add_reader, units_by_shard as units_by_shard
from .rows.windows import HostBatch as HostBatch
