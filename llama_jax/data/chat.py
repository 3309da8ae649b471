"""Conversations as tokens in the turn format of a family of models, and the parts that the model is to write."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, override

import numpy as np
from jaxtyping import Int32, Int64

from llama_jax.config import Component, UserError
from llama_jax.data.objectives.base import special_id
from llama_jax.tokenizers import Tokenizer

type Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

BOS, EOS = "BOS", "EOS"
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text, or the name of a special token (BOS and EOS are the tokenizer's own); the model learns `trained` ones."""

    text: str
    special: bool = False
    trained: bool = False


class ChatTemplate(Component):
    """Base of the turn formats.

    `JINJA` is the same format as a chat template of Hugging Face, for exports of models that are trained with it; None
    without one.
    """

    JINJA: ClassVar[str | None] = None

    def pieces(self, messages: Sequence[Message]) -> Iterable[Piece]:
        """Return the conversation in order. Roles have been checked."""
        raise NotImplementedError

    def opening(self) -> Iterable[Piece]:
        """Return the pieces between the user's message and the assistant's answer that belong to neither."""
        return ()

    def special_tokens(self) -> tuple[str, ...]:
        """Return the names of the special tokens that the tokenizer must have."""
        pieces = self.pieces([{"role": role, "content": role} for role in ROLES])
        return tuple(dict.fromkeys(p.text for p in pieces if p.special and p.text not in (BOS, EOS)))


@dataclasses.dataclass(frozen=True)
class Llama2Chat(ChatTemplate):
    """[INST] question [/INST] answer, each pair between BOS and EOS (Touvron et al. 2023).

    The marks are ordinary text, so that a message may contain them; the system's message is part of the first question.
    """

    JINJA = (
        "{% set ns = namespace(system='') %}{% for message in messages %}{% set content = message['content'] | trim %}"
        "{% if message['role'] == 'system' %}{% set ns.system = '<<SYS>>\\n' + content + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + ns.system + content + ' [/INST]' }}"
        "{% set ns.system = '' %}{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )

    @override
    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        system = ""
        for message in messages:
            content = message["content"].strip()
            if message["role"] == "system":
                system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
            elif message["role"] == "user":
                yield Piece(BOS, special=True)
                yield Piece(f"[INST] {system}{content} [/INST]")
                system = ""
            else:
                yield Piece(f" {content} ", trained=True)
                yield Piece(EOS, special=True, trained=True)


@dataclasses.dataclass(frozen=True)
class Llama3Chat(ChatTemplate):
    """Each message behind a header that names its role, and before <|eot_id|> (Llama Team 2024)."""

    JINJA = (
        "<|begin_of_text|>{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )

    @override
    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        yield Piece("<|begin_of_text|>", special=True)
        for message in messages:
            answer = message["role"] == "assistant"
            yield from self._header(message["role"])
            yield Piece(message["content"].strip(), trained=answer)
            yield Piece("<|eot_id|>", special=True, trained=answer)

    @override
    def opening(self) -> Iterator[Piece]:
        return self._header("assistant")

    def _header(self, role: str) -> Iterator[Piece]:
        yield Piece("<|start_header_id|>", special=True)
        yield Piece(role)
        yield Piece("<|end_header_id|>", special=True)
        yield Piece("\n\n")


@dataclasses.dataclass(frozen=True)
class ChatML(ChatTemplate):
    """<|im_start|>, the role, a line end, the message, <|im_end|> and a line end (OpenAI 2023; Qwen and others)."""

    JINJA = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    @override
    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        for message in messages:
            answer = message["role"] == "assistant"
            yield Piece("<|im_start|>", special=True)
            yield Piece(f"{message['role']}\n")
            yield Piece(message["content"], trained=answer)
            yield Piece("<|im_end|>", special=True, trained=answer)
            yield Piece("\n")

    @override
    def opening(self) -> Iterator[Piece]:
        yield Piece("<|im_start|>", special=True)
        yield Piece("assistant\n")


@dataclasses.dataclass(frozen=True)
class ChatGLM2Chat(ChatTemplate):
    """[Round 1], 问：question, 答：answer and so on, behind [gMASK] and sop (ChatGLM2-6B's `build_prompt`).

    The marks are ordinary text, and only the last answer ends with EOS; the system's message, for which the original
    has no place, comes before the first round.
    """

    JINJA = (
        "[gMASK]sop{% set ns = namespace(rounds=0) %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{% set ns.rounds = ns.rounds + 1 %}"
        "{{ '[Round ' ~ ns.rounds ~ ']\\n\\n问：' + message['content'] + '\\n\\n答：' }}"
        "{% else %}{{ message['content'] + (eos_token if loop.last else '\\n\\n') }}{% endif %}{% endfor %}"
    )

    @override
    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        yield Piece("[gMASK]", special=True)
        yield Piece("sop", special=True)
        rounds = 0
        for i, message in enumerate(messages, start=1):
            content = message["content"]
            if message["role"] == "system":
                yield Piece(f"{content}\n\n")
            elif message["role"] == "user":
                rounds += 1
                yield Piece(f"[Round {rounds}]\n\n问：{content}\n\n答：")
            else:
                yield Piece(content, trained=True)
                yield Piece(EOS, special=True, trained=True) if i == len(messages) else Piece("\n\n")


def chat_tokens(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[Int32[np.ndarray, " n"], Int64[np.ndarray, " p"]]:
    """Return the conversation's tokens, and the places in them where further parts begin.

    Parts alternate: first the given ones, then those that the model is to write, the end of its turn included. Messages
    are encoded as plain text: no special token comes out of them. Raises UserError where a message lacks its role or
    content, where questions and answers do not alternate (after at most one system message) or no answer is last, and
    for a special token that the tokenizer lacks.
    """
    if (problem := problem_of(messages)) is not None:
        raise UserError(problem)
    pieces = [piece for piece in template.pieces(messages) if piece.text]
    ids = _ids_of(pieces, tokenizer)
    trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in ids])
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
    # The comparison begins with "not trained", so that part 0 is never trained, and empty if it has to be.
    return tokens, np.flatnonzero(np.diff(trained, prepend=False)).astype(np.int64)


def pair_of(parts: Sequence[object]) -> tuple[list[Message], list[Message], int] | None:
    """Return (chosen conversation, rejected one, number of messages that both begin with), or None for other parts.

    `parts` are the messages of a prompt and of two answers to it, or those of two whole conversations.
    """
    if len(parts) not in (2, 3) or not all(isinstance(part, list) for part in parts):
        return None
    *prompt, chosen, rejected = (list(part) for part in parts)  # type: ignore[call-overload]
    if prompt:
        return prompt[0] + chosen, prompt[0] + rejected, len(prompt[0])
    same = (a == b for a, b in zip(chosen, rejected, strict=False))
    return chosen, rejected, sum(itertools.takewhile(bool, same))


def pair_tokens(
    pair: tuple[Sequence[Message], Sequence[Message], int], template: ChatTemplate, tokenizer: Tokenizer
) -> list[Int32[np.ndarray, " _"]]:
    """Return the tokens of a pair's prompt, up to where the answers begin, of the chosen and of the rejected answer.

    Raises UserError as `chat_prompt` does.
    """
    *conversations, num_prompt = pair
    start = np.array(chat_prompt(conversations[0][:num_prompt], template, tokenizer), np.int32)
    return [start, *(chat_tokens(messages, template, tokenizer)[0][len(start) :] for messages in conversations)]


def chat_prompt(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a conversation that ends with the user, up to the beginning of the assistant's answer.

    Raises UserError as `chat_tokens` does, and where the conversation ends otherwise.
    """
    if (problem := problem_of(messages, ends_with="user")) is not None:
        raise UserError(problem)
    pieces = [piece for piece in (*template.pieces(messages), *template.opening()) if piece.text]
    return list(itertools.chain.from_iterable(_ids_of(pieces, tokenizer)))


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the special tokens that end an answer. Raises UserError for one that the tokenizer lacks."""
    pieces = template.pieces([{"role": role, "content": role} for role in ROLES])
    return tuple(dict.fromkeys(_special(tokenizer, p.text) for p in pieces if p.special and p.trained))


def _ids_of(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[Sequence[int]]:
    """Return the ids of each piece."""
    ids: list[Sequence[int]] = []
    for special, group in itertools.groupby(pieces, key=lambda piece: piece.special):
        texts = [piece.text for piece in group]
        ids += [[_special(tokenizer, name)] for name in texts] if special else _encoded(tokenizer, texts)
    return ids


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts that follow one another.

    They are cut from the ids of the whole, so that they are those of a prompt that ends at a cut; each text is encoded
    by itself where a token would span a cut.
    """
    whole = tokenizer.encode("".join(texts))
    ends = []
    for i in range(1, len(texts)):
        head = tokenizer.encode("".join(texts[:i]))
        if whole[: len(head)] != head:
            return [tokenizer.encode(text) for text in texts]
        ends.append(len(head))
    return [whole[start:end] for start, end in itertools.pairwise([0, *ends, len(whole)])]


def _special(tokenizer: Tokenizer, name: str) -> int:
    if name == BOS and tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if name == EOS and tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    return special_id(tokenizer.special_tokens, name)


def problem_of(messages: Sequence[Message], *, ends_with: str = "assistant") -> str | None:
    """Return why the messages are no conversation whose last one is of this role, or None."""
    expected = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in ROLES:
            return f"message {number} has the role {role!r}: give one of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"message {number}, of role {role}, has no content: give it as text"
        if role not in expected:
            return (
                f"message {number} has the role {role} where {' or '.join(expected)} belongs: a conversation is at "
                "most one system message, then user and assistant in turn"
            )
        expected = ("assistant",) if role == "user" else ("user",)
    if messages and messages[-1]["role"] == ends_with:
        return None
    if ends_with == "user":
        return "a conversation must end with the user's message: add the one that is to be answered"
    return "a conversation must end with the assistant's answer: drop the messages after the last one"
