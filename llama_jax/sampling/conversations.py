"""`chat`: the answer that a model writes to messages, by a chat template."""

import html
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Unpack

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError, choices
from llama_jax.data import ChatTemplate, DirectoryChat, chat_prompt, turn_ends
from llama_jax.sampling.config import GenerationOptions, SamplingConfig, SamplingOptions
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.stops import tokenizer_of
from llama_jax.sampling.text import STREAM_CHUNK, Encoded, completed, stop_ids, stream_encoded, with_room
from llama_jax.sampling.token_ids import settled
from llama_jax.tokenizers import Tokenizer, render, special_names


def chat(
    lm: LanguageModel,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: ChatTemplate | str | None = None,
    **options: Unpack[GenerationOptions],
) -> str:
    """Return the model's answer to a conversation that ends with the user.

    Each message has a `role` (system, user, assistant, or another of the template's) and a `content`. `template` None
    is the chat template that a run was trained with, else the one that came with the tokenizer; a text names another
    of the latter's or a built-in one; a `ChatTemplate` of `llama_jax.data` serves models without any, and ends the
    answer with its end of a turn as well. `options` are the fields of `SamplingConfig`, by default with 256 new
    tokens; `draft` and `draft_tokens` are those of `generate`. Of an answer in harmony's channels (GPT-OSS) it is the
    final one's text, empty where the tokens end before it. Raises UserError where there is no template or it refuses
    the messages, and as `generate_text` does.
    """
    encoded = encoded_chat(lm, messages, template)
    config, speculation = settled(lm, {"max_new_tokens": 256, **options})
    ((found,),) = completed(lm, [""], [encoded], [config], speculation=speculation)
    return found.completion


class Conversation:
    """A conversation with a model: called with a text, it prints the answer as it is written, and returns it.

        conversation = lm.chat(system="You are brief.", temperature=0.7)
        conversation("Hello!")

    `messages` is what was said so far, `template` as in `chat`, `draft` as in `generate`. The other arguments are the
    fields of `SamplingConfig`; by default an answer has at most 512 tokens, or as many as there is room for.
    """

    NEW_TOKENS = 512  # of an answer, at most, where `max_new_tokens` is not given

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str | None = None,
        template: ChatTemplate | str | None = None,
        **options: Unpack[GenerationOptions],
    ):
        _, self._speculation = settled(lm, options)
        self.lm, self.template = lm, template
        self.options: dict[str, Any] = {k: v for k, v in options.items() if k not in ("draft", "draft_tokens")}
        self.messages: list[dict[str, str]] = []
        self.set_system(system)
        self._num_answers, self._engine = 0, self._new_engine()

    def _new_engine(self) -> Engine:
        return Engine(self.lm, rows=1, decode_chunk=STREAM_CHUNK, speculation=self._speculation)

    def set_system(self, system: str | None) -> None:
        """Replace the system message; None or an empty text removes it."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": system}] if system else []), *said]

    def reset(self) -> None:
        """Forget what was said, all but the system message; the draws begin anew, too."""
        self.messages, self._num_answers = [m for m in self.messages if m["role"] == "system"], 0

    def __call__(self, text: str, **options: Unpack[SamplingOptions]) -> str:
        """Print the answer to `text` piece by piece and return it. `options` hold for this answer alone."""
        pieces = list[str]()
        for piece in self.stream(text, **options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return Answer("".join(pieces))

    def stream(
        self,
        text: str,
        *,
        progress: Callable[[int], object] = lambda num_tokens: None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[str]:
        """Yield the pieces of the answer to `text`, as `stream_encoded` does.

        What was written becomes a part of the conversation, also where the reader or an interrupt ends it early. Raises
        UserError as `chat` does, and leaves the conversation as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        given: dict[str, Any] = {**self.options, **options}
        encoded = self.encoded(asked)
        config = SamplingConfig.of(**given)
        if given.get("max_new_tokens") is None:
            config = with_room(self.lm, encoded, config, self.NEW_TOKENS)
        row, self._num_answers = self._num_answers, self._num_answers + 1
        pieces = stream_encoded(self.lm, encoded, config, row=row, progress=progress, engine=self._engine)
        written, begun = list[str](), False
        try:
            for piece in pieces:
                begun = True
                written.append(piece)
                yield piece
            begun = True
        except KeyboardInterrupt:  # in the middle of a step
            self._engine = self._new_engine()
            raise
        finally:
            if begun:
                self.messages = [*asked, {"role": "assistant", "content": "".join(written)}]

    def encoded(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        """Return the ids that the answer to messages follows, and those that end it."""
        return encoded_chat(self.lm, messages, self.template)

    def __repr__(self) -> str:
        said = [f"{message['role']}: {message['content']}" for message in self.messages]
        return "\n".join(said) or "conversation: nothing was said yet"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<div style="margin:.4em 0"><b>{html.escape(message["role"])}</b>'
            f'<div style="white-space:pre-wrap">{html.escape(message["content"])}</div></div>'
            for message in self.messages
        )
        return f'<div style="max-width:48em">{rows or "nothing was said yet"}</div>'


class Answer(str):
    """An answer that was printed when it was written: a notebook shows it again only in another cell."""

    def __init__(self, text: str):
        self._cell = _cell()

    def _ipython_display_(self) -> None:
        if self._cell is None or self._cell != _cell():
            print(repr(str(self)))


def _cell() -> int | None:
    """Return the number of the cell of a notebook that runs, None elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return None if shell is None else shell.execution_count


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
    if isinstance(template, DirectoryChat):
        template = template.name
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
    known = _built_in_templates()
    if name not in known:
        raise UserError(f"unknown chat template '{name}': the built-in ones are {', '.join(sorted(known))}")
    return known[name]()


def _built_in_templates() -> dict[str, type[ChatTemplate]]:
    return {name: kind for name, kind in choices(ChatTemplate).items() if kind is not DirectoryChat}


def _template(tokenizer: Tokenizer, name: str | None) -> str:
    templates = tokenizer.chat_templates
    if (found := templates.get(name or "default")) is not None:
        return found
    if templates:
        raise UserError(f"the model has no chat template '{name or 'default'}': it has {', '.join(sorted(templates))}")
    names = ", ".join(sorted(_built_in_templates()))
    raise UserError(
        f"the model came without a chat template: choose a built-in one with --chat-template or chat(..., "
        f"template=...), of {names}"
    )
