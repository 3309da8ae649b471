"""The command `verify`: which parts of a run, a corpus, a conversion or an export are as they were written."""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.checkpoint import (
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    check_manifest,
    committed_steps,
    locate,
)
from llama_jax.config import UserError, read_json
from llama_jax.data import corpus_directory, damaged_files
from llama_jax.remote import local_copy, with_urls
from llama_jax.run import open_run


def verify_command(args: argparse.Namespace) -> int:
    """Print a line for each part of a directory: good, damaged or not checked; return 1 where one is not good."""
    path, code = local_copy(locate(args.path)[0]), 0
    for name, check in (parts := list(_parts(path))):
        try:
            problems = check()
            state = "not checked, it has no checksums" if problems is None else "good"
            if problems:
                state, code = f"damaged ({'; '.join(problems)})", 1
        except UserError as error:  # texts that are elsewhere, classes from outside the package
            state = f"not checked ({error})"
        except OSError as error:
            state, code = f"cannot be read ({error.strerror}: '{error.filename}')", 1
        print(with_urls(f"{name}: {state}"))
    if not parts:
        raise UserError(f"'{path}' has nothing to verify: give the directory of a run, a corpus or an export")
    return code


def _parts(path: Path) -> Iterator[tuple[str, Callable[[], list[str] | None]]]:
    """Yield the parts of a directory that have checksums, each with a function that returns its problems."""
    for step in committed_steps(path):
        yield f"checkpoint {step}", functools.partial(check_manifest, path / CHECKPOINTS_DIRECTORY / str(step), step)
    if (path / MANIFEST_FILE).is_file():
        yield "files", functools.partial(check_manifest, path)
    elif (path / TOKENIZER_DIRECTORY).is_dir():
        yield "tokenizer", functools.partial(check_manifest, path / TOKENIZER_DIRECTORY)
    elif (path / "conversion.json").is_file():
        yield "files", lambda: None
    if (path / "data.json").is_file():
        yield "config", functools.partial(_malformed, path)
        yield "corpus", functools.partial(_damaged_in_corpora, path)
    elif (path / "index.json").is_file():
        yield "corpus", functools.partial(damaged_files, path)


def _malformed(path: Path) -> list[str]:
    """Return which of a run's JSON files cannot be read: they have no checksums, because they change."""
    problems = []
    for name in (CONFIG_FILE, "data.json"):
        try:
            read_json(path / name)
        except UserError as error:
            problems.append(str(error))
    return problems


def _damaged_in_corpora(path: Path) -> list[str] | None:
    """Return what is wrong with the corpora of a run, None where one of them is not in the cache."""
    run = open_run(path)
    places = [corpus_directory(own, run.tokenizer) for _, own in run.config.data.corpora()]
    if not all(place.is_dir() for place in places):
        return None
    return [f"{problem} in '{place}'" for place in places for problem in damaged_files(place)]
