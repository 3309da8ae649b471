"""Added tokens found in a text before a model splits the rest of it."""

import re
from collections.abc import Iterable, Mapping

from llama_jax.tokenizers.settings import Added


class AddedTokens:
    """Tokens by id, on top of a vocabulary."""

    def __init__(self, tokens: Mapping[int, Added]):
        self._tokens = {token.content: (i, token) for i, token in tokens.items()}
        self._all = _pattern(tokens.values())
        self._text = _pattern(token for token in tokens.values() if not token.special)

    def split(self, text: str, *, special: bool) -> list[str | int]:
        """Return the ids of the added tokens in `text`, and the texts between; `special` finds special ones too.

        Of several at one place the longest is taken.
        """
        pattern = self._all if special else self._text
        if pattern is None:
            return [text] if text else []
        parts: list[str | int] = []
        end, strips = 0, False
        for match in pattern.finditer(text):
            i, token = self._tokens[match[0]]
            between = text[end : match.start()]
            between = between.lstrip() if strips else between
            parts += [between.rstrip() if token.lstrip else between, i]
            end, strips = match.end(), token.rstrip
        rest = text[end:]
        return [part for part in (*parts, rest.lstrip() if strips else rest) if part != ""]


def _pattern(tokens: Iterable[Added]) -> re.Pattern[str] | None:
    forms = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        form = re.escape(token.content)
        forms.append(rf"(?<!\w){form}(?!\w)" if token.single_word else form)
    return re.compile("|".join(forms)) if forms else None
