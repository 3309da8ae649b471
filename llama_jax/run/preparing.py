"""What has to be there before a run trains: its tokenizer and tokenized text, and everything checked."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import CONFIG_FILE, TOKENIZER_DIRECTORY
from llama_jax.config import UserError
from llama_jax.data import DataConfig, Dataset, SequenceToSequence, Vocabulary, prepare_dataset, read_texts
from llama_jax.parallel import MeshConfig
from llama_jax.run.directory import Run, check_directory
from llama_jax.run.initial import inheritance
from llama_jax.run.reporting import Bar, check_writers
from llama_jax.run_config import RunConfig
from llama_jax.sampling import encode_prompt
from llama_jax.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer, with_document_rule

SAMPLE_TOKENS = 128


def prepare(run: Run, mesh: MeshConfig, num_devices: int) -> list[Any]:
    """The tokenized corpora's directories, what of the tokenizer the objective needs, the length of samples, and what
    there is to say.

    Raises UserError for all that cannot run here.
    """
    config = run.config
    dataclasses.replace(config, mesh=mesh).check_mesh(num_devices)
    check_writers(config.logging)
    config.check_allowed()
    lines = check_directory(run)
    if config.init_from is not None and not (run.directory / CONFIG_FILE).exists():
        inheritance(config, run.components)
    tokenizer = run.tokenizer = _tokenizer(run)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    vocabulary = Vocabulary.of(tokenizer, config.data.objective.texts())
    _check_start(config, vocabulary)
    sample_tokens = _sample_tokens(config, tokenizer)
    directories = [str(directory.absolute()) for directory in _prepare_dataset(config, tokenizer)]
    return [directories, dataclasses.asdict(vocabulary), sample_tokens, lines]


def check_shared(file: Path, key: str) -> None:
    """Raises UserError where process 0 has written a file that this process does not see."""
    if not file.exists():
        raise UserError(f"'{file}' was written by process 0 and is not here: set {key} to a place that all hosts share")


def _tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer, from its directory once it is there."""
    if (run.directory / TOKENIZER_DIRECTORY).is_dir():
        return run.tokenizer
    config = run.config.tokenizer
    found = trained_tokenizer(config, run.config.data) if config.path is None else load_tokenizer(config.path)
    return with_document_rule(found, of_sources=run.config.model.has_source)


def trained_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """One of the training documents, with the special tokens that the objective needs."""
    texts = itertools.chain.from_iterable(read_texts(source, "train") for _, source in data.corpora())
    of_chats = data.chat_template.special_tokens() if data.chat_template is not None else ()
    special = tuple(dict.fromkeys((*config.special_tokens, *data.objective.special_tokens(), *of_chats)))
    return train_tokenizer(texts, kind=config.kind, vocab_size=config.vocab_size, special_tokens=special)


def _sample_tokens(config: RunConfig, tokenizer: Tokenizer) -> int:
    """How many tokens the model can write after the longest of the prompts."""
    limit = config.model.length_limit
    # An encoder-decoder writes after its start token, however long the prompt is that it reads.
    longest, own = (limit, 1) if config.model.has_source else (limit - 1, None)
    left = limit
    for prompt in config.logging.sample_prompts:
        size = len(encode_prompt(config.model, tokenizer, prompt))
        if size > longest:
            raise UserError(
                f"a prompt of logging.sample_prompts has {size} tokens, and model.max_positions={limit} leaves no "
                "room to continue it: shorten it"
            )
        left = min(left, limit - (own or size))
    return min(SAMPLE_TOKENS, left)


def _check_start(config: RunConfig, vocabulary: Vocabulary) -> None:
    """Raises UserError where the decoder is trained to begin with another token than it will begin with."""
    model, objective = config.model, config.data.objective
    if not model.has_source or not isinstance(objective, SequenceToSequence):
        return
    start = vocabulary.boundary(objective.start_token)
    if start != model.decoder_start_id:
        raise UserError(
            f"model.decoder_start_id={model.decoder_start_id} is not the token {start} that "
            f"data.objective.start_token={objective.start_token!r} puts first: set the one or the other"
        )


def _prepare_dataset(config: RunConfig, tokenizer: Tokenizer) -> list[Path]:
    bar: Bar | None = None
    with contextlib.ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or stack.enter_context(Bar("tokenizing", 0, total))
            bar.advance(done)

        return prepare_dataset(config.data, tokenizer, sequence_length=config.sequence_length, progress=progress)


def open_dataset(run: Run, directories: Sequence[str], vocabulary: dict[str, Any]) -> Dataset:
    for directory in directories:
        check_shared(Path(directory), "data.cache_dir")
    for name in ("start_ids", "sentence_ends"):
        vocabulary[name] = tuple(vocabulary[name])  # a list, if it came from another process
    return run.open_dataset([Path(directory) for directory in directories], Vocabulary(**vocabulary))
