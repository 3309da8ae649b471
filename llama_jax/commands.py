"""The work of each command of the command line, with the arguments that `__main__` has parsed."""

import argparse
import difflib
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

import jax
from rich.console import Console

from llama_jax.checkpoint import CONFIG_FILE, ConversionError, convert, locate
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
from llama_jax.sample_command import check_weights, sample_command
from llama_jax.serve_command import serve_command
from llama_jax.text_commands import (
    prepare_command,
    tokenizer_compare_command,
    tokenizer_decode_command,
    tokenizer_encode_command,
    tokenizer_train_command,
)
from llama_jax.values import type_name
from llama_jax.verify_command import verify_command

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
        return distributed.end(COMMANDS[args.command](args))
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
        if distributed.several():
            print("interrupted", file=sys.stderr)
            os._exit(130)
        raise
    except BrokenPipeError:
        if distributed.several():
            os._exit(141)
        raise
    except Exception as error:
        if (found := disk_failure(error)) is not None:
            sentence, again = found
            cache = f" ($LLAMA_JAX_CACHE is '{default_cache()}')" if str(default_cache()) in sentence else ""
            print(f"{'failed' if again else 'error'}: {with_urls(sentence)}{cache}", file=sys.stderr)
            return distributed.leave(1 if again else 2)
        if not distributed.several():
            raise
        traceback.print_exc()
        return distributed.leave(1)


def report(sentence: str, code: int) -> int:
    """Print `sentence` on process 0 and return `code`, which all processes end with."""
    if distributed.is_main():
        print(with_urls(sentence), file=sys.stderr)
    return distributed.end(code)


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
    hardware = {"checks.hardware": True} if vars(args).get("check_hardware") else {}
    return module, override(config, args.keys | hardware)


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
    found = read_json(file) if file.is_file() else {}
    if Path(root).is_dir() and not (isinstance(found, dict) and found.get("type") == RunConfig.__name__):
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


COMMANDS = {
    "train": train_command,
    "plan": plan_command,
    "sample": sample_command,
    "serve": serve_command,
    "evaluate": evaluate_command,
    "convert": convert_command,
    "verify": verify_command,
    "prepare": prepare_command,
    "tokenizer train": tokenizer_train_command,
    "tokenizer encode": tokenizer_encode_command,
    "tokenizer decode": tokenizer_decode_command,
    "tokenizer compare": tokenizer_compare_command,
}
