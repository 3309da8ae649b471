"""`TextStream`: the text of the token ids that a model writes, up to the first of the strings that end it."""

from collections.abc import Iterable, Sequence

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.tokenizers import Tokenizer


def tokenizer_of(lm: LanguageModel) -> Tokenizer:
    """Return the model's tokenizer. Raises UserError where it came without one, and for what is no LanguageModel."""
    if not isinstance(lm, LanguageModel):
        raise UserError(f"lm is a {type(lm).__name__}, and must be a LanguageModel with a tokenizer: what load returns")
    if lm.tokenizer is None:
        raise UserError("the model came without a tokenizer: give one with --tokenizer, or load(..., tokenizer=...)")
    return lm.tokenizer


class _Channels:
    """The final channel's text of an answer in harmony's channels (OpenAI 2025, GPT-OSS); all text of other answers.

    An answer is `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`; from the
    first channel on, everything but the final one's content is hidden. shows: the text of the next token is shown.
    """

    def __init__(self, tokenizer: Tokenizer):
        names = tokenizer.special_tokens
        self._channel, self._message, self._special = (
            names.get("<|channel|>"),
            names.get("<|message|>"),
            {*names.values()},
        )
        self._name: str | None = None  # of the channel, as far as it is written
        self.shows = True

    def shown(self, token_id: int, text: str) -> str:
        """Return what of a token's text is shown."""
        if self._channel is None:
            return text
        if token_id == self._channel:
            self._name, self.shows = "", False
        elif token_id == self._message and self._name is not None:
            self.shows = self._name.split()[:1] == ["final"]
        elif token_id in self._special and self._name is not None:
            self.shows = False
        elif self._name is not None and not self.shows:
            self._name += text
        return text if self.shows else ""


class TextStream:
    """The text of the ids that follow a prompt's ids, without the prompt's own, up to the first stop string.

    Where stop strings overlap, the one that begins first ends the text. Text that may be the beginning of one, and
    bytes that may be part of a character, are held back until more ids decide. Special tokens have no text, so that a
    stop string is found across them; one that is the name of a special token is met by this token. Of an
    encoder-decoder's answer, sentinels and other special tokens are written by name, of one in harmony's channels the
    final one alone.

    stopped: a stop string was met; ids that are fed later have no effect.
    num_tokens: fed ids that belong to the text, the one that completed the stop string included.
    text: all that was shown.
    """

    def __init__(self, lm: LanguageModel, prompt_ids: Iterable[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer = tokenizer_of(lm)
        self._stream, self._known = tokenizer.stream(), tokenizer.vocab_size
        self._stop, self._channels = tuple(stop), _Channels(tokenizer)
        self._stop_ids = {i for name, i in tokenizer.special_tokens.items() if name in self._stop}
        self.stopped, self.num_tokens, self.text = False, 0, ""
        self._held = ""  # may be the beginning of a stop string
        self._ends: list[int] = []  # characters of `_held` up to the end of each id since it was empty
        self._names: dict[int, str] = {}
        self._prompt_chars = 0  # of the prompt, that the decoder has held back
        if lm.config.has_source:
            silent = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id, *tokenizer.eos_ids}
            self._names = {i: name for name, i in tokenizer.special_tokens.items() if i not in silent}
            return  # the prompt is the source, not the beginning of this text
        prompt = [i for i in prompt_ids if i < self._known]
        seen = "".join([self._stream.feed(i) for i in prompt])
        # Characters that the stream holds back, because more bytes may follow, come with the next ids.
        self._prompt_chars = len(tokenizer.decode(prompt)) - len(seen)

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that may be shown after `ids`."""
        shown = ""
        for token_id in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            text = self._text(token_id)
            rest = self._stream.pending[self._prompt_chars :] if self._stop and self._channels.shows else ""
            # Such as the line feed of a byte-fallback tokenizer, which is held until a token that is not a byte.
            if rest and any(stop in self._held + text + rest for stop in self._stop):
                text += self._without_prompt(self._stream.flush())
            self._ends.append(len(self._held) + len(text))
            shown += self._checked(text, last=token_id in self._stop_ids)
            self.stopped = self.stopped or token_id in self._stop_ids
        return shown

    def flush(self) -> str:
        """Return the text that was held back, where no more ids follow."""
        if self.stopped:
            return ""
        rest = self._without_prompt(self._stream.flush())
        return self._checked(rest if self._channels.shows else "", last=True)

    def _checked(self, text: str, *, last: bool) -> str:
        """Return what may be shown of the text that was held and `text`, and look for stop strings in it."""
        held = self._held + text
        found = min(((at, len(stop)) for stop in self._stop if (at := held.find(stop)) >= 0), default=None)
        maybe = len(held) if last else min((_partial(held, stop) for stop in self._stop), default=len(held))
        if found is None or maybe < found[0]:  # the one that began before it wins, if it is completed
            self._held, shown = held[maybe:], held[:maybe]
            self._ends = [end - maybe for end in self._ends] if self._held else []
        else:
            self.stopped, shown = True, held[: found[0]]
            self.num_tokens -= sum(end >= sum(found) for end in self._ends) - 1
        self.text += shown
        return shown

    def _text(self, token_id: int) -> str:
        """Return the text that is complete with a token; ids beyond the tokenizer's vocabulary have none."""
        if token_id >= self._known:
            return ""
        if token_id not in self._names:
            return self._channels.shown(token_id, self._without_prompt(self._stream.feed(token_id)))
        before, self._stream = self._stream.flush(), self._tokenizer.stream()
        return self._without_prompt(before + self._names[token_id])

    def _without_prompt(self, text: str) -> str:
        held, self._prompt_chars = self._prompt_chars, max(0, self._prompt_chars - len(text))
        return text[held:]


def _partial(text: str, stop: str) -> int:
    """Return where the longest end of `text` begins that is a beginning of `stop`, but not all of it."""
    first = max(0, len(text) - len(stop) + 1)
    return next((i for i in range(first, len(text)) if stop.startswith(text[i:])), len(text))
