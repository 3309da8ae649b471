"""The work of each command of the command line, with the arguments that `__main__` has parsed."""

import argparse
import codecs
import dataclasses
import difflib
import io
import itertools
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

import jax
from rich.console import Console

from llama_jax.checkpoint import CONFIG_FILE, ConversionError, LanguageModel, convert, load, locate
from llama_jax.chips import CHIPS, described
from llama_jax.compilations import keep_compilations
from llama_jax.config import (
    UserError,
    config_names,
    field_types,
    find_config,
    leaves,
    load_config_module,
    override,
    read_json,
)
from llama_jax.evaluate_command import evaluate_command
from llama_jax.files import disk_failure
from llama_jax.key_help import key_help
from llama_jax.parallel import distributed
from llama_jax.planning import plan
from llama_jax.remote import default_cache, is_remote, with_urls
from llama_jax.run import Preempted, RunFailed, config_to_continue, train
from llama_jax.run_config import RunConfig, config_of
from llama_jax.sampling import (
    Encoded,
    SamplingConfig,
    built_in,
    complete_encoded,
    encoded_chat,
    encoded_prompt,
    stream_encoded,
)
from llama_jax.screen import speed
from llama_jax.text_commands import (
    prepare_command,
    tokenizer_compare_command,
    tokenizer_decode_command,
    tokenizer_encode_command,
    tokenizer_train_command,
)
from llama_jax.values import type_name

# The keys of a run that people change first: those that `--help` shows.
COMMON_KEYS = (
    "model.num_layers", "model.hidden_size", "tokenizer.path", "tokenizer.vocab_size", "data.path", "data.fields",
    "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.accumulation_steps", "num_steps",
    "global_batch_size", "sequence_length", "seed", "init_from", "mesh.fsdp", "mesh.tensor", "compute.remat",
    "checkpoint.every_steps", "logging.validate_every_steps", "logging.sample_prompts",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run a parsed command; mistakes and failures become one sentence on stderr and an exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # a damaged checkpoint: Orbax's words come as ours
    keep_compilations(args.command)
    try:
        return COMMANDS[args.command](args)
    except distributed.AgreedError as error:
        return report(f"error: {error}", 2)
    except UserError as error:
        print(f"error: {with_urls(str(error))}", file=sys.stderr)
        return distributed.leave(2)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: '{error.filename}' cannot be used ({error.strerror}): give another path", file=sys.stderr)
        return distributed.leave(2)
    except (RunFailed, ConversionError) as error:
        return report(f"failed: {error}", 1)
    except Preempted as error:
        return report(str(error), 75)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return distributed.leave(130)
    except BrokenPipeError:
        if distributed.several():
            os._exit(141)
        raise
    except Exception as error:
        if (found := disk_failure(error)) is not None:
            sentence, full = found
            cache = f" ($LLAMA_JAX_CACHE is '{default_cache()}')" if str(default_cache()) in sentence else ""
            print(f"{'failed' if full else 'error'}: {with_urls(sentence)}{cache}", file=sys.stderr)
            return distributed.leave(1 if full else 2)
        if not distributed.several():
            raise
        traceback.print_exc()
        return distributed.leave(1)


def report(sentence: str, code: int) -> int:
    """Print `sentence` on process 0 and return `code`, which all processes end with."""
    if distributed.is_main():
        print(with_urls(sentence), file=sys.stderr)
    return code


def train_command(args: argparse.Namespace) -> int:
    """Train a config, as one of several processes where there are several, or print its keys."""
    if args.help is not None:
        module, config = read_config(args)
        print(key_help(args, module, config, COMMON_KEYS))
        return 0
    join(args)
    module, config = distributed.all_agree(lambda: read_config(args))
    run_dir = args.run_dir or (args.config if in_run(args.config) else Path("runs") / find_config(args.config).stem)
    run = train(config, run_dir, quiet=args.quiet)
    if hasattr(module, "report"):
        try:
            distributed.all_agree(lambda: module.report(run))
        except Exception as error:
            error.add_note(f"'{run_dir}' is complete: only the report of '{args.config}' has failed")
            raise
    return 0


def read_config(args: argparse.Namespace) -> tuple[ModuleType, RunConfig]:
    """Return the config's module, and its config with the command line's keys; a run's config has an empty module."""
    if in_run(args.config):
        module, config = ModuleType(args.config), config_to_continue(args.config)
    else:
        module = load_config_module(args.config)
        config = config_of(module)
    known = {key: annotation for key, annotation, _ in leaves(config)}
    for key, value in args.keys.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True and known.get(key, bool) is not bool:
            raise UserError(f"{flag} needs a value of type {type_name(known[key])}")
        if key.startswith("no_") and key[3:] in known and value is True:
            raise UserError(f"unknown flag '{flag}': did you mean '--{key[3:].replace('_', '-')} false'?")
        near = difflib.get_close_matches(key, vars(args), n=1, cutoff=0.8)
        if near and "." not in key and key not in field_types(RunConfig):
            raise UserError(f"unknown flag '{flag}': did you mean '--{near[0].replace('_', '-')}'?")
    return module, override(config, args.keys)


def in_run(path: str) -> bool:
    """Return whether CONFIG is a run's directory, or a path in it, and not a name in configs/.

    Raises UserError for another directory, and for a run's that is not there.
    """
    root, _ = locate(path)
    if path in config_names() or path.endswith(".py"):
        return False
    if is_remote(root):
        return True
    file = Path(root, CONFIG_FILE)
    if Path(root).is_dir() and not (file.is_file() and read_json(file).get("type") == RunConfig.__name__):
        raise UserError(
            f"'{path}' is not a run: give a config, and --run-dir for a new run's directory, --init-from for weights"
        )
    if (
        os.sep in path
        and not Path(root).exists()
        and not (Path(f"{path}.py").exists() or Path(path).name in config_names())
    ):
        raise UserError(f"'{path}' does not exist: give a config's name or file, or the directory of a run to continue")
    return file.is_file()


def join(args: argparse.Namespace) -> None:
    """Join the other processes, if any; of these only the first prints."""
    numbers = {"--num-processes": args.num_processes, "--process-id": args.process_id}
    for flag, number in numbers.items():
        if number is not None and not number.isdigit():
            raise UserError(f"{flag}='{number}' must be a number")
    distributed.start(args.coordinator_address, *(None if n is None else int(n) for n in numbers.values()))
    if distributed.several():
        # Libraries print from C++ to descriptor 1, Gloo its peers in the middle of our lines.
        sys.stdout.flush()
        dropped = os.open(os.devnull, os.O_WRONLY)
        own = os.dup(1) if distributed.is_main() else dropped
        sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(2 if distributed.is_main() and jax.config.jax_platforms != "cpu" else dropped, 1)


def plan_command(args: argparse.Namespace) -> int:
    """Print the plan of a config; the exit code is 1 where it does not fit."""
    # Only shapes are computed: the accelerators of this machine, and libtpu's messages where there are none, are not
    # needed.
    jax.config.update("jax_platforms", "cpu")
    if args.help is not None:
        print(key_help(args, *read_config(args), COMMON_KEYS))
        return 0
    config = read_config(args)[1]
    if args.chip is not None:
        chip = described(args.chip)
        CHIPS[chip.name] = chip
        args.topology = args.topology or chip.name
    if args.topology is None:
        raise UserError("plan needs --topology, such as h100, 'RTX 4090', h100:4x8, v5e:8x8 or '2x v5p:4x4x8'")
    found = plan(
        config,
        args.topology,
        compile=args.compile,
        search_all=args.search,
        sample_batch=args.sample_batch,
        sample_length=args.sample_length,
    )
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        Console(highlight=False).print(found)
    return 0 if found.fits else 1


def convert_command(args: argparse.Namespace) -> int:
    """Convert weights and print how much their logits differ."""
    check_weights(args.source)
    found = convert(
        args.source,
        args.destination,
        to=args.to,
        dtype=args.dtype,
        ignore_config_keys=args.ignore_config_keys,
        base=args.base,
        tokenizer=args.tokenizer,
    )
    if not found:
        print(f"{args.destination}: adapters")
        return 0
    print(
        f"{args.destination}: logits differ by at most {found['max_abs_logit_difference']:.2g} "
        f"(logit standard deviation {found['logit_std']:.2g})"
    )
    return 0


def sample_command(args: argparse.Namespace) -> int:
    """Continue prompts, or answer them, or converse."""
    check_weights(args.path)
    if args.json and args.prompt is None:
        raise UserError("--json answers prompts: give at least one --prompt")
    if args.chat_template is not None and not args.chat:
        raise UserError("--chat-template is for conversations: give --chat too")
    accept_any_text()
    args.sampling = SamplingConfig(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    lm = load(args.path, tokenizer=args.tokenizer, ignore_config_keys=args.ignore_config_keys, base=args.base)
    args.chat_template = built_in(args.chat_template, lm.tokenizer)
    if args.prompt is None:
        converse(lm, args)
        return 0
    conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    if args.json:
        prompts = [encoded(lm, messages, args) for messages in conversations]
        number = min(new_tokens(lm, prompt, args) for prompt in prompts)
        config = dataclasses.replace(args.sampling, max_new_tokens=number)
        began = time.monotonic()
        completions = complete_encoded(lm, args.prompt, prompts, config)
        print_speed(speed([(sum(len(found.token_ids) for found in completions), time.monotonic() - began)]), args)
        for found in completions:
            print(json.dumps(dataclasses.asdict(found)))
        return 0
    for row, messages in enumerate(conversations):
        _, about = print_answer(lm, messages, row, args)
        if row + 1 < len(conversations) or sys.stdout.isatty() or (os.path.sameopenfile(1, 2) and not args.quiet):
            print(flush=True)
        print_speed(about, args)
    return 0


def check_weights(path: str) -> None:
    """Raise UserError for a config, which has no weights."""
    if path.endswith(".py") or (path in config_names() and not os.path.exists(path)):
        run = f"runs/{Path(path).stem}"
        hint = (
            f"did you mean '{run}'?" if os.path.exists(run) else "give the directory of a run that was trained with it"
        )
        raise UserError(f"'{path}' is a config and has no weights: {hint}")


def new_tokens(lm: LanguageModel, prompt: Encoded, args: argparse.Namespace) -> int:
    """Return the number of tokens to sample: that of --max-new-tokens, or what there is room for, at most 128."""
    room = lm.config.length_limit - (1 if lm.config.has_source else len(prompt.ids))
    return max(1, min(128, room)) if args.max_new_tokens is None else args.max_new_tokens


def print_speed(line: str, args: argparse.Namespace) -> None:
    """Print a line about the speed of an answer on stderr, or nothing with --quiet."""
    if not args.quiet:
        print(line, file=sys.stderr)


def accept_any_text() -> None:
    """Let text pass that the locale cannot encode: written as escapes; read as UTF-8 where the locale is ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # the tokenizer refuses what is not text, in a sentence
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else sys.stdin.encoding, errors="surrogateescape")


def print_answer(
    lm: LanguageModel, messages: list[dict[str, str]], row: int, args: argparse.Namespace
) -> tuple[str, str]:
    """Print, piece by piece, the answer to a conversation, or without --chat the last message and its continuation.

    Returns the model's text, and a line about its speed.
    """
    prompt, began, times = encoded(lm, messages, args), time.monotonic(), list[tuple[int, float]]()
    config = dataclasses.replace(args.sampling, max_new_tokens=new_tokens(lm, prompt, args))
    pieces = stream_encoded(lm, prompt, config, row=row, progress=lambda n: times.append((n, time.monotonic() - began)))
    first = next(pieces, "")  # before the prompt is printed: a prompt that is refused leaves stdout empty
    shows_prompt = not args.chat and not lm.config.has_source
    print(messages[-1]["content"] if shows_prompt else "", end=first, flush=True)
    written = [first]
    for text in pieces:
        print(text, end="", flush=True)
        written.append(text)
    return "".join(written), speed(times)


def encoded(lm: LanguageModel, messages: list[dict[str, str]], args: argparse.Namespace) -> Encoded:
    """Return the conversation by its template, or without --chat the last message as it is."""
    if args.chat:
        return encoded_chat(lm, messages, args.chat_template)
    return encoded_prompt(lm, messages[-1]["content"])


def converse(lm: LanguageModel, args: argparse.Namespace) -> None:
    """Continue each line that is typed, or answer it in a conversation, until an empty line or the end of input."""
    history: list[dict[str, str]] = []
    try:
        for row in itertools.count():
            print("prompt> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline().rstrip("\r\n")):
                return
            messages = [*history, {"role": "user", "content": line}]
            try:
                answer, about = print_answer(lm, messages, row, args)
                print(flush=True)
                print_speed(about, args)
                history = [*messages, {"role": "assistant", "content": answer}] if args.chat else []
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)


COMMANDS = {
    "train": train_command,
    "plan": plan_command,
    "sample": sample_command,
    "evaluate": evaluate_command,
    "convert": convert_command,
    "prepare": prepare_command,
    "tokenizer train": tokenizer_train_command,
    "tokenizer encode": tokenizer_encode_command,
    "tokenizer decode": tokenizer_decode_command,
    "tokenizer compare": tokenizer_compare_command,
}
