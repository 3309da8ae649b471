"""Text to token ids and back.

In: a tokenizer file of any kind, or text to train one on. Out: a `Tokenizer`. A new kind of file is a subclass of
`Tokenizer` (or a function that makes one of ours) and one line in `loading.py` that recognises it by its content; the
defaults of a class of transformers are one entry of `settings.CLASSES`; a new kind to train is a function in
`training.py`.
"""

from llama_jax.tokenizers.base import TEMPLATE_FILE as TEMPLATE_FILE, TextStream as TextStream, Tokenizer as Tokenizer
from llama_jax.tokenizers.comparing import (
    SAMPLES as SAMPLES,
    compare as compare,
    comparison_table as comparison_table,
)
from llama_jax.tokenizers.loading import (
    FILE_NAMES as FILE_NAMES,
    load_saved_tokenizer as load_saved_tokenizer,
    load_tokenizer as load_tokenizer,
    with_document_rule as with_document_rule,
)
from llama_jax.tokenizers.protobuf import read_varint as read_varint
from llama_jax.tokenizers.settings import settings_of as settings_of
from llama_jax.tokenizers.training import (
    KINDS as KINDS,
    TokenizerConfig as TokenizerConfig,
    train_tokenizer as train_tokenizer,
)
