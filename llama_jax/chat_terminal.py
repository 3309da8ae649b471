"""Texts and conversations in a terminal: what is typed is answered as it is written, commands begin with a slash."""

import argparse
import contextlib
import difflib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.remote import default_cache
from llama_jax.sample_flags import FIELDS, NEW_TOKENS, from_text
from llama_jax.sampling import Conversation, Encoded, SamplingConfig, encoded_prompt
from llama_jax.screen import duration, speed

PROMPT, CONTINUED = "prompt> ", "   ...> "
HISTORY_FILE = "sample_history"  # in the cache directory
HELP = {  # lines of at most 40 columns
    "/help": "this",
    "/reset": "begin anew",
    "/save FILE": "JSONL of what was said",
    "/system TEXT": "the system message",
    "/temperature T": "0 is greedy",
    "/set NAME VALUE": "a setting; alone: list",
    "/exit": "end; so does Ctrl-D",
}
COMMANDS = [entry.partition(" ")[0] for entry in HELP]
KEYS = "Ctrl-C: stop an answer, or end\nAlt+Enter or a last \\: another line"
# Control characters that a model may write, but for line ends and tabs, as a terminal may show them.
VISIBLE = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}

Times = list[tuple[int, float]]  # tokens so far, seconds so far


class Texts(Conversation):
    """Texts that are continued, each alone, as a conversation without a template."""

    NEW_TOKENS = NEW_TOKENS

    def encoded(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        return encoded_prompt(self.lm, messages[-1]["content"])


def converse(lm: LanguageModel, options: Mapping[str, Any], args: argparse.Namespace) -> int:
    """Continue what is typed, or answer it in a conversation, until the end of input; return the exit code.

    Where input is not a terminal, and without prompt_toolkit, an empty line ends it, too.
    """
    kind, own = (Conversation, {"system": args.system, "template": args.chat_template}) if args.chat else (Texts, {})
    conversation, read = kind(lm, draft=args.speculation, **own, **options), reader()
    try:
        while True:
            text = read()
            try:
                if command := re.fullmatch(r"(/[a-z_]*)(\s.*)?", text.strip(), re.DOTALL):
                    print(run_command(conversation, command[1], (command[2] or "").strip()), file=sys.stderr)
                else:
                    answer(conversation, text, args)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    except EOFError:
        pass
    return 0


def answer(conversation: Conversation, text: str, args: argparse.Namespace) -> None:
    """Print the answer to a text, or the text and its continuation; an interrupt ends the answer alone."""
    lead = "" if args.chat or conversation.lm.config.has_source else text
    with interruptible() as stopped:
        times = show(functools.partial(conversation.stream, text), lead, stopped)
    print(flush=True)
    if stopped.is_set():
        print("stopped", file=sys.stderr)
    print_speed(times, args)


def show(stream: Callable[..., Generator[str]], lead: str, stopped: threading.Event | None = None) -> Times:
    """Print a text as it comes, after `lead`, until `stopped` is set; return (tokens so far, seconds so far)."""
    times, began, visible = Times(), time.monotonic(), VISIBLE if sys.stdout.isatty() else {}
    with contextlib.closing(stream(progress=lambda n: times.append((n, time.monotonic() - began)))) as pieces:
        try:
            first = next(pieces, "")  # before `lead` is printed: a prompt that is refused leaves stdout empty
            print(lead, end=first.translate(visible), flush=True)
            while not (stopped and stopped.is_set()) and (piece := next(pieces, None)) is not None:
                print(piece.translate(visible), end="", flush=True)
        except KeyboardInterrupt:
            if stopped is None:
                raise
            stopped.set()
    return times


def print_speed(times: Times, args: argparse.Namespace, *, streamed: bool = True) -> None:
    """Print a line about the times of `show` on stderr: with --quiet none, with --stats more."""
    first = f"first token after {duration(times[0][1])}, " if args.stats and streamed and times else ""
    if args.stats or not args.quiet:
        print(f"{first}{speed(times)}", file=sys.stderr)
    if args.stats and args.speculation is not None:
        print(args.speculation, file=sys.stderr)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Make the first interrupt set the event, so that no step of the device is cut; another one raises as usual."""
    stopped = threading.Event()

    def note(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def run_command(conversation: Conversation, name: str, rest: str) -> str:
    """Do what a line with a slash says, and return a line about it. Raises UserError for a mistake."""
    if name in ("/exit", "/quit"):
        raise EOFError
    if name == "/help":
        return "\n".join([*(f"{entry:<16} {text}" for entry, text in HELP.items()), KEYS])
    if name == "/reset":
        conversation.reset()
        return "what was said is forgotten"
    if name == "/save":
        return save(conversation, rest)
    if name == "/system":
        if isinstance(conversation, Texts):
            raise UserError("a system message is for conversations: start with --chat")
        conversation.set_system(rest or None)
        return "system message set" if rest else "no system message"
    if name in ("/set", "/temperature"):
        return set_option(conversation, rest if name == "/set" else f"temperature {rest}")
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {name}: {hint} (a space before it makes it text)")


def set_option(conversation: Conversation, rest: str) -> str:
    """Set a field of `SamplingConfig` from `NAME VALUE`, or return all fields."""
    name, value = [*re.split(r"=|\s+", rest, maxsplit=1), ""][:2]
    name, value, options = name.lstrip("-").replace("-", "_"), value.strip(), conversation.options
    if name and value:
        found = from_text(name, value)
        changed = {key: given for key, given in {**options, name: found}.items() if given is not None}
        SamplingConfig.of(**changed)
        conversation.options = changed
        return f"{name} = {value}"
    config = SamplingConfig.of(**options)
    if name:
        now = getattr(config, name) if name in FIELDS else from_text(name, "")
        raise UserError(f"{name}={now} needs a value: /set {name} VALUE")
    given = {name: getattr(config, name) for name in FIELDS}
    if "max_new_tokens" not in options:
        given["max_new_tokens"] = f"{conversation.NEW_TOKENS}, or what there is room for"
    return "\n".join(f"{name} = {value}" for name, value in given.items() if value not in (None, ()))


def save(conversation: Conversation, file: str) -> str:
    """Write a conversation, or the texts, as JSONL that --prompt-file and `prepare` read. Raises UserError."""
    if not file:
        raise UserError("/save needs a file")
    lines: list[dict[str, Any]] = [{"messages": conversation.messages}]
    if isinstance(conversation, Texts):
        said = [message["content"] for message in conversation.messages]
        lines = [{"prompt": a, "completion": b} for a, b in zip(said[::2], said[1::2], strict=False)]
    try:
        with Path(file).expanduser().open("x", encoding="utf-8") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"'{file}' cannot be written ({error.strerror}): give another file") from None
    return f"written to {file}"


def reader() -> Callable[[], str]:
    """Return a function that reads a text, and raises EOFError at the end: with line editing where it is possible."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            return _edited_reader()
    return _plain_line


def _plain_line() -> str:
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().rstrip("\r\n")
    while line.endswith("\\") and sys.stdin.isatty():
        print(CONTINUED, end="", file=sys.stderr, flush=True)
        line = f"{line[:-1]}\n" + sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise EOFError
    return line


def _edited_reader() -> Callable[[], str]:
    """Return the function of `reader` by prompt_toolkit (extra `terminal`). Raises ModuleNotFoundError without it."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("enter")
    def submit(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))

    @keys.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.text = ""  # a reset would lose the history, too
        else:
            event.app.exit(exception=KeyboardInterrupt)

    history: FileHistory | InMemoryHistory = InMemoryHistory()
    with contextlib.suppress(OSError, UserError):
        file = default_cache() / HISTORY_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))  # not a file of another user
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=CONTINUED,
        key_bindings=keys,
        history=history,
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        output=create_output(sys.stderr),
    )

    return session.prompt
