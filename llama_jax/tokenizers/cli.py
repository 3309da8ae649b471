"""`python -m llama_jax tokenizer train|encode|decode`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llama_jax.config import UserError
from llama_jax.tokenizers.loading import load_tokenizer
from llama_jax.tokenizers.training import train_tokenizer


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `tokenizer` to the program's commands."""
    command = subparsers.add_parser("tokenizer", help="train a tokenizer; text to token ids and back")
    actions = command.add_subparsers(dest="action", required=True)

    train = actions.add_parser("train", help="train a SentencePiece model with Llama's settings")
    train.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files")
    train.add_argument("--kind", choices=("bpe", "unigram"), default="bpe")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="bytes and special tokens included")
    train.add_argument("--output", required=True, metavar="DIR", help="directory that gets tokenizer.model")

    encode = actions.add_parser("encode", help="print the token ids of a text")
    encode.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    encode.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input")
    encode.add_argument("--bos", action="store_true", help="begin with the BOS token")
    encode.add_argument("--eos", action="store_true", help="end with the EOS token")

    decode = actions.add_parser("decode", help="print the text of token ids")
    decode.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: ids from standard input")


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed; returns the exit code. Raises UserError for a user's mistake."""
    {"train": _train, "encode": _encode, "decode": _decode}[args.action](args)
    return 0


def _train(args: argparse.Namespace) -> None:
    files = [Path(name) for name in args.files]
    for file in files:
        if not file.is_file():
            raise UserError(f"text file '{file}' does not exist")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=sum(file.stat().st_size for file in files))
        tokenizer = train_tokenizer(
            _texts(files),
            kind=args.kind,
            vocab_size=args.vocab_size,
            progress=lambda characters: bar.advance(task, characters),
        )
    path = tokenizer.save(args.output)
    print(f"{path}: {args.kind}, {tokenizer.vocab_size} tokens")


def _texts(files: list[Path]) -> Iterator[str]:
    """The files line by line, so that a large one is never held whole."""
    for file in files:
        try:
            with file.open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    yield line.removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError(f"'{file}' is not UTF-8 text: convert it or leave it out") from None


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
