"""The command `sample`: prompts that are continued or answered, as they are written or many together."""

import argparse
import codecs
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from llama_jax.chat_terminal import converse, print_pieces, print_speed
from llama_jax.checkpoint import LanguageModel, load
from llama_jax.config import UserError, config_names
from llama_jax.parser import loading, mesh_of
from llama_jax.remote import local_path
from llama_jax.sample_flags import FIELDS, NEW_TOKENS, sampling_config
from llama_jax.sampling import (
    GUESSES,
    Completion,
    Conversation,
    Encoded,
    SamplingConfig,
    Speculation,
    built_in,
    completed,
    encoded_chat,
    encoded_prompt,
    stream_encoded,
    with_room,
)
from llama_jax.screen import Bar, speed

SEPARATOR = "---"  # between the samples of prompts, where there are several


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or the messages of a conversation to answer; `record` is the object that it came from."""

    text: str
    messages: list[dict[str, Any]] | None
    record: Mapping[str, Any]


def sample_command(args: argparse.Namespace) -> int:
    """Continue prompts, or answer them, or converse."""
    check_weights(args.path)
    accept_any_text()
    config = sampling_config(vars(args))
    prompts = read_prompts(args)
    check_flags(prompts, config, args)
    args.output = None if args.output is None else local_path(args.output, "output")
    lm = load(args.path, **loading(args))
    if (draft := args.draft) not in (None, *GUESSES):
        draft = load(draft, dtype=args.dtype, mesh=mesh_of(args))
    args.speculation = speculation = Speculation.of(lm, draft, args.draft_tokens)
    args.chat_template = built_in(args.chat_template, lm.tokenizer)
    if prompts is None:
        options = {name: getattr(config, name) for name in FIELDS if getattr(args, name) is not None}
        return converse(lm, options, args)
    if args.json or args.output or args.prompt_file or config.num_samples > 1 or config.num_beams > 1:
        write_all(lm, prompts, config, args, speculation)
        return 0
    for row, prompt in enumerate(prompts):
        times, began = list[tuple[int, float]](), time.monotonic()
        encoded = encode(lm, prompt, args)
        pieces = stream_encoded(
            lm,
            encoded,
            sized(lm, encoded, config, args),
            row=row,
            progress=lambda n, times=times, began=began: times.append((n, time.monotonic() - began)),
            speculation=speculation,
        )
        print_pieces(pieces, lead(lm, prompt))
        if row + 1 < len(prompts) or sys.stdout.isatty() or (os.path.sameopenfile(1, 2) and not args.quiet):
            print(flush=True)
        print_speed(times, args)
    if speculation is not None and args.stats:
        print(speculation, file=sys.stderr)
    return 0


def check_weights(path: str) -> None:
    """Raise UserError for a config, which has no weights."""
    if path.endswith(".py") or (path in config_names() and not os.path.exists(path)):
        run = f"runs/{Path(path).stem}"
        hint = (
            f"did you mean '{run}'?" if os.path.exists(run) else "give the directory of a run that was trained with it"
        )
        raise UserError(f"'{path}' is a config and has no weights: {hint}")


def check_flags(prompts: list[Prompt] | None, config: SamplingConfig, args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    for name in ("json", "output"):
        if getattr(args, name) and prompts is None:
            raise UserError(f"--{name} is for prompts: give at least one --prompt, or --prompt-file")
    if config.num_samples > 1 and prompts is None:
        raise UserError("--num-samples is for prompts: give at least one --prompt, or --prompt-file")
    for name in ("chat_template", "system"):
        if getattr(args, name) is not None and not (args.chat or any(p.messages for p in prompts or ())):
            raise UserError(f"--{name.replace('_', '-')} is for conversations: give --chat too")
    if config.logprobs is not None and not (args.json or str(args.output).endswith(".jsonl")):
        raise UserError("--logprobs are written as JSON: give --json too")


def read_prompts(args: argparse.Namespace) -> list[Prompt] | None:
    """Return the prompts of the flags, None without any. Raises UserError for a file that has none."""
    if args.prompt is None and args.prompt_file is None:
        return None
    texts: list[Mapping[str, Any]] = [{"prompt": text} for text in args.prompt or ()]
    if args.prompt_file is not None:
        texts += read_file(
            args.prompt_file if args.prompt_file == "-" else str(local_path(args.prompt_file, "prompt_file"))
        )
    prompts = list[Prompt]()
    for record in texts:
        messages, text = record.get("messages"), record.get("prompt", "")
        if messages is None and args.chat:
            messages = [{"role": "user", "content": text}]
        if messages is not None and args.system and not any(m.get("role") == "system" for m in messages):
            messages = [{"role": "system", "content": args.system}, *messages]
        prompts.append(Prompt(text, messages, record))
    return prompts


def read_file(name: str) -> list[Mapping[str, Any]]:
    """Return the records of a file, lines of text or JSONL; `-` is standard input. Raises UserError."""
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt-file '{name}' cannot be read ({error.strerror}): give a file of prompts") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file '{name}' is not UTF-8 text: give lines of text, or .jsonl") from None
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompt-file '{name}' has no prompts: give a file with a line for each")
    if not (name.endswith(".jsonl") or (name == "-" and lines[0][1].startswith("{"))):
        return [{"prompt": line.removesuffix("\r")} for _, line in lines]
    return [read_record(name, number, line) for number, line in lines]


def read_record(name: str, number: int, line: str) -> Mapping[str, Any]:
    """Return the record of a line of JSONL. Raises UserError."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    record = {"prompt": record} if isinstance(record, str) else record
    if isinstance(record, dict):
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return record
        if messages is None and isinstance(record.get("prompt"), str):
            return record
    raise UserError(f"--prompt-file '{name}' line {number} must be an object with a `prompt`, or with `messages`")


def accept_any_text() -> None:
    """Let text pass that the locale cannot encode: written as escapes; read as UTF-8 where the locale is ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # the tokenizer refuses what is not text, in a sentence
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else sys.stdin.encoding, errors="surrogateescape")


def encode(lm: LanguageModel, prompt: Prompt, args: argparse.Namespace) -> Encoded:
    """Return a conversation by its template, or a text as it is."""
    if prompt.messages is not None:
        return encoded_chat(lm, prompt.messages, args.chat_template)
    return encoded_prompt(lm, prompt.text)


def sized(lm: LanguageModel, encoded: Encoded, config: SamplingConfig, args: argparse.Namespace) -> SamplingConfig:
    """Return the config with the number of new tokens: that of --max-new-tokens, or what there is room for."""
    if args.max_new_tokens is not None:
        return config
    return with_room(lm, encoded, config, Conversation.NEW_TOKENS if args.chat else NEW_TOKENS)


def lead(lm: LanguageModel, prompt: Prompt) -> str:
    """Return the text that is printed before what the model writes."""
    return "" if prompt.messages is not None or lm.config.has_source else prompt.text


def write_all(
    lm: LanguageModel,
    prompts: list[Prompt],
    config: SamplingConfig,
    args: argparse.Namespace,
    speculation: Speculation | None,
) -> None:
    """Write the texts of all prompts in their order, as soon as each is complete, with a bar for many."""
    encoded = [encode(lm, prompt, args) for prompt in prompts]
    configs = [sized(lm, own, config, args) for own in encoded]
    times, began = list[tuple[int, float]](), time.monotonic()
    found = completed(
        lm,
        [prompt.text for prompt in prompts],
        encoded,
        configs,
        speculation=speculation,
        progress=lambda n: times.append((n, time.monotonic() - began)),
    )
    as_json = args.json or str(args.output).endswith(".jsonl")
    # Where texts are printed on a terminal, they are the progress.
    hidden = args.quiet or len(prompts) == 1 or (sys.stdout.isatty() and not args.output)
    bar = Bar("sampling", 0, len(prompts), silent=hidden, slow=True, console=Console(stderr=True))
    written = 0
    with output(args.output) as out, bar:
        for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True), 1):
            for sample, completion in enumerate(samples):
                if as_json:
                    text = json.dumps(as_record(prompt, completion, sample if len(samples) > 1 else None))
                else:
                    text = lead(lm, prompt) + completion.completion
                    text = f"{SEPARATOR}\n{text}" if len(samples) > 1 and written else text
                print(text, file=out, flush=True)
                written += 1
            bar.advance(number)
    if args.stats or not args.quiet:
        print(speed(times[-1:]), file=sys.stderr)
    if speculation is not None and args.stats:
        print(speculation, file=sys.stderr)


def as_record(prompt: Prompt, completion: Completion, sample: int | None) -> dict[str, Any]:
    """Return the object of a text: the prompt's own, with what was written; `sample` is its number among several."""
    found = {key: value for key, value in dataclasses.asdict(completion).items() if value is not None}
    del found["prompt"]
    return {**prompt.record, **({} if sample is None else {"sample": sample}), **found}


@contextlib.contextmanager
def output(file: Path | None) -> Iterator[TextIO]:
    """Open a file to write, or give standard output. Raises UserError where it cannot be written."""
    if file is None:
        yield sys.stdout
        return
    try:
        opened = file.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output '{file}' cannot be written ({error.strerror}): give another file") from None
    with opened:
        yield opened
