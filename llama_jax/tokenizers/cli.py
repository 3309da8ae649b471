"""`python -m llama_jax tokenizer train|encode|decode|compare`."""

import argparse
import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import Progress

from llama_jax.config import UserError
from llama_jax.remote import check_destination
from llama_jax.tokenizers.comparing import SAMPLES, compare, comparison_table
from llama_jax.tokenizers.config import KINDS
from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.training import train_tokenizer

BLOCK = 1 << 20  # characters that are read before they are given to the training

type Read = Callable[..., Iterator[tuple[object, str]]]
"""Reads files of a corpus: `llama_jax.data.read_pieces`, which this room does not know."""


def add_arguments(subparsers: argparse._SubParsersAction, read: Read) -> None:
    """Add the command `tokenizer`, which reads texts by `read`, to the program's commands."""
    command = subparsers.add_parser("tokenizer", help="train and compare tokenizers; text to token ids and back")
    command.set_defaults(main=functools.partial(main, read=read))
    actions = command.add_subparsers(dest="action", required=True)

    train = actions.add_parser("train", help="train a tokenizer of any kind")
    train.add_argument("files", nargs="+", metavar="FILE", help="files, directories and globs, as `prepare` reads them")
    train.add_argument("--fields", default="text", metavar="A[,B...]", help="fields of JSON, columns of tables")
    train.add_argument("--kind", choices=KINDS, default="bpe", help="bpe and unigram: SentencePiece; default: bpe")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="bytes and special tokens included")
    train.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="NAME",
        help="besides the kind's own, any number of them",
    )
    train.add_argument("--output", required=True, metavar="DIR", help="directory that gets the tokenizer's file")

    encode = actions.add_parser("encode", help="print the token ids of a text")
    encode.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    encode.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input")
    encode.add_argument("--bos", action="store_true", help="begin with the BOS token")
    encode.add_argument("--eos", action="store_true", help="end with the EOS token")

    decode = actions.add_parser("decode", help="print the text of token ids")
    decode.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: ids from standard input")

    versus = actions.add_parser("compare", help="tokens per word, character and byte, round trip and speed")
    versus.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="tokenizer files, or their directories")
    versus.add_argument("--text", nargs="+", metavar="FILE", help="default: a sample in English and one in Chinese")
    versus.add_argument("--fields", default="text", metavar="A[,B...]", help="fields of JSON, columns of tables")


def main(args: argparse.Namespace, read: Read) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises UserError for a user's mistake."""
    if args.action in ("train", "compare"):
        {"train": _train, "compare": _compare}[args.action](args, read)
    else:
        {"encode": _encode, "decode": _decode}[args.action](args)
    return 0


def _train(args: argparse.Namespace, read: Read) -> None:
    check_destination(args.output, new=False)
    console, skipped = Console(stderr=True), []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        learning = bar.add_task("learning", total=None)  # only some kinds tell how far they are
        pieces = read(args.files, fields=args.fields.split(","), piece_chars=BLOCK, skipped=skipped)
        tokenizer = train_tokenizer(
            itertools.chain.from_iterable(map(_blocks, _documents(pieces))),
            kind=args.kind,
            vocab_size=args.vocab_size,
            special_tokens=args.special_token,
            progress=lambda done, total: bar.update(learning, completed=done, total=total),
        )
    path = tokenizer.save(args.output)
    print(f"{path}: {args.kind}, {tokenizer.vocab_size} tokens")
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)


def _documents(pieces: Iterable[tuple[object, str]]) -> Iterator[Iterator[str]]:
    """Documents, each as the pieces that follow one another with the same key."""
    for _, document in itertools.groupby(pieces, key=lambda piece: piece[0]):
        yield (text for _, text in document)


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """A document's pieces as blocks of whole lines, so that a large one is never held whole.

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


def _compare(args: argparse.Namespace, read: Read) -> None:
    def text_of(name: str) -> str:
        pieces = read([name], fields=args.fields.split(","), piece_chars=BLOCK, skipped=[])
        return "\n".join(map("".join, _documents(pieces)))

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


def _encode(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    text = sys.stdin.read() if args.text is None else args.text
    print(*tokenizer.encode(text, bos=args.bos, eos=args.eos))


def _decode(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    words = args.ids or sys.stdin.read().split()
    try:
        ids = [int(word) for word in words]
    except ValueError:
        wrong = next(word for word in words if not word.strip().lstrip("-").isdecimal())
        raise UserError(f"'{wrong}' is not a token id: give whole numbers separated by spaces") from None
    print(tokenizer.decode(ids))
