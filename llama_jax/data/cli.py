"""`python -m llama_jax prepare`."""

import argparse
import dataclasses

from rich.console import Console
from rich.progress import Progress

from llama_jax.data.corpus import prepare
from llama_jax.data.documents import DataConfig
from llama_jax.tokenizers import load_tokenizer


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `prepare` to the program's commands."""
    default = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    command = subparsers.add_parser("prepare", help="text files to tokenized shards")
    command.add_argument("path", nargs="+", help="files, directories and globs")
    command.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer file, or a directory with one")
    command.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="files to leave out")
    command.add_argument("--text-field", default=default["text_field"], help="field of JSONL lines that has the text")
    command.add_argument("--document-chars", type=int, metavar="N", help="cut longer documents at line ends")
    command.add_argument("--validation-fraction", type=float, default=default["validation_fraction"], metavar="F")
    command.add_argument("--cache-dir", metavar="DIR", help="default: $LLAMA_JAX_CACHE or ~/.cache/llama_jax")


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises UserError for a user's mistake."""
    config = DataConfig(
        path=tuple(args.path),
        exclude=tuple(args.exclude),
        text_field=args.text_field,
        document_chars=args.document_chars,
        validation_fraction=args.validation_fraction,
        cache_dir=args.cache_dir,
    )
    tokenizer = load_tokenizer(args.tokenizer)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None)
        corpus = prepare(config, tokenizer, progress=lambda done, total: bar.update(task, completed=done, total=total))
    print(corpus.directory)
    for split, documents in corpus.num_documents.items():
        print(f"{split}: {documents} documents, {corpus.num_tokens[split]} tokens, {corpus.num_bytes[split]} bytes")
    if corpus.skipped:
        print(f"skipped: {len(corpus.skipped)}, the first being {corpus.skipped[0]}")
    return 0
