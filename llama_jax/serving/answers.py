"""Answers as OpenAI's JSON, whole or as chunks of an event stream."""

import dataclasses
import itertools
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from llama_jax.sampling import TokenLogprobs
from llama_jax.serving.requests import Refused
from llama_jax.serving.worker import Call, Delta
from llama_jax.tokenizers import Tokenizer

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_of(refused: Refused) -> dict[str, Any]:
    """Return the body of a refusal."""
    kind = KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": str(refused), "type": kind, "param": None, "code": refused.code}}


@dataclasses.dataclass
class Answer:
    """The answer to one request, in the form of its endpoint."""

    call: Call
    model: str
    tokenizer: Tokenizer
    is_chat: bool

    def __post_init__(self) -> None:
        kind = "chat.completion" if self.is_chat else "text_completion"
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": self.model}
        self._offsets: dict[int, int] = {}
        self._generated = 0

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all of it is there. Raises Refused."""
        found = [Delta(i) for i in range(self.call.num_choices)]
        async for delta in self.call.deltas():
            found[delta.choice].add(delta)
        self._generated = sum(delta.num_tokens for delta in found)
        choices = []
        for delta in found:
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            choices.append(self._choice(delta, {"message": message} if self.is_chat else {"text": delta.text}))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream as the texts come. Raises Refused, also between two of them."""
        head = self._head | ({"object": "chat.completion.chunk"} if self.is_chat else {})
        head |= {"usage": None} if self.call.asked.usage else {}
        begun: set[int] = set()
        async for delta in self.call.deltas():
            self._generated += delta.num_tokens
            if self.is_chat and delta.choice not in begun:
                begun.add(delta.choice)
                opening = {"delta": {"role": "assistant", "content": ""}}
                yield {**head, "choices": [self._choice(Delta(delta.choice), opening)]}
            if delta.text or delta.logprobs or delta.finish_reason:
                content = {"content": delta.text} if delta.text else {}
                form = {"delta": content} if self.is_chat else {"text": delta.text}
                yield {**head, "choices": [self._choice(delta, form)]}
        if self.call.asked.usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _choice(self, delta: Delta, form: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(delta) if delta.logprobs else None
        return {"index": delta.choice, **form, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self.call.asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}
        names = [self._name(entry.token) for entry in delta.logprobs]
        offsets = [*itertools.accumulate(map(len, names), initial=self._offsets.get(delta.choice, 0))]
        self._offsets[delta.choice] = offsets.pop()
        # Nothing is before the first token of a prompt.
        known = [None if math.isnan(entry.logprob) else entry for entry in delta.logprobs]
        return {
            "tokens": names,
            "token_logprobs": [entry and entry.logprob for entry in known],
            # Of tokens whose texts look alike, the most probable is kept.
            "top_logprobs": [entry and {self._name(i): x for i, x in reversed(entry.top)} for entry in known],
            "text_offset": offsets,
        }

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(i, logprob) for i, logprob in entry.top]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(self._bytes(token_id))}

    def _name(self, token_id: int) -> str:
        return self._bytes(token_id).decode(errors="replace")

    def _bytes(self, token_id: int) -> bytes:
        known = self.tokenizer.token_bytes
        return known[token_id] if token_id < len(known) else b""


def event(data: Mapping[str, Any] | str) -> bytes:
    """Return an event of a stream."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()
