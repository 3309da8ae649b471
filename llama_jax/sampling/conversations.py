"""`chat`: the answer that a model writes to messages, by a chat template.

Templates of released models are jinja texts, rendered as transformers renders them, in jinja's own sandbox.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError, choices
from llama_jax.data import ChatTemplate, chat_prompt, turn_ends
from llama_jax.sampling.sampler import Control, Sampler
from llama_jax.sampling.text import Encoded, complete_encoded, stop_ids, tokenizer_of
from llama_jax.tokenizers import Tokenizer, settings_of

# The most that a template may write: beyond any context, and little enough to be refused before memory ends.
MAX_CHARACTERS = 1 << 24


def chat(
    lm: LanguageModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    template: ChatTemplate | str | None = None,
    controls: Iterable[Control] = (),
) -> str:
    """Return the model's answer to a conversation that ends with the user.

    Each message has a `role` (system, user, assistant, or another of the template's) and a `content`. `template` None
    is the chat template that a run was trained with, else the one that came with the tokenizer; a text names another
    of the latter's or a built-in one; a `ChatTemplate` of `llama_jax.data` serves models without any, and ends the
    answer with its end of a turn as well. `controls` as in `generate`. Raises UserError where there is no template
    or it refuses the messages, and as `generate_text` does.
    """
    encoded = encoded_chat(lm, messages, template)
    sampler = Sampler.of(temperature, top_k, top_p, controls)
    (found,) = complete_encoded(lm, [""], [encoded], max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
    return found.completion


def encoded_chat(
    lm: LanguageModel, messages: Sequence[Mapping[str, Any]], template: ChatTemplate | str | None
) -> Encoded:
    """Return the ids that the answer to a conversation follows, and those that end it. Raises UserError as `chat`."""
    tokenizer = tokenizer_of(lm)
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}')
    if not messages or messages[-1].get("role") == "assistant":
        raise UserError("a conversation must end with the message to answer: add the user's")
    template = lm.chat_template if template is None else template
    if not isinstance(template, ChatTemplate | str | None):
        raise UserError("template must be a name or a template of llama_jax.data.chat, such as ChatML()")
    if isinstance(template, str) and template not in tokenizer.chat_templates and template in choices(ChatTemplate):
        template = built_in(template, tokenizer)
    if isinstance(template, ChatTemplate):
        ends = turn_ends(template, tokenizer)
        return Encoded(chat_prompt(messages, template, tokenizer), tuple(dict.fromkeys((*stop_ids(lm), *ends))))
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str) or message.get("content", message.get("tool_calls")) is None:
            raise UserError(f'message {number} must have a "role" and a "content"')
    text = rendered_chat(tokenizer, messages, template)
    ids = tokenizer.encode_prompt(text, special=True, affixes=False)
    if not ids:
        raise UserError("the model's chat template makes an empty prompt of this conversation")
    return Encoded(ids, stop_ids(lm))


def rendered_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate | str | None,
    *,
    opens_answer: bool = True,
) -> str:
    """Return the text of a conversation, special tokens by name, up to where the next answer begins.

    Without `opens_answer` it ends with the content of the last message, which the answer continues. Raises UserError
    as `chat` does.
    """
    if isinstance(template, ChatTemplate):
        if template.JINJA is None:
            raise UserError(f"{type(template).__name__} has no text of a conversation: give a template's name")
        text = template.JINJA
    else:
        text = _template(tokenizer, template)
    found = render(text, messages, special_names(tokenizer), opens_answer=opens_answer)
    if opens_answer:
        return found
    last = str(messages[-1]["content"]).lstrip()
    start = found.rindex(last.rstrip())
    return found[:start] + (last if found.startswith(last, start) else last.rstrip())  # templates may strip a message


def built_in(name: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | str | None:
    """Return the template of a name: a built-in one, or the name itself where it is None or one of the tokenizer's.

    Raises UserError for an unknown name.
    """
    if name is None or (tokenizer is not None and name in tokenizer.chat_templates):
        return name
    known = choices(ChatTemplate)
    if name not in known:
        raise UserError(f"unknown chat template '{name}': the built-in ones are {', '.join(sorted(known))}")
    return known[name]()


def _template(tokenizer: Tokenizer, name: str | None) -> str:
    templates = tokenizer.chat_templates
    if (found := templates.get(name or "default")) is not None:
        return found
    if templates:
        raise UserError(f"the model has no chat template '{name or 'default'}': it has {', '.join(sorted(templates))}")
    names = ", ".join(sorted(choices(ChatTemplate)))
    raise UserError(
        f"the model came without a chat template: choose a built-in one with --chat-template or chat(..., "
        f"template=...), of {names}"
    )


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
