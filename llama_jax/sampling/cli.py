"""`sample.py PATH`: continue texts from the command line."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from llama_jax.checkpoint.language_model import LanguageModel, load
from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig
from llama_jax.sampling.processors import Sampler
from llama_jax.sampling.text import complete, stream_text


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code. Raises UserError for a user's mistake."""
    args = _parser().parse_args(argv)
    if args.json and args.prompt is None:
        raise UserError("--json answers prompts: give at least one --prompt")
    sampler = Sampler.of(args.temperature, args.top_k, args.top_p)
    lm = load(args.path, tokenizer=args.tokenizer)
    if args.prompt is None:
        _converse(lm, args)
    elif args.json:
        for found in complete(lm, args.prompt, max_new_tokens=args.max_new_tokens, sampler=sampler, seed=args.seed):
            print(json.dumps(dataclasses.asdict(found)))
    else:
        for row, prompt in enumerate(args.prompt):
            if row:
                print()
            _print_continued(lm, prompt, row, args)
        if sys.stdout.isatty():
            print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Continue texts with a trained model. An encoder-decoder answers: the prompt is its source, in "
        "which special tokens such as <extra_id_0> may be written out, and only the answer is printed.",
    )
    parser.add_argument("path", metavar="PATH", help="run, Hugging Face or Meta directory, or a llama2.c .bin")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue or answer, repeatable; without one: interactive",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the one beside the weights")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the most probable tokens that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one object per prompt, with token ids and finish_reason")
    return parser


def _print_continued(lm: LanguageModel, prompt: str, row: int, args: argparse.Namespace) -> None:
    pieces = stream_text(
        lm,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        row=row,
    )
    first = next(pieces, "")  # before the prompt is printed: a prompt that is refused leaves stdout empty
    print("" if isinstance(lm.config, EncoderDecoderConfig) else prompt, end=first, flush=True)
    for text in pieces:
        print(text, end="", flush=True)


def _converse(lm: LanguageModel, args: argparse.Namespace) -> None:
    """Continue what is typed, line by line, until an empty line or the end of input."""
    row = 0
    try:
        while True:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline().rstrip("\n")):
                return
            try:
                _print_continued(lm, line, row, args)
                print(flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            row += 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
