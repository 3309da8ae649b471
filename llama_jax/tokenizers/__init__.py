"""Text to token ids and back.

In: a tokenizer file of any kind, or text to train one on. Out: a `Tokenizer`. A new kind of file is a subclass of
`Tokenizer` (or a function that makes one of ours) and one line in `loading.py` that recognises it by its content; the
defaults of a class of transformers are one entry of `settings.CLASSES`; a new kind to train is a function in
`training.py`. `textbook.py` has the algorithms as the papers have them, for notebooks.
"""

from llama_jax.tokenizers.base import TextStream, Tokenizer
from llama_jax.tokenizers.loading import load_saved_tokenizer, load_tokenizer, with_document_rule
from llama_jax.tokenizers.training import TokenizerConfig, train_tokenizer

__all__ = [
    "TextStream",
    "Tokenizer",
    "TokenizerConfig",
    "load_saved_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
    "with_document_rule",
]
