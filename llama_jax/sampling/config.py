"""`SamplingConfig`: all that a user says about how a prompt is continued, as plain checked values."""

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args, get_origin

from llama_jax.config import UserError

if TYPE_CHECKING:
    from llama_jax.sampling.sampler import Control

LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a prompt is continued.

    Whatever is given is applied in the order of transformers' `generate` (`sampler.py`). Where the model's files have
    a setting of the same name, the value here replaces it.

    max_new_tokens: new tokens of a text, at most.
    temperature: divides the logits; 0 is greedy.
    top_k: only the K most probable tokens.
    top_p: only the most probable tokens that together make up P (Holtzman et al. 2020).
    min_p: only tokens at least P times as probable as the most probable one (Nguyen et al. 2024).
    typical_p: only tokens with the most typical information that together make up P (Meister et al. 2022).
    repetition_penalty: makes tokens of the prompt and the text less probable; 1 is off (Keskar et al. 2019).
    frequency_penalty: taken off a token's logit each time it was generated.
    presence_penalty: taken off the logit of every generated token once.
    no_repeat_ngram_size: no sequence of N tokens comes twice; 0 is off (Paulus et al. 2017).
    logit_bias: added to the logits of token ids, {id: number}.
    banned_ids: token ids that are never written.
    forced_ids: token ids that the text begins with.
    min_new_tokens: no token ends the text before N new ones.
    ignore_eos: the model's own end of a text does not end it; stop_ids and stop do.
    stop_ids: token ids that end a text, and are kept.
    stop: strings that end a text, and are left out.
    json_schema: JSON schema (JSON text) that the text obeys; {} is any JSON object.
    regex: regular expression that the whole text matches.
    num_samples: texts for each prompt.
    num_beams: continuations that beam search keeps; 1 is no beam search.
    length_penalty: exponent of the length by which a beam's score is divided; above 0 for longer texts.
    early_stopping: when beam search ends, false, true or never, as in transformers.
    logprobs: number of most probable tokens whose log-probabilities are returned; 0 for the chosen token's alone.
    seed: of the draws, 0 to 2**64 - 1.
    controls: further functions `(logits [B, V], written) -> logits`, before temperature, top-k and top-p.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = ()
    min_new_tokens: int | None = None
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    regex: str | None = None
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    seed: int = 0
    controls: "tuple[Control, ...]" = ()

    @classmethod
    def of(cls, **values: Unpack["SamplingOptions"]) -> "SamplingConfig":
        """Return the config of a user's values, numbers of numpy and JAX among them. Raises UserError for others."""
        known: dict[str, Any] = {**({"temperature": 0.0} if values.get("num_beams", 1) != 1 else {}), **values}
        for field in dataclasses.fields(cls):
            kinds = {field.type, *(() if get_origin(field.type) is tuple else get_args(field.type))}
            value = known.get(field.name, field.default)
            if kinds & {int, float} and not (value is None and type(None) in kinds):
                known[field.name] = number(field.name, value, whole=int in kinds)
        for name in ("stop_ids", "banned_ids", "forced_ids"):
            known[name] = token_ids(name, known.get(name))
        known["logit_bias"] = _bias(known.get("logit_bias"))
        stop = known.get("stop")
        known["stop"] = () if stop is None else tuple(stop) if isinstance(stop, list | tuple) else (stop,)
        if isinstance(schema := known.get("json_schema"), Mapping):
            known["json_schema"] = json.dumps(schema)
        known["controls"] = tuple(known.get("controls") or ())
        return cls(**known)

    def __post_init__(self) -> None:
        """Check the values. Raises UserError."""
        for names, holds, what in CHECKS:
            for name in names.split():
                self._check(name, holds, what)
        self._check("forced_ids", lambda ids: len(ids) <= self.max_new_tokens, "at most max_new_tokens ids")
        self._check("banned_ids", lambda ids: not {*ids} & {*self.forced_ids}, "other ids than forced_ids")
        if self.num_beams > 1:
            self._check("num_samples", lambda n: n <= self.num_beams, f"at most num_beams={self.num_beams}")
            for name, off in {"temperature": 0, "json_schema": None, "regex": None, "logprobs": None}.items():
                if getattr(self, name) != off:
                    raise UserError(f"{name}={getattr(self, name)} does not go with num_beams: leave out one of them")
        if self.json_schema is not None and self.regex is not None:
            raise UserError("json_schema and regex both constrain the text: give one of them")

    def _check(self, name: str, holds: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise UserError(f"{name}={value} must be {what}")


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | str | None
    banned_ids: Any
    forced_ids: Any
    min_new_tokens: int | None
    ignore_eos: bool
    stop_ids: Any
    stop: str | list[str] | tuple[str, ...] | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    num_samples: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    logprobs: int | None
    seed: int
    controls: "Iterable[Control]"


class GenerationOptions(SamplingOptions, total=False):
    """`SamplingOptions`, and who guesses tokens ahead: see `generate`."""

    draft: Any
    draft_tokens: int | None


def _is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


# Names of fields, what must hold for a value that is not None, and the end of the sentence where it does not.
CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens top_k num_samples num_beams", lambda n: n >= 1, "at least 1"),
    ("no_repeat_ngram_size min_new_tokens logprobs", lambda n: n >= 0, "at least 0"),
    ("top_p typical_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
    ("frequency_penalty presence_penalty length_penalty", lambda x: -math.inf < x < math.inf, "a finite number"),
    ("temperature", lambda t: 0 <= t < math.inf, "0 (greedy) or above"),
    ("min_p", lambda p: 0 <= p <= 1, "from 0 to 1"),
    ("repetition_penalty", lambda x: 0 < x < math.inf, "above 0"),
    ("seed", lambda n: 0 <= n < 2**64, "from 0 to 2**64 - 1"),
    ("logit_bias", lambda pairs: all(-math.inf <= x < math.inf for _, x in pairs), "numbers below infinity"),
    ("stop", lambda texts: all(isinstance(t, str) and t for t in texts), "texts of at least 1 character"),
    ("ignore_eos", lambda x: isinstance(x, bool), "true or false"),
    ("early_stopping", lambda when: isinstance(when, bool) or when == "never", 'True, False or "never"'),
    ("json_schema", _is_json_object, "a JSON object, as text or a dict"),
    ("regex", lambda text: isinstance(text, str), "a regular expression"),
)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Return the pairs of a mapping, or of its JSON text, of ids (texts in OpenAI's) to numbers."""
    if not value:
        return ()
    try:
        found = json.loads(value) if isinstance(value, str) else value
        pairs = tuple(found.items() if isinstance(found, Mapping) else found)
        bias = tuple((int(i) if isinstance(i, str) else i, number("logit_bias", x)) for i, x in pairs)
        return tuple(zip(token_ids("logit_bias", [i for i, _ in bias]), [x for _, x in bias], strict=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"logit_bias={value!r} must be a mapping of token ids to numbers") from error


def number(name: str, value: Any, *, whole: bool = False) -> Any:
    """Return a user's number as Python's own, also of numpy's and JAX's scalars. Raises UserError for other values."""
    found = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(found, bool) or not isinstance(found, int if whole else int | float):
        raise UserError(f"{name}={value!r} must be a {'whole ' if whole else ''}number")
    return found


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return the ids of a value that is None, one id or several. Raises UserError for other values."""
    try:
        given = () if value is None else value if isinstance(value, Iterable) else (value,)
        found = tuple(operator.index(i.item() if hasattr(i, "item") else i) for i in given)
    except TypeError:
        found = (LARGEST + 1,)
    if not all(-LARGEST - 1 <= i <= LARGEST for i in found):
        raise UserError(f"{name}={value!r} must be a token id or a list of them")
    return found
