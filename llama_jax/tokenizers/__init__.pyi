from .base import (
    RULE_FILE as RULE_FILE,
    TEMPLATE_FILE as TEMPLATE_FILE,
    TextStream as TextStream,
    Tokenizer as Tokenizer,
    deciding as deciding,
)
from .comparing import SAMPLES as SAMPLES, compare as compare, comparison_table as comparison_table
from .config import KINDS as KINDS, TokenizerConfig as TokenizerConfig
from .loading import (
    FILE_NAMES as FILE_NAMES,
    READERS as READERS,
    load_saved_tokenizer as load_saved_tokenizer,
    load_tokenizer as load_tokenizer,
    with_document_rule as with_document_rule,
)
from .settings import Settings as Settings, settings_of as settings_of
from .templates import render as render, special_names as special_names
from .training import TRAINING as TRAINING, train_tokenizer as train_tokenizer
