"""The work of the commands that make corpora and tokenizers: `prepare` and `tokenizer`."""

import argparse
import io
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console

from llama_jax.config import UserError, field_types, override
from llama_jax.data import DataConfig, find_files, prepare_corpus, prepare_shards, read_pieces, units_by_shard
from llama_jax.remote import check_destination, with_urls
from llama_jax.screen import Bar
from llama_jax.tokenizers import SAMPLES, compare, comparison_table, load_tokenizer, train_tokenizer

BLOCK = 1 << 20  # characters that are read before they are given to a tokenizer's training


def prepare_command(args: argparse.Namespace) -> int:
    """Tokenize a corpus and print what it has."""
    given: Mapping[str, object] = {
        key: value for key, value in vars(args).items() if key in field_types(DataConfig) and value is not None
    }
    config = override(DataConfig(path=()), given)
    if args.num_workers is not None and args.num_workers < 1:
        raise UserError(f"--num-workers={args.num_workers} must be at least 1")
    if args.count:
        print(len(units_by_shard(find_files(config), config)))
        return 0
    tokenizer = load_tokenizer(args.tokenizer)
    start, made = time.monotonic(), False
    with Bar("tokenizing", 0, None, slow=True, console=Console(stderr=True)) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal made
            made = True
            bar.advance(done, total)

        options = {"directory": args.output, "num_workers": args.num_workers, "progress": progress}
        if args.shards is not None:
            print(with_urls(str(prepare_shards(config, tokenizer, shard_numbers(args.shards), **options))))
            return 0
        corpus = prepare_corpus(config, tokenizer, **options)
    seconds = time.monotonic() - start
    print(with_urls(str(corpus.directory)))
    for split, documents in corpus.num_documents.items():
        print(f"{split}: {documents} documents, {corpus.num_tokens[split]} tokens, {corpus.num_bytes[split]} bytes")
    if made:
        print(f"{sum(corpus.num_tokens.values()) / seconds:,.0f} tokens/s in {seconds:.1f} s")
    for line in corpus.left_out():
        print(line)
    return 0


def shard_numbers(shards: str) -> range:
    """Return the numbers that `I` or `A:B` names."""
    first, colon, end = shards.partition(":")
    try:
        numbers = range(int(first), int(end) if colon else int(first) + 1)
    except ValueError:
        raise UserError(f"--shards={shards} must be a number, or two as in 0:8") from None
    if not numbers:
        raise UserError(f"--shards={shards} names no shard: the end is not one of them, as in 0:8")
    return numbers


def tokenizer_train_command(args: argparse.Namespace) -> int:
    """Train a tokenizer and save it."""
    check_destination(args.output, new=False)
    skipped: list[str] = []
    with Bar("training the tokenizer", 0, None, slow=True, console=Console(stderr=True)) as bar:
        pieces = read_pieces(args.files, fields=args.fields.split(","), piece_chars=BLOCK, skipped=skipped)
        tokenizer = train_tokenizer(
            bar.counted(itertools.chain.from_iterable(map(blocks, documents(pieces)))),
            kind=args.kind,
            vocab_size=args.vocab_size,
            special_tokens=args.special_token,
            progress=bar.advance,
        )
    path = tokenizer.save(args.output)
    print(f"{path}: {args.kind}, {tokenizer.vocab_size} tokens")
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    return 0


def documents(pieces: Iterable[tuple[object, str]]) -> Iterator[Iterator[str]]:
    """Yield documents, each as the pieces that follow one another with the same key."""
    for _, document in itertools.groupby(pieces, key=lambda piece: piece[0]):
        yield (text for _, text in document)


def blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Yield a document's pieces as blocks of whole lines, so that a large one is never held whole.

    A block ends before the line end of a line that ends with no space: there every kind cuts a text anyway.
    """
    block, size = [], 0
    for line in itertools.chain.from_iterable(io.StringIO(piece, newline="\n") for piece in pieces):
        block.append(line)
        size += len(line)
        if size >= BLOCK and line.endswith("\n") and not line[-2:-1].isspace() and len(line) > 1:
            yield "".join(block)[:-1]
            block, size = ["\n"], 1
    yield "".join(block)


def tokenizer_compare_command(args: argparse.Namespace) -> int:
    """Print a table of tokenizers for each text."""

    def text_of(name: str) -> str:
        pieces = read_pieces([name], fields=args.fields.split(","), piece_chars=BLOCK, skipped=[])
        return "\n".join(map("".join, documents(pieces)))

    texts = SAMPLES if args.text is None else {name: text_of(name) for name in args.text}
    tokenizers = {name: load_tokenizer(name) for name in args.tokenizers}
    console = Console()
    if not console.is_terminal:
        console.width = 160
    for title, text in texts.items():
        try:
            rows = [(name, tokenizer, compare(tokenizer, text)) for name, tokenizer in tokenizers.items()]
        except UserError as error:
            raise UserError(f"'{title}': {error}") from None
        console.print(comparison_table(title, rows))
    return 0


def tokenizer_encode_command(args: argparse.Namespace) -> int:
    """Print the token ids of a text."""
    text = sys.stdin.read() if args.text is None else args.text
    print(*load_tokenizer(args.tokenizer).encode(text, bos=args.bos, eos=args.eos))
    return 0


def tokenizer_decode_command(args: argparse.Namespace) -> int:
    """Print the text of token ids."""
    tokenizer = load_tokenizer(args.tokenizer)
    words = args.ids or sys.stdin.read().split()
    try:
        ids = [int(word) for word in words]
    except ValueError:
        wrong = next(word for word in words if not word.strip().lstrip("-").isdecimal())
        raise UserError(f"'{wrong}' is not a token id: give whole numbers separated by spaces") from None
    print(tokenizer.decode(ids))
    return 0
