"""Before the first step: everything checked, the tokenizer, the tokenized text and the first values of parameters."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_DIRECTORY,
    check_manifest,
    config_of,
    load,
    merge,
    write_manifest,
)
from llama_jax.config import UserError
from llama_jax.data import (
    DataConfig,
    Dataset,
    Preference,
    SequenceToSequence,
    Vocabulary,
    cache_directory,
    prepare_dataset,
    read_texts,
    texts_hash,
)
from llama_jax.files import replacing
from llama_jax.models import ModelConfig, Params, abstract_params, initialize, merge_adapters
from llama_jax.parallel import MeshConfig
from llama_jax.run.directory import Run
from llama_jax.run.reporting import configured_loggers
from llama_jax.run_config import RunConfig
from llama_jax.sampling import encode_prompt
from llama_jax.screen import Bar
from llama_jax.tokenizers import (
    TRAINING,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
    with_document_rule,
)

SAMPLE_TOKENS = 128
EMBEDDING = "embedding.weight"
NAMED = 8  # parameters that a line names


def prepare(run: Run, mesh: MeshConfig, num_devices: int, quiet: bool = False) -> list[Any]:
    """Return [directories of the tokenized corpora, fields of the objective's `Vocabulary`, length of samples], as JSON
    data for the other processes.

    Raises UserError for everything that cannot run here.
    """
    config = run.config
    dataclasses.replace(config, mesh=mesh).check_mesh(num_devices)
    configured_loggers(config.logging)
    if config.init_from is not None and not (run.directory / CONFIG_FILE).exists():
        inheritance(config, run.components)
    is_trained = config.tokenizer.path is None and not _has_tokenizer(run)
    kept = kept_directory(config.tokenizer, config.data) if is_trained else None
    tokenizer = run.tokenizer = _tokenizer(run, kept, quiet)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    vocabulary = Vocabulary.of(tokenizer, config.data.objective.texts())
    _check_start(config, vocabulary)
    sample_tokens = _sample_tokens(config, tokenizer)
    directories = [str(directory.absolute()) for directory in _prepare_dataset(config, tokenizer, quiet)]
    if kept is not None:
        keep_trained(tokenizer, kept)  # not before: what is refused leaves nothing behind
    return [directories, dataclasses.asdict(vocabulary), sample_tokens]


def check_shared(file: Path, key: str) -> None:
    """Raise UserError where a file that process 0 has written is not visible to this process."""
    if not file.exists():
        raise UserError(f"'{file}' was written by process 0 and is not here: set {key} to a place that all hosts share")


def _has_tokenizer(run: Run) -> bool:
    return "tokenizer" in vars(run) or (run.directory / TOKENIZER_DIRECTORY).is_dir()


def _tokenizer(run: Run, kept: Path | None, quiet: bool) -> Tokenizer:
    """Return the run's tokenizer, from its directory once it is there; a sweep's runs are given theirs."""
    if _has_tokenizer(run):
        return run.tokenizer
    config, data = run.config.tokenizer, run.config.data
    found = trained_tokenizer(config, data, kept, quiet) if config.path is None else load_tokenizer(config.path)
    return with_document_rule(found, of_sources=run.config.model.has_source)


def trained_tokenizer(
    config: TokenizerConfig, data: DataConfig, kept: Path | None = None, quiet: bool = False
) -> Tokenizer:
    """Return a tokenizer trained on the training documents, with the special tokens that the objective needs.

    kept: `kept_directory` of the same arguments; what `keep_trained` has left there is read in place of it.
    """
    if kept is not None and kept.is_dir():
        if check_manifest(kept) == []:
            return load_tokenizer(kept)
        shutil.rmtree(kept)
    texts = itertools.chain.from_iterable(read_texts(source, "train") for _, source in data.corpora())
    with Bar("training the tokenizer", 0, None, quiet=quiet, slow=True) as bar:
        return train_tokenizer(
            bar.counted(texts),
            kind=config.kind,
            vocab_size=config.vocab_size,
            special_tokens=_special_tokens(config, data),
            progress=bar.advance,
        )


def kept_directory(config: TokenizerConfig, data: DataConfig) -> Path:
    """Return the directory of a trained tokenizer in the cache, named by a hash of all that decides it."""
    texts = [texts_hash(source) for _, source in data.corpora()]
    libraries = [version("sentencepiece"), version("tokenizers")]
    key = json.dumps([TRAINING, libraries, config.kind, config.vocab_size, _special_tokens(config, data), texts])
    return cache_directory(data) / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:32]


def keep_trained(tokenizer: Tokenizer, kept: Path) -> None:
    """Keep a trained tokenizer in its directory, if it is not there."""
    if kept.is_dir():
        return
    with contextlib.suppress(OSError):  # another process was first, or the disk is full, which the run will say
        kept.parent.mkdir(exist_ok=True)
        with replacing(kept) as partial:
            tokenizer.save(partial)
            write_manifest(partial)


def _special_tokens(config: TokenizerConfig, data: DataConfig) -> tuple[str, ...]:
    of_chats = data.chat_template.special_tokens() if data.chat_template is not None else ()
    return tuple(dict.fromkeys((*config.special_tokens, *data.objective.special_tokens(), *of_chats)))


def _sample_tokens(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Return the number of tokens that the model can write after the longest of the prompts."""
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
    """Raise UserError where the decoder is trained to begin with another token than sampling begins with."""
    model, objective = config.model, config.data.objective
    if not model.has_source or not isinstance(objective, SequenceToSequence):
        return
    start = vocabulary.boundary(objective.start_token)
    if start != model.decoder_start_id:
        raise UserError(
            f"model.decoder_start_id={model.decoder_start_id} is not the token {start} that "
            f"data.objective.start_token={objective.start_token!r} puts first: set the one or the other"
        )


def _prepare_dataset(config: RunConfig, tokenizer: Tokenizer, quiet: bool) -> list[Path]:
    bar: Bar | None = None
    with contextlib.ExitStack() as stack:

        def progress(work: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None or bar.description != work:
                stack.close()
                bar = stack.enter_context(Bar(work, 0, total, quiet=quiet, slow=True))
            bar.advance(done, total)

        return prepare_dataset(config.data, tokenizer, sequence_length=config.sequence_length, progress=progress)


def open_dataset(run: Run, directories: Sequence[str], vocabulary: dict[str, Any]) -> Dataset:
    """Return the dataset that `prepare` has prepared, on every process."""
    for directory in directories:
        check_shared(Path(directory), "data.cache_dir")
    for name in ("start_ids", "sentence_ends"):
        vocabulary[name] = tuple(vocabulary[name])  # a list, if it came from another process
    return run.open_dataset([Path(directory) for directory in directories], Vocabulary(**vocabulary))


def inheritance(config: RunConfig, components: Sequence[type] = ()) -> tuple[list[str], list[str]]:
    """Return the names of the parameters of `config.model` that begin as in `config.init_from`, and lines for the log.

    Those are the parameters of the same name and shape; no weights are read. Raises UserError where there are none, and
    where the embedding is not among them.
    """
    path = config.init_from
    assert path is not None
    begins = config_of(path, components)
    if not _continues(begins, config):
        begins, _ = merge_adapters(begins, {})
    found, wanted = (_shapes(c) for c in (begins, config.model))
    taken = [name for name in wanted if found.get(name) == wanted[name]]
    if EMBEDDING not in taken:
        shapes = [shapes.get(EMBEDDING, "missing") for shapes in (found, wanted)]
        raise UserError(
            f"init_from='{path}' has another embedding than model ({shapes[0]}, not {shapes[1]}): give a "
            "model of its sizes"
        )
    lines = [f"{len(taken)} parameters begin as in '{path}'"]
    for names, what in ((wanted, "are new"), (found, f"of '{path}' are left out")):
        if names := [name for name in names if name not in taken]:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{', '.join(names[:NAMED])}{more} {what}")
    return taken, lines


def first_params(config: RunConfig, components: Sequence[type] = ()) -> tuple[Params, list[str]]:
    """Return the parameters before the first step, on the current mesh, and lines for the log that describe them."""
    params = initialize(config.model, config.seed)
    if config.init_from is None:
        return params, []
    taken, lines = inheritance(config, components)
    lm = load(config.init_from, dtype="float32", components=components)
    found = (lm if _continues(lm.config, config) else merge(lm)).model.params()
    return params | {name: found[name] for name in taken}, lines


def _continues(begins: ModelConfig, config: RunConfig) -> bool:
    """Return whether a run trains the adapters that it begins with; others are part of the weights that it begins with.

    The reference of pairs is the model without adapters, so that those it begins with have to be in its weights.
    """
    return begins.adapters == config.model.adapters and not isinstance(config.data.objective, Preference)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter."""
    return {name: a.shape for name, a in abstract_params(config).items()}
