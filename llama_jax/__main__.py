"""The command line, `python -m llama_jax COMMAND`: every parser is here, the work is in `commands.py`.

Fixed flags are read by argparse; `train` and `plan` also take the dotted keys of a config. Nothing that needs JAX is
imported before a command runs, so that `--help` is quick.
"""

import argparse
import atexit
import difflib
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from llama_jax import __version__
from llama_jax.config import UserError, config_names
from llama_jax.files import disk_failure
from llama_jax.installation import missing_package
from llama_jax.parser import BASE, DTYPE, IGNORED_KEYS, MESH, RUN_PATH, STEP, TOKENIZER, Argument, Command, Parser, flag
from llama_jax.sample_flags import SAMPLE
from llama_jax.serve_command import SERVE
from llama_jax.stopping import background_error, leave, terminate
from llama_jax.values import printable

# Settings of glibc's allocator, read when a process starts: a training step on a CPU takes and frees all of its memory,
# so that huge pages that are kept save much of its time (benchmarks/ has the figures). A thread's cache of small pieces
# would hold what one thread frees and another needs, and each piece the memory beside it.
TUNABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1"
    ":glibc.malloc.trim_threshold=4611686018427387904:glibc.malloc.tcache_count=0"
}
RESTARTED = "llama_jax_restarted"  # the -X option of a process that was started again with TUNABLES
KINDS = ("bpe", "unigram", "byte_bpe", "wordpiece", "whitespace")  # of tokenizers; a test compares them
CONFIG: tuple[Argument, ...] = (
    flag("config", "CONFIG", "name in configs/, path of a .py file, or a run", nargs="?"),
    flag("more", "", argparse.SUPPRESS, nargs="*"),
    flag("-h --help", None, "this; with CONFIG the keys that are changed most, with `CONFIG --help all` all of them, "
         "with `CONFIG --help optimizer` those of a section or about a word"),
)  # fmt: skip
COMMANDS = {
    "train": Command(
        "Train a config, or continue a run. CONFIG is a name in configs/ or a path; the same command again continues, "
        "and so does a run's directory in place of CONFIG. On several hosts it is started once on each.",
        (
            *CONFIG,
            flag("--run-dir", "DIR", "or a URL of an object store (default: runs/CONFIG)"),
            # For clusters other than SLURM, Open MPI and TPUs, which have these.
            flag("--coordinator-address", "HOST:PORT", "process 0, where nothing else names it"),
            flag("--num-processes", "N", "how many there are"),
            flag("--process-id", "I", "number of this one, from 0"),
            flag("--check-hardware", None, "first run a program with a known result on each device"),
            flag("--quiet", None, "no progress on the screen: only warnings, mistakes and the lines of the end"),
        ),
        "A piece is chosen by its name (--model.norm LayerNorm), and takes what it needs from the config around it. "
        "Exit code 0: done; 1: failed; 2: a mistake; 75: preempted, 76: stalled or "
        "another process is lost, start it again.",
        "train.py",
        takes_keys=True,
    ),
    "plan": Command(
        "Find whether a config fits a machine, and how fast it can be. Neither the machine nor the data is needed.",
        (
            *CONFIG,
            flag("--topology", "TOPOLOGY", "v5e:8x8, v5p:4x4x8 (chips of a TPU slice), '2x v6e:16x16' (slices), "
                 "h100:4x8 (nodes x GPUs), 'RTX 4090' (one GPU)"),
            flag("--chip", "FIELD=VALUE,...", "another chip, also as JSON: "
                 "name=mi300x,peak_flops=1.3e15,memory=192e9,bandwidth=5.3e12,link=4.48e11,network=5e10"),
            flag("--compile", None, "compile the real step for it, too (extra `plan`; GPUs: `plan-gpu`): XLA's memory, "
                 "what it sends"),
            flag("--search", None, "try all meshes, accumulation steps and remat policies, and rank what fits"),
            flag("--json", None, "for programs"),
            flag("--sample-batch", "N", "memory and speed of sampling so many rows", type=int),
            flag("--sample-length", "N", "positions of each of these rows", type=int),
        ),
        "Exit code 0: fits; 1: does not fit; 2: a mistake.",
        takes_keys=True,
    ),
    "compare": Command(
        "Compare runs. The table has the keys that differ, losses and speed, the best first, seeds as one row.",
        (
            flag("runs", "RUN", "run directories, folders that have runs, globs; or URLs of runs", nargs="+"),
            flag("--metric", "NAME", "compare by this one of metrics.jsonl; default: val_loss"),
            flag("--all", None, "every run in its own row, and all keys that differ"),
            flag("--png", "FILE", "write the curves as an image instead of drawing them (extra `compare`)"),
            flag("--json", None, "for programs"),
        ),
    ),
    "report": Command(
        "Report on runs and sweeps. Without a flag it is a table; --html writes one page, which needs no network, with "
        "config differences, curves, samples and evaluations.",
        (
            flag("runs", "RUN", "run directories, folders that have runs, sweeps, globs; or URLs of runs", nargs="+"),
            flag("--html", "FILE", "write the page"),
            flag("--watch", None, "serve the page on this machine while the runs go on"),
            flag("--port", "N", "of --watch, 0: any that is free; default: %(default)s", type=int, default=8321),
            flag("--metric", "NAME", "compare by this one of metrics.jsonl; default: val_loss"),
        ),
    ),
    "sample": SAMPLE,
    "serve": SERVE,
    "evaluate": Command(
        "Measure a model on texts, on tasks of lm-evaluation-harness (extra `eval`), or on pairs. A run without any of "
        "these is measured on its held-out data. Results of a run go into its evaluations/, too.",
        (
            flag("path", "PATH", RUN_PATH),
            flag("--tasks", "A[,B...]", "hellaswag, mmlu, ... or names of --task-files", nargs="+", default=[]),
            flag("--task-files", "DIR", "directory with tasks as YAML files"),
            flag("--text", "FILE", "perplexity and bits per byte: files, directories, globs", nargs="+", default=[]),
            flag("--pairs", "FILE", "texts and labels (classifiers), or translations (BLEU)", nargs="+", default=[]),
            flag("--source", "FILE", "lines to translate, and"), flag("--reference", "FILE", "their translations"),
            flag("--fields", "A[,B...]", "fields of records; default: the run's, or text"),
            flag("--limit", "N", "only the first N items of a task, documents of a file or pairs", type=int),
            flag("--num-fewshot", "N", "examples before each item; default: the task's", type=int),
            flag("--chat", None, "write items of tasks as chats, by the model's template"),
            flag("--chat-template", "NAME", "by this one: ChatML, ..."), flag("--system", "TEXT", "a message before"),
            flag("--window", "N", "tokens of a piece of text; default: a run's rows, the model's positions", type=int),
            flag("--stride", "N", "tokens from one window to the next; default: half a window", type=int),
            flag("--batch-size", "N", "rows at a time; default: %(default)s", type=int, default=8),
            DTYPE,
            *MESH,
            TOKENIZER,
            STEP,
            flag("--output", "FILE", "write the results as JSON"),
            flag("--json", None, "print them as JSON"), flag("--quiet", None, "no progress"),
        ),
    ),
    "convert": Command(
        "Import or export weights, with the logit check.",
        (
            flag("source", "SOURCE", RUN_PATH),
            flag("destination", "DESTINATION", "directory to make, or URL to write"),
            flag("--to", "{hf,native,peft}", "form of DESTINATION: Hugging Face's, this package's, or a run's LoRA "
                 "adapters alone as PEFT has them", choices=("hf", "native", "peft"), required=True),
            BASE,
            TOKENIZER,
            flag("--dtype", "{float32,bfloat16}", "default: as the source has it", choices=("float32", "bfloat16")),
            IGNORED_KEYS,
        ),
    ),
    "verify": Command(
        "Compare files with their checksums: checkpoints, tokenizer and corpus of a run, a corpus, what `convert` and "
        "`save` wrote.",
        (flag("path", "PATH", "directory of a run, a corpus, a conversion or an export; or URL"),),
        "Exit code 0: nothing is damaged; 1: something is, or cannot be read; 2: a mistake.",
    ),
    # Flags that are named like fields of DataConfig are read as these, and have its defaults.
    "prepare": Command(
        "Tokenize a corpus into shards. It may be text, JSONL, JSON, CSV and TSV (each also .gz, .zst, .bz2 and .xz), "
        "the members of tar archives, Parquet, datasets of Hugging Face (hf://NAME[/CONFIG]:SPLIT, or a directory of "
        "save_to_disk), ArrayRecord (tf.train.Example or JSON), and nanoGPT's and llm.c's .bin, on disk or in an "
        "object store (gs://, s3://). Finished shards are not made again. On a cluster, run one process for each "
        "of the --shards, with one --output; the same command without --shards then makes the index.",
        (
            flag("path", "PATH", "files, directories and globs; or URLs", nargs="+"),
            flag("--tokenizer", "PATH", "tokenizer file, or a directory with one", required=True),
            flag("--exclude", "PATTERN", "patterns as in the shell of files to leave out", nargs="+"),
            flag("--fields", "A[,B...]", "fields of a record that are its text; default: text"),
            flag("--chat-template", "NAME", "how the messages of a chat become tokens, such as ChatML"),
            flag("--document-chars", "N", "cut longer documents at line ends; default: none"),
            flag("--max-record-bytes", "N", "longer lines, records and whole files are bad; default: 268435456"),
            flag("--max-bad-records", "N", "more are an error; none: any number; default: 0"),
            flag("--validation-fraction", "F", "share of documents held out; default: 0.01"),
            flag("--cache-dir", "DIR", "default: $LLAMA_JAX_CACHE or ~/.cache/llama_jax"),
            flag("--output", "DIR", "the corpus' directory (default: one in the cache)"),
            flag("--num-workers", "N", "processes (default: one for each core)", type=int),
            flag("--shards --shard", "I|A:B", "make only shard I, or shards A to B-1, and no index"),
            flag("--count", None, "only print how many shards there are"),
        ),
    ),
    "tokenizer train": Command(
        "Train a tokenizer of any kind.",
        (
            flag("files", "FILE", "files, directories and globs, as `prepare` reads them", nargs="+"),
            flag("--fields", "A[,B...]", "fields of JSON, columns of tables", default="text"),
            flag("--kind", "KIND", f"{', '.join(KINDS)}; default: bpe", choices=KINDS, default="bpe"),
            flag("--vocab-size", "N", "bytes and special tokens included", type=int, required=True),
            flag("--special-token", "NAME", "added to the kind's, repeatable", action="append", default=[]),
            flag("--output", "DIR", "directory that gets the tokenizer's file", required=True),
        ),
    ),
    "tokenizer encode": Command(
        "Print the token ids of a text.",
        (
            flag("tokenizer", "PATH", "tokenizer file, or a directory that has one"),
            flag("text", "TEXT", "default: standard input", nargs="?"),
            flag("--bos", None, "begin with the BOS token"),
            flag("--eos", None, "end with the EOS token"),
        ),
    ),
    "tokenizer decode": Command(
        "Print the text of token ids.",
        (
            flag("tokenizer", "PATH", "tokenizer file, or a directory that has one"),
            flag("ids", "ID", "default: ids from standard input", nargs="*"),
        ),
    ),
    "tokenizer compare": Command(
        "Compare tokenizers. The table has tokens per word, character and byte, round trip and speed.",
        (
            flag("tokenizers", "TOKENIZER", "tokenizer files, or their directories", nargs="+"),
            flag("--text", "FILE", "default: a sample in English and one in Chinese", nargs="+"),
            flag("--fields", "A[,B...]", "fields of JSON, columns of tables", default="text"),
        ),
    ),
}  # fmt: skip


def make_parser(name: str) -> Parser:
    """Return the parser of a command."""
    command = COMMANDS[name]
    prog = command.prog or f"python -m llama_jax {name}"
    usage = f"{prog} CONFIG [--flag VALUE ...] [--key value ...]" if command.takes_keys else None
    parser = Parser(
        prog=prog,
        usage=usage,
        description=command.description,
        epilog=command.epilog,
        add_help=not command.takes_keys,
    )
    for names, options in command.arguments:
        parser.add_argument(*names, **options)
    return parser


def console(argv: Sequence[str] | None = None) -> NoReturn:
    """Run this process's command line and exit: the entry of the console script, `python -m`, train.py and sample.py.

    `train` starts this process again with the allocator's settings, once.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] and not {"-h", "--help", "--version"} & set(argv) and can_restart():
        try:
            os.execve(sys.executable, [sys.executable, "-X", RESTARTED, *sys.orig_argv[1:]], os.environ | TUNABLES)
        except OSError as error:
            print(f"warning: the allocator's settings were not applied: {error}", file=sys.stderr)
    signal.signal(signal.SIGTERM, leave)
    # Called last: Python's own end takes handlers away, and a signal would then make a failure of what is done.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    sys.unraisablehook = threading.excepthook = background_error
    code = main(argv)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # all is done
    sys.exit(code)


def can_restart() -> bool:
    """Return whether this process may be replaced by one with the same command line and `TUNABLES`.

    It may not where GLIBC_TUNABLES is set, where it has been already (also if something drops environment variables),
    and where it is not a program by itself: under a debugger or profiler, in a notebook, read from standard input.
    """
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    watched = watched or any(sys.monitoring.get_tool(tool) is not None for tool in range(6))
    hosts = {"pdb", "bdb", "debugpy", "pydevd", "IPython", "pytest", "jax"}  # jax: something has run in this process
    return (
        sys.platform == "linux"
        and TUNABLES.keys().isdisjoint(os.environ)
        and RESTARTED not in sys._xoptions
        and not (watched or sys.flags.inspect or sys.flags.interactive or hosts & sys.modules.keys())
        and sys.argv[:1] not in ([], [""], ["-"], ["-c"])
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 a user's mistake, 75 preempted, 130 interrupted.

    A process that stalls ends with 76 (`llama_jax.run.watchdog`).
    """
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {printable(str(error), keep=chr(10))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # of a SIGTERM it has a sentence
        print(*error.args or ["interrupted"], file=sys.stderr)
        return 75 if error.args else 130
    except BrokenPipeError:  # the reader of our output has closed it (`| head`); Python's own flush would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (found := disk_failure(error)) is None:
            raise
        print(f"{'failed' if found[1] else 'error'}: {found[0]}", file=sys.stderr)
        return 1 if found[1] else 2


def run(args: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code."""
    if COMMANDS[args.command].takes_keys and args.config is None:
        if args.keys and args.help is None:
            raise UserError(f"give a config first, such as tiny_python: there are {', '.join(config_names())}")
        print(make_parser(args.command).format_help().rstrip(), f"\n\nconfigs: {', '.join(config_names())}", sep="")
        return 2 if args.help is None else 0
    # XLA's C++ side prints its start-up to stderr; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        if args.command == "compare":
            from llama_jax.compare_command import compare_command as work
        elif args.command == "report":
            from llama_jax.report_command import report_command as work
        else:  # seconds: JAX and all packages
            from llama_jax.commands import run as work
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "llama_jax"):
            raise
        raise UserError(missing_package(name)) from None
    if signal.getsignal(signal.SIGTERM) is leave:
        signal.signal(signal.SIGTERM, terminate)
    return work(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line, with the command's name as `command`.

    Those of `train` and `plan` also have `keys`, the texts of dotted keys (True for a key without one), and `help`:
    None, or the words after it. Raises UserError for a mistake; `--version`, and `--help` of the other commands, print
    and exit.
    """
    words = [word for given in argv for word in (["--help", given[7:]] if given.startswith("--help=") else [given])]
    if words[-1:] == ["--version"] and not any(word.startswith("-") for word in words[:-1]):
        print(f"llama_jax {__version__} (jax {version('jax')}, Python {platform.python_version()})")
        sys.exit(0)
    command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if command is None:
        command_list(words)
    words = words[len(command.split()) :]
    parser = make_parser(command)
    words = [parser.plain(word) for word in words]
    if not COMMANDS[command].takes_keys:
        parser.check_flags(words)
        return parser.filled(parser.parse_args(words, argparse.Namespace(command=command)))
    fixed, keys = split_keys(words, parser.flags)
    args = parser.filled(parser.parse_intermixed_args(fixed, argparse.Namespace(command=command, keys=keys)))
    for word in [args.config or "", *args.more]:
        key, equals, value = word.lstrip("+").partition("=")
        if equals and re.fullmatch(r"[\w.-]+", key):
            raise UserError(f"'{word}' lacks the dashes of a key: did you mean '--{key.replace('_', '-')} {value}'?")
    args.help = [*args.more, *(key for key, value in keys.items() if value is True)] if args.help else None
    args.keys = {key: value for key, value in keys.items() if args.help is None or value is not True}
    if args.help and args.config == "all":  # without a config
        args.config, args.help = None, []
    if args.more and args.help is None:
        key, *values = args.more
        pair = f"--{key.replace('_', '-')} {values[0]}" if values else ""
        hint = f"did you mean '{pair}'?" if pair else "give one config, then --key value pairs"
        raise UserError(f"'{key}' is one argument too many: {hint}")
    name = args.config or "tiny_python"
    meant = difflib.get_close_matches(name, config_names(), cutoff=0.5)
    if args.help == [] and not (meant or os.path.exists(name) or name.endswith(".py")):
        raise UserError(f"--help {name} needs a config: `{parser.prog} tiny_python --help {name}`")
    return args


def split_keys(words: Sequence[str], flags: Sequence[str]) -> tuple[list[str], dict[str, str | bool]]:
    """Return (words for argparse, dotted keys with their values): a key is every `--word` that is not in `flags`.

    Its value follows `=` or is the next word; a key before another flag or at the end has the value True.
    """
    fixed: list[str] = []
    keys: dict[str, str | bool] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or flag in flags:
            fixed.append(word)
            continue
        alone = not rest or rest[0].startswith("--")
        keys[flag[2:].replace("-", "_")] = value if equals else alone or rest.pop(0)
    return fixed, keys


def command_list(words: Sequence[str]) -> NoReturn:
    """Print the commands that begin with these words and exit, or raise UserError for an unknown one."""
    group = "tokenizer " if words[:1] == ["tokenizer"] else ""
    names = [name for name in COMMANDS if name.startswith(group)]
    rest = words[1:] if group else words
    if rest[:1] in (["-h"], ["--help"], ["help"]):
        print(f"usage: python -m llama_jax {group}COMMAND ...\n\nLanguage models in JAX. Commands:\n")
        print(*(f"  {name:<18} {COMMANDS[name].description.partition('.')[0]}" for name in names), sep="\n")
        print(f"\n`python -m llama_jax {group}COMMAND --help` shows how one is used.")
        sys.exit(0)
    known = ["--help", "--version"] if rest and rest[0].startswith("-") else names
    near = difflib.get_close_matches(" ".join(words[: 1 + bool(group)]), known, n=1) if rest else []
    hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(names)}"
    if rest and rest[0].startswith("-"):
        raise UserError(f"'{rest[0]}' comes before a command: {hint}")
    raise UserError(f"there is no command '{group}{rest[0]}': {hint}" if rest else f"give a command: {hint}")


if __name__ == "__main__":
    console()
