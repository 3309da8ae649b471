"""Chat templates of released models: jinja texts, rendered as transformers renders them, in jinja's own sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
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
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
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
        compiled = _environment().from_string(template)
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
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"the model's chat template fails on this conversation: {_short(error)} ({kind})") from None


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise UserError(f"messages must be texts, numbers, lists and dicts of these: {error}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
