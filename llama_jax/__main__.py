"""The command line, `python -m llama_jax COMMAND`: every parser is here, the work is in `commands.py`.

Fixed flags are read by argparse; `train` and `plan` also take the dotted keys of a config. Nothing that needs JAX is
imported before a command runs, so that `--help` is quick.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from llama_jax.config import UserError, config_names

# Settings of glibc's allocator: a training step on a CPU takes and frees all of its memory, so that huge pages that are
# kept save much of its time (benchmarks/ has the figures). glibc reads them when a process starts.
TUNABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1"
    ":glibc.malloc.trim_threshold=4611686018427387904"
}
RESTARTED = "llama_jax_restarted"  # the -X option of a process that was started again with TUNABLES
KINDS = ("bpe", "unigram", "byte_bpe", "wordpiece", "whitespace")  # of tokenizers; a test compares them


def console(argv: Sequence[str] | None = None) -> NoReturn:
    """Run this process's command line and exit: the entry of the console script, `python -m`, train.py and sample.py.

    `train` starts this process again with the allocator's settings, once.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv) and can_restart():
        try:
            os.execve(sys.executable, [sys.executable, "-X", RESTARTED, *sys.orig_argv[1:]], os.environ | TUNABLES)
        except OSError as error:
            print(f"warning: the allocator's settings were not applied: {error}", file=sys.stderr)
    sys.exit(main(argv))


def can_restart() -> bool:
    """Return whether this process may be replaced by one with the same command line and `TUNABLES`.

    It may not where GLIBC_TUNABLES is set, where it has been already (also if something drops environment variables),
    and where it is not a program of its own: under a debugger or profiler, in a notebook, read from standard input.
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
    """Run a command and return its exit code: 0 done, 1 failed, 2 a user's mistake, 75 preempted."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.command in KEYED and args.config is None:
        print(PARSERS[args.command]().format_help().rstrip(), f"\n\nconfigs: {', '.join(config_names())}", sep="")
        return 0 if args.help else 2
    # XLA's C++ side prints its start-up to stderr; errors still show.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from llama_jax import commands  # seconds: JAX and all packages

    return commands.run(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line, with the command's name as `command`.

    Those of `train` and `plan` also have `keys`, the texts of dotted keys (True where a key stands alone), and `help`:
    None, `common` or `all`. Raises UserError for a mistake; `--help` of the other commands prints and exits.
    """
    words = list(argv)
    command = next((name for name in PARSERS if words[: len(name.split())] == name.split()), None)
    if command is None:
        command_list(words)
    words = words[len(command.split()) :]
    parser = PARSERS[command]()
    if command not in KEYED:
        return parser.parse_args(words, argparse.Namespace(command=command))
    fixed, keys = split_keys(words, parser.flags)
    args = parser.parse_intermixed_args(fixed, argparse.Namespace(command=command, keys=keys))
    names = [name for name in (args.config, args.more) if name is not None]
    args.help = ("all" if "all" in names else "common") if args.help else None
    if args.help == "all":
        names.remove("all")
    if len(names) > 1:
        raise UserError(f"'{names[1]}' is one argument too many: give one config, then --key value pairs")
    args.config = names[0] if names else None
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


class Parser(argparse.ArgumentParser):
    """A parser that raises a user's mistake as a `UserError` of one sentence."""

    @property
    def flags(self) -> list[str]:
        """All flags, as they are written."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raise the sentence for one of argparse's messages."""
        if found := re.fullmatch(r"argument (-[^:/]+).*: invalid (\w+) value: (.*)", message):
            kind = {"int": "a whole number", "float": "a number"}.get(found[2], found[2])
            raise UserError(f"{found[1]}={found[3]} must be {kind}")
        if found := re.fullmatch(r"argument (-[^:/]+).*: expected (?:at least )?one argument", message):
            metavar = next(a.metavar for a in self._actions if found[1] in a.option_strings)
            raise UserError(f"{found[1]} needs a {'directory' if metavar == 'DIR' else 'value'}")
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            if not found[1].startswith("-"):
                raise UserError(f"'{found[1]}' is one argument too many: `{self.prog} --help` shows what it takes")
            near = difflib.get_close_matches(found[1].partition("=")[0], self.flags, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"`{self.prog} --help` lists them"
            raise UserError(f"unknown flag '{found[1]}': {hint}")
        raise UserError(f"{message.removeprefix('argument ')}: `{self.prog} --help` shows how it is used")


def command_list(words: Sequence[str]) -> NoReturn:
    """Print the commands that begin with these words and exit, or raise UserError for an unknown one."""
    group = "tokenizer " if words[:1] == ["tokenizer"] else ""
    names = [name for name in PARSERS if name.startswith(group)]
    rest = words[1:] if group else words
    if rest[:1] in (["-h"], ["--help"]):
        print(f"usage: python -m llama_jax {group}COMMAND ...\n\nLanguage models in JAX. Commands:\n")
        print(*(f"  {name:<18} {(PARSERS[name]().description or '').partition('.')[0]}" for name in names), sep="\n")
        print(f"\n`python -m llama_jax {group}COMMAND --help` shows how one is used.")
        sys.exit(0)
    near = difflib.get_close_matches(" ".join(words[: 1 + bool(group)]), names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(names)}"
    raise UserError(f"there is no command '{group}{rest[0]}': {hint}" if rest else f"give a command: {hint}")


def train_parser() -> Parser:
    """Return the parser of `train`'s fixed flags."""
    parser = keyed_parser(
        "train.py",
        "Train CONFIG, a name in configs/ or a path, in a run directory; the same command again continues it. On several "
        "hosts it is started once on each.",
        "`train.py CONFIG --help` lists the keys that are changed most, `train.py CONFIG --help all` all of them. Exit "
        "code 0: done; 1: failed; 2: a mistake; 75: preempted, start it again.",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="or a URL of an object store (default: runs/CONFIG)")
    # Where SLURM, Open MPI or a TPU does not know these.
    parser.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0, where nothing else names it")
    parser.add_argument("--num-processes", metavar="N", help="how many there are")
    parser.add_argument("--process-id", metavar="I", help="number of this one, from 0")
    return parser


def plan_parser() -> Parser:
    """Return the parser of `plan`'s fixed flags."""
    parser = keyed_parser(
        "python -m llama_jax plan",
        "Find whether CONFIG, a name in configs/ or a path, fits a machine and how fast it can be. Neither the machine "
        "nor the data is needed.",
        "Keys are those of `train.py CONFIG --help`: --mesh.tensor 4 --compute.remat full. Exit code 0: fits; 1: does "
        "not fit; 2: a mistake.",
    )
    add = parser.add_argument
    add(
        "--topology",
        metavar="TOPOLOGY",
        help="v5e:8x8, v5p:4x4x8 (chips of a TPU slice), '2x v6e:16x16' (slices), h100:4x8 (nodes x GPUs)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the real step for it, too (extra `plan`; GPUs: `plan-gpu`): XLA's memory, what it sends",
    )
    add("--search", action="store_true", help="try all meshes, accumulation steps and remat policies; rank what fits")
    add("--json", action="store_true", help="for programs")
    add("--sample-batch", type=int, metavar="N", help="memory and speed of sampling so many rows")
    add("--sample-length", type=int, metavar="N", help="positions of each of these rows")
    return parser


def keyed_parser(prog: str, description: str, epilog: str) -> Parser:
    """Return the parser of a command that takes a config and dotted keys."""
    usage = f"{prog} CONFIG [--flag VALUE ...] [--key value ...]"
    parser = Parser(prog=prog, usage=usage, description=description, epilog=epilog, add_help=False)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="name in configs/, or path of a .py file")
    parser.add_argument("more", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", help="this; with CONFIG its keys, then `all` for all of them")
    return parser


def sample_parser() -> Parser:
    """Return the parser of `sample`."""
    parser = Parser(
        prog="sample.py",
        description="Continue texts with a trained model. An encoder-decoder answers: the prompt is its source, in "
        "which special tokens such as <extra_id_0> may be written out, and only the answer is printed. With --chat "
        "the prompt is a message, and only the answer is printed.",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="run, Hugging Face or Meta directory, or a llama2.c .bin; or URL")
    add("--prompt", action="append", metavar="TEXT", help="text to continue or answer, repeatable; else interactive")
    add("--chat", action="store_true", help="answer by the model's chat template; each --prompt begins a conversation")
    add(
        "--chat-template",
        metavar="NAME",
        help="another chat template: one that the model's files name, or Llama2Chat, Llama3Chat, ChatML, ChatGLM2Chat",
    )
    add("--tokenizer", metavar="PATH", help="file, directory or URL; default: the one with the weights")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: %(default)s")
    add("--top-k", type=int, metavar="K", help="only the K most probable tokens")
    add("--top-p", type=float, metavar="P", help="only the most probable tokens that make up P")
    add("--seed", type=int, default=0, metavar="S", help="0 to 2**64 - 1; default: %(default)s")
    add("--json", action="store_true", help="one object per prompt, with token ids and finish_reason")
    add_ignored_keys(parser)
    return parser


def add_ignored_keys(parser: argparse.ArgumentParser) -> None:
    """Add `--ignore-config-keys`, the option of the commands that open others' directories."""
    parser.add_argument(
        "--ignore-config-keys",
        type=lambda keys: [key for key in keys.split(",") if key],
        default=[],
        metavar="KEY[,KEY]",
        help="keys of the directory's config files to take as if they were not there",
    )


def convert_parser() -> Parser:
    """Return the parser of `convert`."""
    parser = Parser(prog="python -m llama_jax convert", description="Import or export weights, with the logit check.")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="run, Hugging Face or Meta directory, or a llama2.c .bin; or URL")
    add("destination", metavar="DESTINATION", help="directory to make, or URL to write")
    add(
        "--to",
        choices=("hf", "native"),
        required=True,
        help="form of DESTINATION: Hugging Face's or this package's",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="default: as the source has it")
    add_ignored_keys(parser)
    return parser


def prepare_parser() -> Parser:
    """Return the parser of `prepare`; the flags named like fields of `DataConfig` are read as these."""
    parser = Parser(
        prog="python -m llama_jax prepare",
        argument_default=argparse.SUPPRESS,
        description="Tokenize a corpus into shards. Text, JSONL, JSON, CSV and TSV (each also .gz, .zst, .bz2 and .xz), "
        "the members of tar archives, Parquet, datasets of Hugging Face (hf://NAME[/CONFIG]:SPLIT, or a directory of "
        "save_to_disk), ArrayRecord (tf.train.Example or JSON), and nanoGPT's and llm.c's .bin, on disk or in an "
        "object store (gs://, s3://). What is there already is not made again. On a cluster, run one process for each "
        "of the --shards, with one --output; the same command without --shards then makes the index.",
    )
    add = parser.add_argument
    add("path", nargs="+", help="files, directories, globs; or URLs")
    add("--tokenizer", required=True, metavar="PATH", help="tokenizer file, or a directory with one")
    add("--exclude", nargs="+", metavar="PATTERN", help="patterns as in the shell of files to leave out")
    add("--fields", metavar="A[,B...]", help="names of the record's fields that are its text; default: text")
    add("--chat-template", metavar="NAME", help="how the messages of a chat become tokens, such as ChatML")
    add("--document-chars", metavar="N", help="cut longer documents at line ends; default: none")
    add("--max-record-bytes", metavar="N", help="longer lines, records and whole files are bad; default: 268435456")
    add("--max-bad-records", metavar="N", help="more bad records are an error; default: 0; none: any number")
    add("--validation-fraction", metavar="F", help="share of documents held out; default: 0.01")
    add("--cache-dir", metavar="DIR", help="default: $LLAMA_JAX_CACHE or ~/.cache/llama_jax")
    add("--output", metavar="DIR", default=None, help="the corpus' directory (default: one in the cache)")
    add("--num-workers", type=int, metavar="N", default=None, help="processes (default: one for each core)")
    add("--shards", "--shard", metavar="I|A:B", default=None, help="make only shard I, or A to B-1, and no index")
    add("--count", action="store_true", default=False, help="only print how many shards there are")
    return parser


def tokenizer_train_parser() -> Parser:
    """Return the parser of `tokenizer train`."""
    parser = Parser(prog="python -m llama_jax tokenizer train", description="Train a tokenizer of any kind.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="files, directories and globs, as `prepare` reads them")
    add("--fields", default="text", metavar="A[,B...]", help="fields of JSON, columns of tables")
    add("--kind", choices=KINDS, default="bpe", help="bpe and unigram: SentencePiece; default: bpe")
    add("--vocab-size", type=int, required=True, metavar="N", help="bytes and special tokens included")
    add("--special-token", action="append", default=[], metavar="NAME", help="added to the kind's; repeatable")
    add("--output", required=True, metavar="DIR", help="directory that gets the tokenizer's file")
    return parser


def tokenizer_encode_parser() -> Parser:
    """Return the parser of `tokenizer encode`."""
    parser = Parser(prog="python -m llama_jax tokenizer encode", description="Print the token ids of a text.")
    parser.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="default: standard input")
    parser.add_argument("--bos", action="store_true", help="begin with the BOS token")
    parser.add_argument("--eos", action="store_true", help="end with the EOS token")
    return parser


def tokenizer_decode_parser() -> Parser:
    """Return the parser of `tokenizer decode`."""
    parser = Parser(prog="python -m llama_jax tokenizer decode", description="Print the text of token ids.")
    parser.add_argument("tokenizer", metavar="PATH", help="tokenizer file, or a directory that has one")
    parser.add_argument("ids", nargs="*", metavar="ID", help="default: ids from standard input")
    return parser


def tokenizer_compare_parser() -> Parser:
    """Return the parser of `tokenizer compare`."""
    parser = Parser(
        prog="python -m llama_jax tokenizer compare",
        description="Compare tokenizers: tokens per word, character and byte, round trip and speed.",
    )
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="tokenizer files, or their directories")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="default: a sample in English and one in Chinese")
    parser.add_argument("--fields", default="text", metavar="A[,B...]", help="fields of JSON, columns of tables")
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "train": train_parser,
    "plan": plan_parser,
    "sample": sample_parser,
    "convert": convert_parser,
    "prepare": prepare_parser,
    "tokenizer train": tokenizer_train_parser,
    "tokenizer encode": tokenizer_encode_parser,
    "tokenizer decode": tokenizer_decode_parser,
    "tokenizer compare": tokenizer_compare_parser,
}
KEYED = ("train", "plan")  # the commands that take dotted keys

if __name__ == "__main__":
    console()
