"""The parser of a command line, whose mistakes are sentences."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_jax.config import UserError

type Argument = tuple[list[str], dict[str, Any]]  # positional and keyword arguments of argparse's add_argument


def flag(names: str, metavar: str | None, help: str, **options: Any) -> Argument:
    """Return an argument with its flags, or with its name where it is positional; without `metavar` it is a switch."""
    kind = {"action": "store_true"} if metavar is None else {"metavar": metavar}
    return names.split(" "), {"help": help} | kind | options


# Arguments of several commands.
RUN_PATH = "run, Hugging Face or Meta directory, GGUF file or llama2.c .bin; or URL"
TOKENIZER = flag("--tokenizer", "PATH", "file, directory or URL; default: the one with the weights")
BASE = flag("--base", "PATH", "weights that an adapter is for; default: those that it names")
IGNORED_KEYS = flag(
    "--ignore-config-keys", "KEY[,KEY]", "keys of the directory's config files to take as if they were not there",
    type=lambda keys: [key for key in keys.split(",") if key], default=[],
)  # fmt: skip
MESH = tuple(flag(f"--mesh.{axis}", "N", "devices", type=int) for axis in ("data", "fsdp", "tensor", "expert"))
STEP = flag("--step", "N", "checkpoint of a run; default: the latest", type=int)
DTYPE = flag("--dtype", "{float32,bfloat16}", "default: bfloat16 on TPU and GPU", choices=("float32", "bfloat16"))
CHAT_TEMPLATE = flag(
    "--chat-template", "NAME",
    "another chat template: one that the model's files name, or Llama2Chat, Llama3Chat, ChatML, ChatGLM2Chat",
)  # fmt: skip
# How the model of PATH is loaded, to sample from it.
LOADING = (
    TOKENIZER, STEP, DTYPE, flag("--quantize", "{int8,int4}", "weights in fewer bits", choices=("int8", "int4")),
    *MESH, BASE, IGNORED_KEYS,
)  # fmt: skip


def mesh_of(args: argparse.Namespace) -> dict[str, int] | None:
    """Return the mesh that the flags of `MESH` give, None without any."""
    return {k.removeprefix("mesh."): n for k, n in vars(args).items() if k.startswith("mesh.") and n} or None


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `LOADING` say, as keyword arguments of `load`."""
    names = "tokenizer", "step", "dtype", "quantize", "base", "ignore_config_keys"
    return {"mesh": mesh_of(args)} | {name: getattr(args, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command's parser, as data.

    description: its help; the first sentence is in the list of commands.
    arguments: flags and positional arguments, in the order of the help.
    epilog: text after them.
    prog: how the command is written; None: `python -m llama_jax` and its name.
    takes_keys: True where it takes a config and its dotted keys.
    """

    description: str
    arguments: tuple[Argument, ...]
    epilog: str | None = None
    prog: str | None = None
    takes_keys: bool = False


class Parser(argparse.ArgumentParser):
    """A parser that raises a user's mistake as a `UserError` of one sentence."""

    @property
    def flags(self) -> list[str]:
        """All flags, as they are written."""
        return [flag for action in self._actions for flag in action.option_strings]

    def plain(self, word: str) -> str:
        """Return a word with the dashes of the flag that it is with underscores. Raises UserError for one dash."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if re.fullmatch(r"-[A-Za-z][\w.-]+", name) and name not in self.flags:
            raise UserError(f"'{name}' has one dash: did you mean '-{dashed}'?")
        return f"{dashed}{equals}{value}" if dashed in self.flags else word

    def check_flags(self, words: Sequence[str]) -> None:
        """Raise UserError for a misspelled flag, before another is missed in its place."""
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in self.flags):
                self.error(f"unrecognized arguments: {word}")

    def filled(self, args: argparse.Namespace) -> argparse.Namespace:
        """Return `args`. Raises UserError where one that must name something is an empty text."""
        for action in self._actions:
            given = getattr(args, action.dest, None)
            if action.metavar != "TEXT" and "" in (given if isinstance(given, list) else [given]):
                raise UserError(f"{(action.option_strings or [action.metavar])[0]} is empty: give a value")
        return args

    def error(self, message: str) -> NoReturn:
        """Raise the sentence for one of argparse's messages."""
        if found := re.fullmatch(r"argument (-[^:/]+).*: invalid (\w+) value: (.*)", message):
            kind = {"int": "a whole number", "float": "a number"}.get(found[2], found[2])
            raise UserError(f"{found[1]}={found[3]} must be {kind}")
        if found := re.fullmatch(r"argument (-[^:/]+).*: expected (?:at least )?one argument", message):
            metavar = next(a.metavar for a in self._actions if found[1] in a.option_strings)
            raise UserError(f"{found[1]} needs a {'directory' if metavar == 'DIR' else 'value'}")
        if found := re.fullmatch(r"argument (-[^:/]+).*: invalid choice: (.*) \(choose from (.*)\)", message):
            raise UserError(f"{found[1]}={found[2]} must be one of {found[3].replace("'", '')}")
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            if not found[1].startswith("-"):
                hint = f"`{self.prog} --help` shows what it takes"
                if "--prompt" in self.flags:
                    hint = f"did you mean --prompt '{found[1].removeprefix('prompt=')}'?"
                raise UserError(f"'{found[1]}' is one argument too many: {hint}")
            near = difflib.get_close_matches(found[1].partition("=")[0], self.flags, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"`{self.prog} --help` lists them"
            raise UserError(f"unknown flag '{found[1]}': {hint}")
        raise UserError(f"{message.removeprefix('argument ')}: `{self.prog} --help` shows how it is used")
