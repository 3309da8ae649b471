"""Conversations: the answer that a model writes to messages, by the chat template of its directory."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError, choices
from llama_jax.data import ChatTemplate, chat_prompt, turn_ends
from llama_jax.sampling.sampler import Sampler
from llama_jax.sampling.templates import render
from llama_jax.sampling.text import Encoded, complete_encoded, stop_ids, tokenizer_of
from llama_jax.tokenizers import Tokenizer, settings_of


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
) -> str:
    """Return what the model answers to a conversation that ends with the user.

    Each message has a `role` (system, user, assistant, or what the template knows) and a `content`. `template` None is
    the chat template that a run was trained with, else the one that came with the tokenizer; a text names another of
    the latter's or a built-in one; a `ChatTemplate` of `llama_jax.data.chat` serves models without any, and ends the
    answer with its own end of a turn as well. Raises UserError where there is no template or it refuses the messages,
    and as `generate_text` does.
    """
    encoded = encoded_chat(lm, messages, template)
    sampler = Sampler.of(temperature, top_k, top_p)
    (found,) = complete_encoded(lm, [""], [encoded], max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
    return found.completion


def encoded_chat(
    lm: LanguageModel, messages: Sequence[Mapping[str, Any]], template: ChatTemplate | str | None
) -> Encoded:
    """The ids that the answer to a conversation is to follow, and those that end it. Raises UserError as `chat`."""
    tokenizer = tokenizer_of(lm)
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError('messages must be a list of {"role": ..., "content": ...}')
    if not messages or messages[-1].get("role") == "assistant":
        raise UserError("a conversation must end with what is to be answered: add the user's message")
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
    text = render(_template(tokenizer, template), messages, special_names(tokenizer))
    ids = tokenizer.encode_prompt(text, special=True, affixes=False)
    if not ids:
        raise UserError("the model's chat template makes an empty prompt of this conversation")
    return Encoded(ids, stop_ids(lm))


def built_in(name: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | str | None:
    """The template of a name: one of the tokenizer's, else one that is built in. Raises UserError for no template."""
    if name is None or (tokenizer is not None and name in tokenizer.chat_templates):
        return name
    known = choices(ChatTemplate)
    if name not in known:
        raise UserError(f"there is no chat template '{name}': the built-in ones are {', '.join(sorted(known))}")
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
    """The special tokens by the names that templates have for them: `bos_token`, `eos_token` and others."""
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
