"""Chat templates of released models: jinja texts, rendered as transformers renders them, in jinja's own sandbox.

What a template may do to others, jinja's sandbox forbids; what it may cost is bounded here: `_Cost` counts the lines
that run and the characters that an operation may make, before it is done.
"""

import datetime
import functools
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from llama_jax.config import UserError
from llama_jax.tokenizers.base import Tokenizer
from llama_jax.tokenizers.settings import settings_of

# The most that a template may write: beyond any context, and little enough to be refused before memory ends.
MAX_CHARACTERS = 1 << 24
MAX_TEMPLATE = 1 << 17  # characters of a template: that its lines are counted takes quadratic time
# The most characters that operations may make, and lines of a compiled template that may run: seconds.
MAX_MADE, MAX_LINES = 1 << 27, 1 << 22
# Methods and filters whose result may be as long as the product of what they are given.
_WIDENING = frozenset(
    (
        "replace",
        "join",
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "indent",
        "format",
        "format_map",
        "translate",
    )
)
_TOOL = 4  # of sys.monitoring; 0 to 2 and 5 are those of debuggers, coverage and profilers


class _Cost(threading.local):
    """What the rendering of this thread may still cost."""

    lines = made = 0

    def begin(self) -> None:
        self.lines, self.made = MAX_LINES, MAX_MADE

    def line(self, *_: Any) -> None:
        self.lines -= 1
        if self.lines < 0:
            raise jinja2.TemplateError("it runs without end")

    def make(self, size: float) -> None:
        self.made -= size
        if self.made < 0:
            raise jinja2.TemplateError("it makes texts without end")


_cost = _Cost()


def _size(value: Any) -> int:
    """Return the characters of a text or of those in a list, the amount of a number."""
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, str | dict) else abs(value) if isinstance(value, int) else 1


def _joined(parts: Iterable[Any]) -> str:
    texts = [str(part) for part in parts]
    _cost.make(sum(map(len, texts)))
    return "".join(texts)


def _check_call(name: str, values: Sequence[Any]) -> None:
    """Count what a method or filter may make of these values."""
    if name in _WIDENING:
        wide = name.startswith("format") and any(re.search(r"\d{5}", str(value)) for value in values[:1])
        _cost.make(math.inf if wide else max(1, *map(_size, values[:1])) * max(1, sum(map(_size, values[1:]))))


def _counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose cost is counted."""

    @functools.wraps(work)
    def counted(*values: Any, **named: Any) -> Any:
        given = [value for value in (*values, *named.values()) if isinstance(value, str | list | tuple | dict | int)]
        _check_call(name, given)
        return work(*values, **named)

    return counted


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        texts = [side for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "*":
            _cost.make(_size(left) * _size(right) if texts else 1)
        elif operator == "**" and isinstance(left, int):
            _cost.make(left.bit_length() * _size(right))
        elif operator == "%" and isinstance(left, str):
            _cost.make(math.inf if re.search(r"\d{5}|\*", left) else _size(right))
        elif operator == "+":
            _cost.make(sum(len(side) * (1 if isinstance(side, str) else 8) for side in texts))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(owner := getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None), str):
            _check_call(__obj.__name__, (owner, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _watched(template: jinja2.Template) -> jinja2.Template:
    """Return a compiled template whose lines are counted, and the texts that `~` joins."""
    if sys.monitoring.get_tool(_TOOL) is None:
        sys.monitoring.use_tool_id(_TOOL, __name__)
        sys.monitoring.register_callback(_TOOL, sys.monitoring.events.LINE, _cost.line)
    for function in (template.root_render_func, *template.blocks.values()):
        function.__globals__["str_join"] = _joined
        for code in _codes(function.__code__):
            sys.monitoring.set_local_events(_TOOL, code, sys.monitoring.events.LINE)
    return template


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens by the names that templates have for them: `bos_token`, `eos_token` and others."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    ids["eos"] = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    found = {f"{key}_token": names[i] for key, i in ids.items() if i is not None and i in names}
    for data in settings_of(tokenizer.files).naming:
        for key, value in data.items():
            if isinstance(value, dict):
                value = value.get("content")
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
    return found


class _GenerationBlocks(jinja2.ext.Extension):
    """The tags `{% generation %}` ... `{% endgeneration %}` around answers, for training: here their content alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the escapes for HTML of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters |= {name: _counted(name, work) for name, work in environment.filters.items()}
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals |= {"namespace": _Namespace}
    return environment


def render(
    template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, opens_answer: bool = True
) -> str:
    """Return the text of a conversation, with `opens_answer` up to where the assistant's next answer begins.

    `names` are the special tokens that the template may name (`bos_token` and others). Raises UserError where the
    template cannot be read, refuses the conversation, or violates the sandbox.
    """
    # Plain JSON values only, so that a template can call no methods but theirs.
    plain = [{key: value for key, value in message.items() if value is not None} for message in _plain(messages)]
    try:
        _cost.begin()
        if len(template) > MAX_TEMPLATE:
            raise jinja2.TemplateError(f"it has more than {MAX_TEMPLATE} characters")
        compiled = _watched(_environment().from_string(template))
        pieces, size = [], 0
        given = {"messages": plain, "tools": None, "documents": None, "add_generation_prompt": opens_answer}
        for piece in compiled.generate(**given, **names):
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise jinja2.TemplateError(f"it writes more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template cannot be read, at line {error.lineno}: {_short(error)}") from None
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {_short(error)}") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"the model's chat template fails on this conversation: {_short(error)} ({kind})") from None


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise UserError(f"messages must be texts, numbers, lists and dicts of these: {error}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
