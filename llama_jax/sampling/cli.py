"""`sample.py PATH`: continue texts from the command line, or answer in a conversation."""

import argparse
import codecs
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence

from llama_jax.checkpoint import LanguageModel, load
from llama_jax.config import UserError
from llama_jax.sampling.conversations import built_in, encoded_chat
from llama_jax.sampling.sampler import Sampler
from llama_jax.sampling.text import Encoded, complete_encoded, encoded_prompt, stream_encoded


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code. Raises UserError for a user's mistake."""
    args = _parser().parse_args(argv)
    if args.json and args.prompt is None:
        raise UserError("--json answers prompts: give at least one --prompt")
    if args.chat_template is not None and not args.chat:
        raise UserError("--chat-template is for conversations: give --chat too")
    _write_anything()
    sampler = Sampler.of(args.temperature, args.top_k, args.top_p)
    lm = load(args.path, tokenizer=args.tokenizer, ignore_config_keys=args.ignore_config_keys)
    args.chat_template = built_in(args.chat_template, lm.tokenizer)
    settings = {"max_new_tokens": args.max_new_tokens, "sampler": sampler, "seed": args.seed}
    if args.prompt is None:
        _converse(lm, args)
    elif args.json:
        encoded = [_encoded(lm, [{"role": "user", "content": prompt}], args) for prompt in args.prompt]
        for found in complete_encoded(lm, args.prompt, encoded, **settings):
            print(json.dumps(dataclasses.asdict(found)))
    else:
        for row, prompt in enumerate(args.prompt):
            if row:
                print()
            _print_answer(lm, [{"role": "user", "content": prompt}], row, args)
        if sys.stdout.isatty():
            print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Continue texts with a trained model. An encoder-decoder answers: the prompt is its source, in "
        "which special tokens such as <extra_id_0> may be written out, and only the answer is printed. With --chat "
        "the prompt is a message, and only the answer is printed.",
    )
    parser.add_argument("path", metavar="PATH", help="run, Hugging Face or Meta directory, or a llama2.c .bin; or URL")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue or answer, repeatable; without one: interactive",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer by the model's chat template; each --prompt begins a conversation",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="another chat template: one that the model's files name, or Llama2Chat, Llama3Chat, ChatML, ChatGLM2Chat",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="file, directory or URL; default: the one beside the weights"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the most probable tokens that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="0 to 2**64 - 1; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one object per prompt, with token ids and finish_reason")
    add_ignored_keys(parser)
    return parser


def add_ignored_keys(parser: argparse.ArgumentParser) -> None:
    """Add `--ignore-config-keys`, the option of every command that opens other people's directories."""
    parser.add_argument(
        "--ignore-config-keys",
        type=lambda keys: [key for key in keys.split(",") if key],
        default=[],
        metavar="KEY[,KEY]",
        help="keys of the directory's config files to take as if they were not there",
    )


def _write_anything() -> None:
    """Make letters pass that an ASCII locale does not have: written as escapes, read as UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused by the tokenizer, in a sentence
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else sys.stdin.encoding, errors="surrogateescape")


def _print_answer(lm: LanguageModel, messages: list[dict[str, str]], row: int, args: argparse.Namespace) -> str:
    """Print, as it comes, the answer to a conversation, or without --chat the last message and its continuation;
    returns what the model wrote."""
    prompt, pieces = messages[-1]["content"], _pieces(lm, messages, row, args)
    first = next(pieces, "")  # before the prompt is printed: a prompt that is refused leaves stdout empty
    print("" if args.chat or lm.config.has_source else prompt, end=first, flush=True)
    written = [first]
    for text in pieces:
        print(text, end="", flush=True)
        written.append(text)
    return "".join(written)


def _pieces(lm: LanguageModel, messages: list[dict[str, str]], row: int, args: argparse.Namespace) -> Iterator[str]:
    sampler = Sampler.of(args.temperature, args.top_k, args.top_p)
    encoded = _encoded(lm, messages, args)
    return stream_encoded(lm, encoded, max_new_tokens=args.max_new_tokens, sampler=sampler, seed=args.seed, row=row)


def _encoded(lm: LanguageModel, messages: list[dict[str, str]], args: argparse.Namespace) -> Encoded:
    """The conversation by its template, or without --chat the last message as it is."""
    if args.chat:
        return encoded_chat(lm, messages, args.chat_template)
    return encoded_prompt(lm, messages[-1]["content"])


def _converse(lm: LanguageModel, args: argparse.Namespace) -> None:
    """Continue what is typed, or answer to it and all before, line by line, until an empty line or the end of input."""
    row, history = 0, []
    try:
        while True:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline().rstrip("\r\n")):
                return
            messages = [*history, {"role": "user", "content": line}]
            try:
                answer = _print_answer(lm, messages, row, args)
                print(flush=True)
                history = [*messages, {"role": "assistant", "content": answer}] if args.chat else []
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            row += 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
