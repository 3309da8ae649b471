"""Answers as OpenAI's JSON, whole or as chunks of an event stream."""

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from llama_jax.sampling import TokenLogprobs
from llama_jax.serving.requests import Asked
from llama_jax.serving.worker import Call, Delta, Refused
from llama_jax.tokenizers import Tokenizer

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_of(refused: Refused) -> dict[str, Any]:
    """Return the body of a refusal."""
    kind = KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": str(refused), "type": kind, "param": None, "code": refused.code}}


@dataclasses.dataclass
class Answer:
    """The answer to one request, in the form of its endpoint."""

    asked: Asked
    model: str
    tokenizer: Tokenizer
    is_chat: bool

    def __post_init__(self) -> None:
        kind = "chat.completion" if self.is_chat else "text_completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": self.model}
        self._offsets: dict[int, int] = {}
        self._generated = 0

    async def whole(self, call: Call) -> dict[str, Any]:
        """Return the answer when all of it is there. Raises Refused."""
        found = [Delta(i) for i in range(call.num_choices)]
        async for delta in call.deltas():
            found[delta.choice].add(delta)
        self._generated = sum(delta.num_tokens for delta in found)
        choices = []
        for delta in found:
            text = self._echo(delta.choice) + delta.text
            form = {"message": {"role": "assistant", "content": text, "refusal": None}}
            form = form if self.is_chat else {"text": text}
            ends = {"logprobs": self._logprobs(delta), "finish_reason": delta.finish_reason}
            choices.append({"index": delta.choice, **form, **ends})
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream as the texts come. Raises Refused, also between two of them."""
        head = self._head | ({"object": "chat.completion.chunk"} if self.is_chat else {})
        head |= {"usage": None} if self.asked.usage else {}
        begun: set[int] = set()
        async for delta in call.deltas():
            self._generated += delta.num_tokens
            first = delta.choice not in begun
            begun.add(delta.choice)
            if self.is_chat and first:
                yield {**head, "choices": [self._chunk(Delta(delta.choice), {"role": "assistant", "content": ""})]}
            if not self.is_chat and first and (prompt := self._echo(delta.choice)):
                yield {**head, "choices": [self._chunk(Delta(delta.choice, prompt))]}
            if delta.text or delta.logprobs or delta.finish_reason:
                yield {**head, "choices": [self._chunk(delta)]}
        if self.asked.usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _chunk(self, delta: Delta, content: Mapping[str, str] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"content": delta.text} if delta.text else {}
        form = {"delta": found if content is None else content} if self.is_chat else {"text": delta.text}
        logprobs = self._logprobs(delta) if delta.logprobs else None
        return {"index": delta.choice, **form, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _echo(self, choice: int) -> str:
        return self.asked.texts[choice // self.asked.config.num_samples] if self.asked.texts else ""

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.asked.config.logprobs is None:
            return None
        if self.is_chat:
            return {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}
        names = [self._bytes(entry.token).decode(errors="replace") for entry in delta.logprobs]
        offsets, at = [], self._offsets.get(delta.choice, 0)
        for name in names:
            offsets.append(at)
            at += len(name)
        self._offsets[delta.choice] = at
        return {
            "tokens": names,
            "token_logprobs": [entry.logprob for entry in delta.logprobs],
            "top_logprobs": [self._top(entry.top) for entry in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        # Of tokens whose texts look alike, the most probable is kept.
        return {self._bytes(i).decode(errors="replace"): logprob for i, logprob in reversed(top)}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(i, logprob) for i, logprob in entry.top]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        found = self._bytes(token_id)
        return {"token": found.decode(errors="replace"), "logprob": logprob, "bytes": list(found)}

    def _bytes(self, token_id: int) -> bytes:
        known = self.tokenizer.token_bytes
        return known[token_id] if token_id < len(known) else b""


def event(data: Mapping[str, Any] | str) -> bytes:
    """Return an event of a stream."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()
