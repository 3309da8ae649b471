"""`Constraint`: which tokens may come next so that a text obeys a JSON schema or a regular expression (llguidance)."""

import functools
import json
from typing import Any

import numpy as np

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.sampling.config import SamplingConfig
from llama_jax.tokenizers import Tokenizer

# Between the parts of JSON a space, or a new line and its indentation: no model can go on with spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"(\x20?|\r?\n[\x20\t]{0,16})", "coerce_one_of": True}


class Constraint:
    """State of one text that is being written. `done` is true where nothing may follow."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size
        self.done = matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """Return bool [V], true for the tokens that may come next; the ids that end a text where it may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(self._vocab_size, bool)
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(found)] = found
        return allowed

    def consume(self, token: int) -> None:
        """Go on after a token that was allowed. Raises UserError where the constraint became too large to follow."""
        if not self._matcher.consume_token(token):
            raise UserError(f"the text no longer follows its json_schema or regex: {_line(self._matcher.get_error())}")
        self.done = self._matcher.is_stopped()


def constraint_of(lm: LanguageModel, config: SamplingConfig, stop_ids: tuple[int, ...] = ()) -> Constraint | None:
    """Return the constraint on a text that `stop_ids` end, None without one.

    Raises UserError for a schema or an expression that cannot be followed, and where llguidance is not installed.
    """
    if config.json_schema is None and config.regex is None:
        return None
    name, value = ("regex", config.regex) if config.json_schema is None else ("json_schema", config.json_schema)
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise UserError(f"{name} needs llguidance: pip install 'llama_jax[constraints]'") from None
    if lm.tokenizer is None:
        raise UserError(f"{name} needs a tokenizer, and the model came without one: load(..., tokenizer=...)")
    if name == "regex":
        grammar = LLMatcher.grammar_from_regex(_without_anchors(str(value)))
    else:
        schema = json.loads(str(value)) or {"type": "object"}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    matcher = LLMatcher(_vocabulary(lm.tokenizer, lm.config.vocab_size, tuple(stop_ids)), grammar, log_level=0)
    if matcher.is_error():
        raise UserError(f"{name}={value} cannot be followed: {_line(matcher.get_error())}")
    return Constraint(matcher, lm.config.vocab_size)


def _without_anchors(regex: str) -> str:
    """Return the expression without ^ and $ around it: the whole text matches anyway."""
    escapes = len(regex) - 1 - len(regex[:-1].rstrip("\\"))
    return regex[regex.startswith("^") : len(regex) - (regex.endswith("$") and escapes % 2 == 0)]


def _line(error: str) -> str:
    """Return llguidance's message in one line, without the grammar that it repeats."""
    lines = [line.strip() for line in error.splitlines()]
    return next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else ""
    )


@functools.lru_cache(4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> Any:
    """Return the vocabulary in llguidance's form, in which special tokens are no text."""
    from llguidance import LLTokenizer

    # Of the latter the unknown token has a text in some; an id that ends the text is no part of it.
    special = {*tokenizer.special_tokens.values(), *stop_ids}
    tokens = [b"" if i in special else text for i, text in enumerate(tokenizer.token_bytes[:vocab_size])]
    # An id that no model has ends a text without any stop.
    tokens += [b""] * (vocab_size + 1 - len(tokens))
    ends = [i for i in stop_ids if 0 <= i < vocab_size] or [vocab_size]
    wrapper = _Wrapper(tokenizer, tokens, ends[0])
    wrapper.vocabulary = LLTokenizer(wrapper, eos_token=ends)  # type: ignore[arg-type]
    return wrapper.vocabulary


class _Wrapper:
    """What llguidance asks of a tokenizer that it does not know."""

    is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()
    vocabulary: Any = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_id: int):
        self._tokenizer, self.tokens, self.eos_token_id = tokenizer, tokens, eos_id

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text that is the only possible one."""
        ids = self._tokenizer.encode(text)
        # A tokenizer that puts a space before a text does so here too.
        exact = max(ids, default=0) < len(self.tokens) and b"".join([self.tokens[i] for i in ids]) == text.encode()
        return ids if exact or self.vocabulary is None else self.vocabulary.greedy_tokenize(text)
