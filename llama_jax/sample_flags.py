"""Flags of sampling: every field of `SamplingConfig` is one, and its help a line of the docstring."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args

from llama_jax.config import UserError, field_docs
from llama_jax.parser import CHAT_TEMPLATE, LOADING, RUN_PATH, Argument, Command, flag
from llama_jax.sampling import SamplingConfig
from llama_jax.values import Mismatch, near_names, parse, type_name, value_hint

NEW_TOKENS = 128  # of a text where --max-new-tokens is not given
FIELDS = {field.name: field for field in dataclasses.fields(SamplingConfig) if not isinstance(field.type, str)}
DEFAULTS = {"max_new_tokens": f"{NEW_TOKENS}, of an answer in a chat 512, or what there is room for"}
FORMS: dict[Any, tuple[str | None, dict[str, Any]]] = {  # by type: name of a value, options of the flag
    bool: (None, {}), int: ("N", {"type": int}), float: ("X", {"type": float}),
    tuple[int, ...]: ("ID[,ID]", {}), tuple[str, ...]: ("TEXT", {"action": "append"}),
}  # fmt: skip
METAVARS = {"stop": "TEXT", "logit_bias": "JSON", "json_schema": "JSON", "regex": "PATTERN"}


def sampling_flags() -> tuple[Argument, ...]:
    """Return a flag for each field of `SamplingConfig` that has a text form; one that is not given is None."""
    docs, found = field_docs(SamplingConfig), list[Argument]()
    for name, field in FIELDS.items():
        kinds = get_args(field.type)
        metavar, options = FORMS.get(kinds[0] if type(None) in kinds else field.type, ("VALUE", {}))
        if metavar:
            letter = re.search(r"\b[KNP]\b", docs[name])
            metavar = METAVARS.get(name, letter[0] if letter else metavar)
        help, default = docs[name].rstrip("."), str(DEFAULTS.get(name, field.default))
        help += f"; default: {default}" if default not in ("None", "False", "()") else ""
        help += "; repeatable" if "action" in options else ""
        found.append(flag(f"--{name.replace('_', '-')}", metavar, help.replace("%", "%%"), default=None, **options))
    return tuple(found)


def sampling_config(given: Mapping[str, Any]) -> SamplingConfig:
    """Return the config of parsed flags, among which there may be others. Raises UserError for impossible values."""
    values = {name: value for name in FIELDS if (value := given.get(name)) is not None}
    return SamplingConfig.of(**{name: from_text(name, value) for name, value in values.items()})


def from_text(name: str, value: Any) -> Any:
    """Return the value of a field that was typed. Raises UserError for an unknown field and an impossible text."""
    if name not in FIELDS:
        near = near_names(name, list(FIELDS))
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(FIELDS)}"
        raise UserError(f"there is no setting '{name}': {hint}")
    annotation: Any = FIELDS[name].type
    if not isinstance(value, str) or name in METAVARS:  # texts, and what `SamplingConfig.of` reads
        return value
    try:
        return parse(annotation, value)
    except Mismatch:
        raise UserError(
            f"{name}={value!r} is not of type {type_name(annotation)}{value_hint(annotation, value)}"
        ) from None


SAMPLE = Command(
    "Continue texts with a trained model. An encoder-decoder answers: the prompt is its source, in which special "
    "tokens such as <extra_id_0> may be written out, and only the answer is printed. With --chat the prompt is a "
    "message, and only the answer is printed. Without prompts it is interactive: /help shows what can be typed.",
    (
        flag("path", "PATH", RUN_PATH),
        flag("--prompt", "TEXT", "text to continue or answer, repeatable; default: interactive", action="append"),
        flag("--prompt-file", "FILE", "prompts: lines, or JSONL with `prompt` or `messages`; -: standard input"),
        flag("--chat", None, "answer by the model's chat template; each prompt begins a conversation"),
        flag("--system", "TEXT", "system message of a chat"),
        CHAT_TEMPLATE,
        *sampling_flags(),
        flag("--draft", "PATH", "guess tokens ahead, which changes no text: a smaller model with the same tokenizer; "
             "prompt, from the text so far; or mtp, by the model's further blocks"),
        flag("--draft-tokens", "K", "tokens that are guessed at once; default: 4", type=int),
        flag("--output", "FILE", "write the texts there; .jsonl: as --json has them"),
        flag("--json", None, "one object per text, with token ids, finish_reason and log-probabilities"),
        flag("--stats", None, "time to the first token, and right guesses of --draft, too, on stderr"),
        flag("--quiet", None, "neither speed nor progress on stderr"),
        *LOADING,
    ),
    prog="sample.py",
)  # fmt: skip
