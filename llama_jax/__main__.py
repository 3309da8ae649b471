"""The command line: `python -m llama_jax COMMAND`, one function a command."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# XLA's C++ side prints its start-up to stderr; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from llama_jax.checkpoint import ConversionError, convert
from llama_jax.config import (
    UserError,
    component_choices,
    config_names,
    field_docs,
    find_config,
    leaves,
    load_config_module,
    override,
    type_name,
)
from llama_jax.data import cli as data_cli, read_pieces
from llama_jax.parallel import distributed
from llama_jax.remote import with_urls
from llama_jax.run import PLAN_OPTIONS, PLAN_USAGE, Preempted, RunConfig, RunFailed, load_config, plan_command, train
from llama_jax.sampling import cli as sampling_cli
from llama_jax.tokenizers import cli as tokenizers_cli

TRAIN_USAGE = """usage: train.py CONFIG [--key value ...] [--run-dir DIR]
                [--coordinator-address HOST:PORT --num-processes N --process-id I]

Trains CONFIG, a name in configs/ or a path, in DIR (default: runs/CONFIG), which may be a URL of an object store
(s3://, gs://); the same command again continues it.
On several hosts it is started once on each; the second line is for where SLURM, Open MPI or a TPU does not say it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 failed, 2 a user's mistake, 75 preempted."""
    # What Orbax has to say of a damaged checkpoint comes as one sentence of ours.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # its options are the config's keys, which argparse does not know
        return guarded(lambda: train_command(argv[1:]))
    if argv[:1] == ["plan"]:
        return guarded(lambda: plan_main(argv[1:]))
    if argv[:1] == ["sample"]:
        return guarded(lambda: sampling_cli.main(argv[1:]))
    args = command_parser().parse_args(argv)
    return guarded(lambda: args.main(args))


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands but those above, which are only named in its help."""
    parser = argparse.ArgumentParser(prog="python -m llama_jax", description="Language models in JAX.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("train", help="train a config, or continue a run", add_help=False)
    subparsers.add_parser("plan", help="will a config fit a machine, and how fast", add_help=False)
    subparsers.add_parser("sample", help="continue texts with a trained model", add_help=False)
    convert_parser = subparsers.add_parser("convert", help="import or export weights, with the logit check")
    convert_parser.add_argument(
        "source", metavar="SOURCE", help="run, Hugging Face or Meta directory, or a llama2.c .bin; or URL"
    )
    convert_parser.add_argument("destination", metavar="DESTINATION", help="directory to make, or URL to write")
    convert_parser.add_argument(
        "--to", choices=("hf", "native"), required=True, help="form of DESTINATION: Hugging Face's or this package's"
    )
    convert_parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as the source has it")
    sampling_cli.add_ignored_keys(convert_parser)
    convert_parser.set_defaults(main=convert_command)
    tokenizers_cli.add_arguments(subparsers, read_pieces)
    data_cli.add_arguments(subparsers)
    return parser


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; mistakes and failures become one sentence on stderr and an exit code."""
    try:
        return command()
    except distributed.AgreedError as error:
        return told(f"error: {error}", 2)
    except UserError as error:
        print(f"error: {with_urls(str(error))}", file=sys.stderr)
        return distributed.leave(2)
    except (RunFailed, ConversionError) as error:
        return told(f"failed: {error}", 1)
    except Preempted as error:
        return told(str(error), 75)
    except KeyboardInterrupt:
        return distributed.leave(130)
    except BrokenPipeError:  # whoever read our output has seen enough (`| head`), and Python would mind once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return distributed.leave(141)
    except Exception:
        if not distributed.several():
            raise
        traceback.print_exc()
        return distributed.leave(1)


def told(sentence: str, code: int) -> int:
    """`code`, which every process ends with, told once."""
    if distributed.is_main():
        print(with_urls(sentence), file=sys.stderr)
    return code


def train_command(argv: Sequence[str]) -> int:
    """`train CONFIG [--key value ...] [--run-dir DIR]`, as one of several processes where there are several."""
    names, options, wants_help = _parse(argv)
    if not names:
        print(TRAIN_USAGE + f"\nconfigs: {', '.join(config_names())}\n`train.py CONFIG --help` lists the keys.")
        return 0 if wants_help else 2
    if not wants_help:
        join(options)

    def load():
        if len(names) > 1:
            raise UserError(f"'{names[1]}' is one argument too many: give one config, then --key value pairs")
        module = load_config_module(names[0])
        return module, override(module.get_config(), {key: options[key] for key in options if key != "run_dir"})

    module, config = distributed.all_agree(load)
    run_dir = options.get("run_dir")
    if wants_help:
        print(_help(names[0], module.__doc__, config))
        return 0
    run = train(config, run_dir or Path("runs") / find_config(names[0]).stem)
    if hasattr(module, "report"):
        distributed.all_agree(lambda: module.report(run))
    return 0


def join(options: dict[str, str]) -> None:
    """Joins the other processes, if any; of these only the first prints. Takes its own flags out of `options`."""
    address, *numbers = (options.pop(key, None) for key in ("coordinator_address", "num_processes", "process_id"))
    for flag, number in zip(("--num-processes", "--process-id"), numbers, strict=True):
        if number is not None and not number.isdigit():
            raise UserError(f"{flag}='{number}' must be a number")
    distributed.start(address, *(None if number is None else int(number) for number in numbers))
    if not distributed.is_main():  # what libraries print from C++ is no exception
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def plan_main(argv: Sequence[str]) -> int:
    """`plan CONFIG --topology TOPOLOGY [--compile] [--search] [--json] [--key value ...]`."""
    names, options, wants_help = _parse(argv)
    if not names or wants_help:
        print(PLAN_USAGE + f"\nconfigs: {', '.join(config_names())}; `train.py CONFIG --help` lists the keys.")
        return 0 if wants_help else 2
    if len(names) > 1:
        raise UserError(f"'{names[1]}' is one argument too many: give one config, then --key value pairs")
    own = {name: options.pop(name) for name in PLAN_OPTIONS if name in options}
    return plan_command(load_config(names[0], options), own)


def _parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str], bool]:
    """(positional arguments, options by key, whether --help was there)."""
    names: list[str] = []
    options: dict[str, str] = {}
    wants_help = False
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            wants_help = True
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                # A switch may stand alone: `--logging.tensorboard`.
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
                if key == "run-dir" and value == "true":
                    raise UserError("--run-dir needs a directory")
            options[key.replace("-", "_")] = value
        else:
            names.append(word)
    return names, options, wants_help


def _help(name: str, doc: str | None, config: RunConfig) -> str:
    lines = [TRAIN_USAGE, (doc or "").strip(), "", f"keys of {name}, with type, value and meaning:"]
    docs: dict[str, str] = {}

    def collect(part: object, prefix: str) -> None:
        for field, text in field_docs(type(part)).items():
            docs[prefix + field] = text
            collect(getattr(part, field), f"{prefix}{field}.")

    collect(config, "")
    for key, annotation, value in leaves(config):
        shown = type(value).__name__ if hasattr(value, "__dataclass_fields__") else value
        if isinstance(value, tuple):
            shown = ",".join(str(v) for v in value) or "(empty)"
        flag, kind = f"--{key.replace('_', '-')}", type_name(annotation)
        if options := component_choices(annotation):
            kind += f": {'|'.join(options)}"
        lines.append(f"  {flag} <{kind}> = {shown}\n      {docs.get(key, '')}")
    return "\n".join(lines)


def convert_command(args: argparse.Namespace) -> int:
    """`convert SRC DST --to {hf,native} [--dtype TYPE] [--ignore-config-keys KEY[,KEY]]`."""
    receipt = convert(
        args.source, args.destination, to=args.to, dtype=args.dtype, ignore_config_keys=args.ignore_config_keys
    )
    print(
        f"{args.destination}: logits differ by at most {receipt['max_abs_logit_difference']:.2g} "
        f"(logit standard deviation {receipt['logit_std']:.2g})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
