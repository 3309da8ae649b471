"""Bodies of OpenAI's requests, read into prompts and a `SamplingConfig`."""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data import ChatTemplate
from llama_jax.sampling import Encoded, SamplingConfig, encoded_chat, encoded_prompt, stop_ids, tokenizer_of

# Names of OpenAI, and of vLLM's extras, for fields of SamplingConfig; all other fields have their own names.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "n": "num_samples",
    "stop_token_ids": "stop_ids",
    "min_tokens": "min_new_tokens",
}
# Fields of SamplingConfig that no request may have: code, and those of beam search.
NOT_SERVED = {"controls", "num_beams", "length_penalty", "early_stopping"}
# Fields that do not change what is written.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction", "stream_options", "model",
}  # fmt: skip
# Values of unsupported fields that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "modalities": (["text"],), "best_of": (1,), "functions": ([],),
    "suffix": ("",),
}  # fmt: skip
MOST_LOGPROBS = 20
MOST_SAMPLES = 128


class Refused(Exception):
    """A request that gets no answer.

    status: of HTTP.
    code: OpenAI's word for the reason.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for.

    usage: a stream ends with the number of tokens.
    echo: the prompts as texts, which come before the answers; empty without `echo`.
    writes: false where the prompts alone come back (`max_tokens=0` with `echo`).
    """

    prompts: Sequence[Encoded]
    config: SamplingConfig
    stream: bool
    usage: bool
    echo: Sequence[str] = ()
    writes: bool = True


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for at most: tokens of a text, its prompt included, and new ones of it."""

    length: int
    max_new_tokens: int


def parsed(raw: bytes) -> dict[str, Any]:
    """Return a body's object. Raises Refused for anything else."""
    try:
        body = json.loads(raw, parse_constant=_no_number)
        if b"\\ud" in raw.lower():  # half of a pair of surrogates is a text that no tokenizer takes
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object", "invalid_json")
    return {key: value for key, value in body.items() if value is not None}


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def completion(lm: LanguageModel, body: Mapping[str, Any], limits: Limits) -> Asked:
    """Read the body of /v1/completions. Raises UserError for mistakes."""
    rest = dict(body)
    given, echo = rest.pop("prompt", None), _boolean(rest, "echo")
    if "logprobs" in rest:
        _check_logprobs("logprobs", rest["logprobs"])
        if echo and lm.config.has_source:
            raise UserError("echo with logprobs: an encoder-decoder does not predict its prompt, leave one of them out")
    several = isinstance(given, list) and (not given or not isinstance(given[0], int))
    prompts = given if several else [given]
    if not prompts:
        raise UserError("prompt=[] has no prompt: give a text, token ids, or a list of either")
    encoded = [_encoded(lm, prompt) for prompt in prompts]
    texts = [p if isinstance(p, str) else tokenizer_of(lm).decode(p) for p in prompts] if echo else []
    return _asked(lm, rest, encoded, limits, min(16, limits.max_new_tokens), texts)


def _encoded(lm: LanguageModel, prompt: Any) -> Encoded:
    if isinstance(prompt, str):
        return encoded_prompt(lm, prompt)
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
        raise UserError("prompt must be a text, token ids, or a list of either")
    vocab_size = lm.config.vocab_size
    if (wrong := next((i for i in prompt if not 0 <= i < vocab_size), None)) is not None:
        raise UserError(f"prompt has the token id {wrong}: they are from 0 to {vocab_size - 1}")
    return Encoded(prompt, stop_ids(lm))


def chat(
    lm: LanguageModel, body: Mapping[str, Any], limits: Limits, template: ChatTemplate | str | None = None
) -> Asked:
    """Read the body of /v1/chat/completions. Raises UserError for mistakes."""
    rest = dict(body)
    messages = rest.pop("messages", None)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}')
    encoded = [encoded_chat(lm, [_message(message) for message in messages], template)]
    wanted, top = _boolean(rest, "logprobs"), rest.pop("top_logprobs", 0)
    _check_logprobs("top_logprobs", top)
    if wanted:
        rest["logprobs"] = top
    elif "top_logprobs" in body:
        raise UserError("top_logprobs needs logprobs=true")
    _response_format(rest)
    room = limits.length - _length(lm, encoded)
    return _asked(lm, rest, encoded, limits, max(1, min(room, limits.max_new_tokens)))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is one text, by the role that templates know."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError("content must be a text, or parts of type text: images, sound and files are not read")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError("content must be a text, or a list of parts of type text")
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {**message, "role": role, "content": content}


def _response_format(body: dict[str, Any]) -> None:
    """Replace `response_format` by the JSON schema that it asks for."""
    asked = body.pop("response_format", {"type": "text"})
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "json_object":
        body["json_schema"] = "{}"
    elif kind == "json_schema":
        given = asked.get("json_schema")
        if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
            raise UserError('response_format needs {"type": "json_schema", "json_schema": {"schema": {...}}}')
        body["json_schema"] = given["schema"]
    elif kind != "text":
        raise UserError("response_format must have the type text, json_object or json_schema")


def _asked(
    lm: LanguageModel,
    body: dict[str, Any],
    encoded: Sequence[Encoded],
    limits: Limits,
    max_new_tokens: int,
    echo: Sequence[str] = (),
) -> Asked:
    """Read the fields that all bodies have; `max_new_tokens` is the default."""
    stream, options = _boolean(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict) or (not stream and options):
        raise UserError('stream_options={"include_usage": true} is for stream=true')
    usage = _boolean(dict(options), "include_usage")
    fields = {field.name for field in dataclasses.fields(SamplingConfig)} - NOT_SERVED
    # Unlike a command's seed, each request has another one where it names none.
    values: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "seed": secrets.randbits(63)}
    given: dict[str, str] = {}
    for name, value in body.items():
        field = ALIASES.get(name, name)
        if name in HARMLESS or value in NOTHING.get(name, ()):
            continue
        if field not in fields:
            near = difflib.get_close_matches(name, [*ALIASES, *fields, "messages", "prompt", "stream"], n=1)
            raise UserError(f"{name} is not supported: " + (f"did you mean {near[0]}?" if near else "leave it out"))
        if field in given:
            raise UserError(f"{name} and {given[field]} mean the same: give one of them")
        given[field], values[field] = name, value % 2**64 if field == "seed" and type(value) is int else value
    writes = values["max_new_tokens"] != 0 or not echo
    values["max_new_tokens"] = values["max_new_tokens"] if writes else 1
    config = SamplingConfig.of(**values)
    if config.num_samples > MOST_SAMPLES:
        raise UserError(f"n={config.num_samples} must be at most {MOST_SAMPLES}")
    wanted, longest = config.max_new_tokens * writes, max(len(prompt.ids) for prompt in encoded)
    room = limits.length - _length(lm, encoded)
    if longest > limits.length or wanted > room:
        advice = f"take at most {room}" if room > 0 and longest <= limits.length else "shorten the prompt"
        sentence = f"a prompt of {longest} tokens and max_tokens={wanted} are more than {limits.length}: {advice}"
        raise Refused(400, sentence, "context_length_exceeded")
    if wanted > limits.max_new_tokens:
        raise UserError(f"max_tokens={wanted} must be at most {limits.max_new_tokens}")
    return Asked(encoded, config, stream, usage, echo, writes)


def _length(lm: LanguageModel, encoded: Sequence[Encoded]) -> int:
    """Return the positions before the new tokens; an encoder-decoder's answer begins with one token."""
    return 1 if lm.config.has_source else max(len(prompt.ids) for prompt in encoded)


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.pop(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} must be true or false")
    return value


def _check_logprobs(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= MOST_LOGPROBS:
        raise UserError(f"{name}={value!r} must be a whole number from 0 to {MOST_LOGPROBS}")
