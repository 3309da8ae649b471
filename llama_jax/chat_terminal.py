"""Texts and conversations in a terminal: what is typed is answered as it is written, commands begin with a slash."""

import argparse
import contextlib
import difflib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
KEYS = "Ctrl-C: stop an answer, or end\nAlt+Enter or a last \\: another line"
# Control characters that a model may write, but for line ends and tabs, as a terminal may show them.
VISIBLE = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Texts(Conversation):
    """Texts that are continued, each alone, as a conversation without a template."""

    NEW_TOKENS = NEW_TOKENS

    def encoded(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        return encoded_prompt(self.lm, messages[-1]["content"])


def converse(lm: LanguageModel, options: Mapping[str, Any], args: argparse.Namespace) -> int:
    """Continue what is typed, or answer it in a conversation, until the end of input; return the exit code.

    Where input is not a terminal, and without prompt_toolkit, an empty line ends it, too.
    """
    conversation = Texts(lm, **options)
    if args.chat:
        conversation = Conversation(lm, system=args.system, template=args.chat_template, **options)
    read = reader()
    try:
        while (text := read()) is not None:
            try:
                command = re.fullmatch(r"(/[a-z_]*)(?:\s+(.*))?", text.strip(), re.DOTALL)
                if command and command[1] in ("/exit", "/quit"):
                    break
                if command:
                    print(run_command(conversation, command[1], (command[2] or "").strip()), file=sys.stderr)
                else:
                    answer(conversation, text, args)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def answer(conversation: Conversation, text: str, args: argparse.Namespace) -> None:
    """Print the answer to a text, or the text and its continuation; an interrupt ends the answer alone."""
    shows_prompt = not (args.chat or conversation.lm.config.has_source)
    times, began = list[tuple[int, float]](), time.monotonic()
    pieces = conversation.stream(text, progress=lambda n: times.append((n, time.monotonic() - began)))
    with interruptible() as stopped, contextlib.closing(pieces):
        try:
            print_pieces(pieces, text if shows_prompt else "", stopped)
        except KeyboardInterrupt:
            stopped.set()
    print(flush=True)
    if stopped.is_set():
        print("stopped", file=sys.stderr)
    print_speed(times, args)


def print_pieces(pieces: Iterator[str], lead: str, stopped: threading.Event | None = None) -> None:
    """Print a text as it comes, after `lead`, until `stopped` is set."""
    visible = VISIBLE if sys.stdout.isatty() else {}
    first = next(pieces, "")  # before `lead` is printed: a prompt that is refused leaves stdout empty
    print(lead, end=first.translate(visible), flush=True)
    while not (stopped and stopped.is_set()) and (piece := next(pieces, None)) is not None:
        print(piece.translate(visible), end="", flush=True)


def print_speed(times: Sequence[tuple[int, float]], args: argparse.Namespace) -> None:
    """Print a line about (tokens so far, seconds so far) on stderr: with --quiet none, with --stats more."""
    if args.stats and times:
        print(f"first token after {duration(times[0][1])}, {speed(times)}", file=sys.stderr)
    elif not args.quiet:
        print(speed(times), file=sys.stderr)


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
    chats = not isinstance(conversation, Texts)
    names = [entry.partition(" ")[0] for entry in HELP]
    if name == "/help":
        return "\n".join([*(f"{entry:<16} {text}" for entry, text in HELP.items()), KEYS])
    if name == "/reset":
        conversation.reset()
        return "what was said is forgotten"
    if name == "/save":
        return save(conversation, rest)
    if name == "/system":
        if not chats:
            raise UserError("a system message is for conversations: start with --chat")
        conversation.set_system(rest or None)
        return "system message set" if rest else "no system message"
    if name == "/temperature":
        name, rest = "/set", f"temperature {rest}"
    if name == "/set":
        return set_option(conversation, rest)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise UserError(f"there is no command {name}: {hint} (a space before it makes it text)")


def set_option(conversation: Conversation, rest: str) -> str:
    """Set a field of `SamplingConfig` from `NAME VALUE`, or return all fields."""
    name, _, value = rest.replace("=", " ", 1).partition(" ") if "=" in rest.split(" ")[0] else rest.partition(" ")
    name, value = name.strip().lstrip("-").replace("-", "_"), value.strip()
    if not value and name:
        now = getattr(SamplingConfig.of(**conversation.options), name) if name in FIELDS else from_text(name, "")
        raise UserError(f"{name}={now} needs a value: /set {name} VALUE")
    if name:
        found = from_text(name, value)
        changed = {**conversation.options, name: found}
        if found is None or (name == "max_new_tokens" and value == "none"):
            changed.pop(name)
        SamplingConfig.of(**changed)
        conversation.options = changed
        return f"{name} = {value}"
    config = SamplingConfig.of(**conversation.options)
    given = {name: getattr(config, name) for name in FIELDS}
    if "max_new_tokens" not in conversation.options:
        given["max_new_tokens"] = f"{conversation.NEW_TOKENS}, or what there is room for"
    return "\n".join(f"{name} = {value}" for name, value in given.items() if value not in (None, ()))


def save(conversation: Conversation, file: str) -> str:
    """Write a conversation, or the texts, as JSONL that --prompt-file and `prepare` read. Raises UserError."""
    if not file:
        raise UserError("/save needs a file")
    said = conversation.messages
    lines: list[dict[str, Any]] = [{"messages": said}]
    if isinstance(conversation, Texts):
        pairs = zip(said[::2], said[1::2], strict=False)
        lines = [{"prompt": asked["content"], "completion": told["content"]} for asked, told in pairs]
    try:
        with Path(file).expanduser().open("x", encoding="utf-8") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"'{file}' cannot be written ({error.strerror}): give another file") from None
    return f"written to {file}"


def reader() -> Callable[[], str | None]:
    """Return a function that reads a text, None at the end: with line editing where that is possible."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            return _edited_reader()
    return _plain_line


def _plain_line() -> str | None:
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().rstrip("\r\n")
    while line.endswith("\\") and sys.stdin.isatty():
        print(CONTINUED, end="", file=sys.stderr, flush=True)
        line = f"{line[:-1]}\n" + sys.stdin.readline().rstrip("\r\n")
    return line or None


def _edited_reader() -> Callable[[], str | None]:
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

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

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
        file.touch(mode=0o600)
        file.open("a").close()  # a file of another user, or a full disk
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=CONTINUED,
        key_bindings=keys,
        history=history,
        completer=WordCompleter([entry.partition(" ")[0] for entry in HELP], sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        output=create_output(sys.stderr),
    )

    def read() -> str | None:
        try:
            return session.prompt()
        except EOFError:
            return None

    return read
