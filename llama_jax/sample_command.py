"""The command `sample`: prompts that are continued or answered, as they are written or many together."""

import argparse
import codecs
import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from llama_jax.chat_terminal import converse, print_speed, show
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
from llama_jax.screen import Bar

SEPARATOR = "---"  # between the samples of prompts, where there are several


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or the messages of a conversation to answer.

    `record` is the object that it came from; `lead` is printed before what the model writes.
    """

    text: str
    messages: list[dict[str, Any]] | None
    record: Mapping[str, Any]
    lead: str


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
    args.speculation = Speculation.of(lm, draft, args.draft_tokens)
    args.chat_template = built_in(args.chat_template, lm.tokenizer)
    if prompts is None:
        return converse(lm, {name: getattr(config, name) for name in FIELDS if getattr(args, name) is not None}, args)
    if lm.config.has_source:
        prompts = [dataclasses.replace(prompt, lead="") for prompt in prompts]
    if args.json or args.output or args.prompt_file or config.num_samples > 1 or config.num_beams > 1:
        write_all(lm, prompts, config, args)
        return 0
    for row, prompt in enumerate(prompts):
        encoded, own = encode(lm, prompt, config, args)
        stream = functools.partial(stream_encoded, lm, encoded, own, row=row, speculation=args.speculation)
        times = show(stream, prompt.lead)
        if row + 1 < len(prompts) or sys.stdout.isatty() or (os.path.sameopenfile(1, 2) and not args.quiet):
            print(flush=True)
        print_speed(times, args)
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
    several = {"json": args.json, "output": args.output, "num-samples": config.num_samples > 1}
    if prompts is None and any(several.values()):
        name = next(name for name, given in several.items() if given)
        raise UserError(f"--{name} is for prompts: give at least one --prompt, or --prompt-file")
    for name in ("chat_template", "system"):
        if getattr(args, name) is not None and not (args.chat or any(p.messages for p in prompts or ())):
            raise UserError(f"--{name.replace('_', '-')} is for conversations: give --chat too")
    if config.logprobs is not None and not (args.json or str(args.output).endswith(".jsonl")):
        raise UserError("--logprobs are written as JSON: give --json too")


def read_prompts(args: argparse.Namespace) -> list[Prompt] | None:
    """Return the prompts of the flags, None without any. Raises UserError for a file that has none."""
    if args.prompt is None and args.prompt_file is None:
        return None
    records: list[Mapping[str, Any]] = [{"prompt": text} for text in args.prompt or ()]
    if (file := args.prompt_file) is not None:
        records += read_file(file if file == "-" else str(local_path(file, "prompt_file")))
    prompts = list[Prompt]()
    for record in records:
        messages, text = record.get("messages"), record.get("prompt", "")
        if messages is None and args.chat:
            messages = [{"role": "user", "content": text}]
        if messages is not None and args.system and not any(m.get("role") == "system" for m in messages):
            messages = [{"role": "system", "content": args.system}, *messages]
        prompts.append(Prompt(text, messages, record, "" if messages else text))
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
    with contextlib.suppress(ValueError):
        record = json.loads(line)
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


def encode(
    lm: LanguageModel, prompt: Prompt, config: SamplingConfig, args: argparse.Namespace
) -> tuple[Encoded, SamplingConfig]:
    """Return a conversation by its template, or a text as it is, and the config with the number of new tokens."""
    if prompt.messages is None:
        encoded = encoded_prompt(lm, prompt.text)
    else:
        encoded = encoded_chat(lm, prompt.messages, args.chat_template)
    if args.max_new_tokens is None:
        config = with_room(lm, encoded, config, Conversation.NEW_TOKENS if args.chat else NEW_TOKENS)
    return encoded, config


def write_all(lm: LanguageModel, prompts: list[Prompt], config: SamplingConfig, args: argparse.Namespace) -> None:
    """Write the texts of all prompts in their order, as soon as each is complete, with a bar for many."""
    encoded, configs = zip(*(encode(lm, prompt, config, args) for prompt in prompts), strict=True)
    num_tokens, began = 0, time.monotonic()
    found = completed(lm, [prompt.text for prompt in prompts], encoded, configs, speculation=args.speculation)
    as_json = args.json or str(args.output).endswith(".jsonl")
    # Where texts are printed on a terminal, they are the progress.
    hidden = args.quiet or len(prompts) == 1 or (sys.stdout.isatty() and not args.output)
    bar = Bar("sampling", 0, len(prompts), silent=hidden, slow=True, console=Console(stderr=True))
    with output(args.output) as out, bar:
        for number, (prompt, samples) in enumerate(zip(prompts, found, strict=True), 1):
            for sample, completion in enumerate(samples):
                if as_json:
                    text = json.dumps(as_record(prompt, completion, sample if len(samples) > 1 else None))
                else:
                    text = f"{SEPARATOR}\n" if len(samples) > 1 and num_tokens else ""
                    text += prompt.lead + completion.completion
                print(text, file=out, flush=True)
                num_tokens += len(completion.token_ids)
            bar.advance(number)
    print_speed([(num_tokens, time.monotonic() - began)], args, streamed=False)


def as_record(prompt: Prompt, completion: Completion, sample: int | None) -> dict[str, Any]:
    """Return the object of a text: the prompt's own, with what was written; `sample` is its number among several."""
    found = {"sample": sample, **dataclasses.asdict(completion), "prompt": None}
    return {**prompt.record, **{key: value for key, value in found.items() if value is not None}}


def output(file: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    """Open a file to write, or give standard output. Raises UserError where it cannot be written."""
    try:
        opened = file and file.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output '{file}' cannot be written ({error.strerror}): give another file") from None
    return opened or contextlib.nullcontext(sys.stdout)
