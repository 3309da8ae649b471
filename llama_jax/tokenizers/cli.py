"""`python -m llama_jax tokenizer train|encode|decode|compare`."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llama_jax.config import UserError
from llama_jax.remote import check_destination, local_copy
from llama_jax.tokenizers.comparing import SAMPLES, compare, comparison_table
from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.training import KINDS, train_tokenizer

BLOCK = 1 << 20  # characters that are read before they are given to the training


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `tokenizer` to the program's commands."""
    command = subparsers.add_parser("tokenizer", help="train and compare tokenizers; text to token ids and back")
    command.set_defaults(main=main)
    actions = command.add_subparsers(dest="action", required=True)

    train = actions.add_parser("train", help="train a tokenizer of any kind")
    train.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files")
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


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises UserError for a user's mistake."""
    {"train": _train, "encode": _encode, "decode": _decode, "compare": _compare}[args.action](args)
    return 0


def _train(args: argparse.Namespace) -> None:
    check_destination(args.output, new=False)
    files = [_existing(name) for name in args.files]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        reading = bar.add_task("reading", total=sum(file.stat().st_size for file in files))
        learning = bar.add_task("learning", total=None)  # only some kinds tell how far they are
        tokenizer = train_tokenizer(
            _blocks(files, lambda num_bytes: bar.advance(reading, num_bytes)),
            kind=args.kind,
            vocab_size=args.vocab_size,
            special_tokens=args.special_token,
            progress=lambda done, total: bar.update(learning, completed=done, total=total),
        )
    path = tokenizer.save(args.output)
    print(f"{path}: {args.kind}, {tokenizer.vocab_size} tokens")


def _existing(name: str) -> Path:
    file = local_copy(name)
    if not file.is_file():
        raise UserError(f"text file '{name}' does not exist")
    return file


def _blocks(files: list[Path], advance: Callable[[int], None]) -> Iterator[str]:
    """The files in blocks of whole lines, so that a large one is never held whole.

    A block ends before the line end of a line that ends with no space: there every kind cuts a text anyway.
    """
    for file in files:
        block, size = [], 0
        try:
            with file.open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    block.append(line)
                    size += len(line)
                    if size >= BLOCK and line.endswith("\n") and not line[-2:-1].isspace() and len(line) > 1:
                        text = "".join(block)[:-1]
                        yield text
                        advance(len(text.encode()))
                        block, size = ["\n"], 1
        except UnicodeDecodeError:
            raise UserError(f"'{file}' is not UTF-8 text: convert it or leave it out") from None
        text = "".join(block)
        yield text
        advance(len(text.encode()))


def _compare(args: argparse.Namespace) -> None:
    texts = (
        SAMPLES
        if args.text is None
        else {name: "".join(_blocks([_existing(name)], lambda _: None)) for name in args.text}
    )
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
