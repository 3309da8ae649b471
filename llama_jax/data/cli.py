"""`python -m llama_jax prepare`."""

import argparse
import dataclasses
import time

from rich.console import Console
from rich.progress import Progress

from llama_jax.config import UserError, choices, field_docs
from llama_jax.data.chat import ChatTemplate
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.corpus import Corpus
from llama_jax.data.corpus.files import find_files
from llama_jax.data.corpus.prepare import prepare_corpus, prepare_shards
from llama_jax.data.readers.records import units_by_shard
from llama_jax.remote import with_urls
from llama_jax.tokenizers import load_tokenizer

DESCRIPTION = """Tokenizes a corpus into shards: text, JSONL, JSON, CSV and TSV (each also .gz, .zst, .bz2 and .xz), the
members of tar archives, Parquet, datasets of Hugging Face (hf://NAME[/CONFIG]:SPLIT, or a directory of save_to_disk),
ArrayRecord (tf.train.Example or JSON), and nanoGPT's and llm.c's .bin, on disk or in an object store (gs://, s3://).
What is there already is not made again. On a cluster, run one process for each of the --shards, with one --output; the
same command without --shards then makes the index."""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `prepare` to the program's commands."""
    default = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    meaning = field_docs(DataConfig)
    command = subparsers.add_parser("prepare", help="corpora to tokenized shards", description=DESCRIPTION)
    command.add_argument("path", nargs="+", help=meaning["path"])
    command.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer file, or a directory with one")
    command.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help=meaning["exclude"])
    command.add_argument("--fields", default="text", metavar="A[,B...]", help=meaning["fields"])
    command.add_argument("--chat-template", choices=sorted(choices(ChatTemplate)), help=meaning["chat_template"])
    command.add_argument("--document-chars", type=int, metavar="N", help=meaning["document_chars"])
    command.add_argument(
        "--max-record-bytes", type=int, default=default["max_record_bytes"], metavar="N",
        help=meaning["max_record_bytes"],
    )  # fmt: skip
    command.add_argument(
        "--max-bad-records", default=default["max_bad_records"], metavar="N", help=meaning["max_bad_records"],
        type=lambda word: None if word == "none" else int(word),
    )  # fmt: skip
    command.add_argument(
        "--validation-fraction", type=float, default=default["validation_fraction"], metavar="F",
        help=meaning["validation_fraction"],
    )  # fmt: skip
    command.add_argument("--cache-dir", metavar="DIR", help=meaning["cache_dir"])
    command.add_argument("--output", metavar="DIR", help="the corpus' directory (default: one in the cache)")
    command.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one for each core)")
    command.add_argument(
        "--shards", "--shard", metavar="I|A:B", help="make only shard I, or shards A to B-1, and no index"
    )
    command.set_defaults(main=main)
    command.add_argument("--count", action="store_true", help="only print how many shards there are")


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises UserError for a user's mistake."""
    config = DataConfig(
        path=tuple(args.path),
        exclude=tuple(args.exclude),
        fields=tuple(field.strip() for field in args.fields.split(",")),
        chat_template=None if args.chat_template is None else choices(ChatTemplate)[args.chat_template](),
        document_chars=args.document_chars,
        max_record_bytes=args.max_record_bytes,
        max_bad_records=args.max_bad_records,
        validation_fraction=args.validation_fraction,
        cache_dir=args.cache_dir,
    )
    if args.num_workers is not None and args.num_workers < 1:
        raise UserError(f"--num-workers={args.num_workers} must be at least 1")
    if args.count:
        print(len(units_by_shard(find_files(config), config)))
        return 0
    tokenizer = load_tokenizer(args.tokenizer)
    console = Console(stderr=True)
    start, made = time.monotonic(), False
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None)

        def progress(done: int, total: int) -> None:
            nonlocal made
            made = True
            bar.update(task, completed=done, total=total)

        options = {"directory": args.output, "num_workers": args.num_workers, "progress": progress}
        if args.shards is not None:
            print(with_urls(str(prepare_shards(config, tokenizer, _numbers(args.shards), **options))))
            return 0
        corpus = prepare_corpus(config, tokenizer, **options)
    _print(corpus, time.monotonic() - start if made else None)
    return 0


def _numbers(shards: str) -> range:
    """`I` or `A:B`."""
    first, colon, end = shards.partition(":")
    try:
        numbers = range(int(first), int(end) if colon else int(first) + 1)
    except ValueError:
        raise UserError(f"--shards={shards} must be a number, or two as in 0:8") from None
    if not numbers:
        raise UserError(f"--shards={shards} names no shard: the end is not one of them, as in 0:8")
    return numbers


def _print(corpus: Corpus, seconds: float | None) -> None:
    print(with_urls(str(corpus.directory)))
    for split, documents in corpus.num_documents.items():
        print(f"{split}: {documents} documents, {corpus.num_tokens[split]} tokens, {corpus.num_bytes[split]} bytes")
    if seconds is not None:
        print(f"{sum(corpus.num_tokens.values()) / seconds:,.0f} tokens/s in {seconds:.1f} s")
    for line in corpus.left_out():
        print(line)
