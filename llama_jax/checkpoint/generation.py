"""Settings of sampling in the files of a model: its `generation_config.json` and `config.json`."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import Json, UserError, read_json
from llama_jax.models import ModelConfig
from llama_jax.tokenizers import Tokenizer

GENERATION_FILE = "generation_config.json"

_LISTS = {"eos_ids": "eos_token_id", "forced_eos_ids": "forced_eos_token_id"}
_IDS = {
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
    "decoder_start_id": "decoder_start_token_id",
    "forced_bos_id": "forced_bos_token_id",
}
_TOKENS = ("suppress_tokens", "begin_suppress_tokens")
_COUNTS = ("min_length", "min_new_tokens", "no_repeat_ngram_size")
READ_KEYS = (*_LISTS.values(), *_IDS.values(), "bad_words_ids", *_TOKENS, *_COUNTS, "repetition_penalty")
NAMED_KEYS = tuple(key for key in (*_LISTS.values(), *_IDS.values()) if not key.startswith("forced"))
# Keys that change logits and that sampling does not have; with these values they do nothing.
UNFOLLOWED_KEYS: dict[str, tuple[Any, ...]] = {
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}
# Defaults of transformers' search and sampling. Here the arguments of sampling decide; an export keeps them.
_SEARCH = (
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "diversity_penalty",
    "length_penalty", "early_stopping", "max_length", "num_return_sequences",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of a model's files for the tokens that it writes.

    None, () and 0 are settings that are not there. `eos_ids` end a text; without them the tokenizer's EOS does, and in
    a decoder's text the token that begins another document. The others mean what they mean in transformers:
    `forced_bos_id` is the first token after a single one, `forced_eos_ids` the last one that there is room for,
    `bad_words_ids` are sequences that are not completed, `suppress_tokens` never written, `begin_suppress_tokens` not
    first, no EOS comes before `min_length` tokens (prompt included) and `min_new_tokens` new ones, no sequence of
    `no_repeat_ngram_size` tokens comes twice, and `repetition_penalty` divides the positive logits (multiplies the
    negative ones) of tokens that occurred already.

    `others` is a JSON object of the file's other entries (temperature, beams): sampling takes them from its arguments,
    an export keeps them. `unknown` names those that would change logits and that sampling does not have.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    decoder_start_id: int | None = None
    forced_bos_id: int | None = None
    forced_eos_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    others: str = "{}"
    unknown: tuple[str, ...] = ()

    def to_hf(self) -> Json:
        """Return the content of a `generation_config.json` with these settings."""
        data = json.loads(self.others)
        for field, key in _LISTS.items():
            if ids := getattr(self, field):
                data[key] = ids[0] if len(ids) == 1 else list(ids)
        for field, key in _IDS.items():
            if (value := getattr(self, field)) is not None:
                data[key] = value
        if self.bad_words_ids:
            data["bad_words_ids"] = [list(word) for word in self.bad_words_ids]
        data |= {key: list(ids) for key in _TOKENS if (ids := getattr(self, key))}
        data |= {key: count for key in _COUNTS if (count := getattr(self, key))}
        if self.repetition_penalty != 1:
            data["repetition_penalty"] = self.repetition_penalty
        return data


def read_generation(
    directory: Path, ignore_keys: Collection[str] = (), *, config_file: str | None = "config.json"
) -> GenerationSettings:
    """Return the settings of a directory, of `generation_config.json` before `config.json`.

    Where the first has any entry, only the ids of BOS, EOS, padding and an answer's start that it lacks are taken from
    the second: as in transformers, tokens are forced and forbidden by one of them. Entries that are null or named in
    `ignore_keys` are left out; `config_file` None reads the first file alone. Raises UserError for entries that are
    not tokens or numbers.
    """
    own = _entries(directory / GENERATION_FILE, ignore_keys)
    config = {} if config_file is None else _entries(directory / config_file, ignore_keys)
    file = directory / (GENERATION_FILE if own else config_file or GENERATION_FILE)
    if config.get("force_bos_token_to_be_generated"):  # in BART's first releases
        config.setdefault("forced_bos_token_id", config.get("bos_token_id", 0))
    read = NAMED_KEYS if own else (*READ_KEYS, *UNFOLLOWED_KEYS, *_SEARCH)
    data = {key: config[key] for key in read if key in config} | own
    found: Json = {}
    for field, key in _LISTS.items():
        found[field] = _ids(file, key, data.pop(key, []))
    for field, key in _IDS.items():
        if key in data:  # a list, where a configuration has several, begins with the usual one
            found[field] = next(iter(_ids(file, key, data.pop(key))), None)
    words = data.pop("bad_words_ids", [])
    if not isinstance(words, list):
        raise _wrong(file, "bad_words_ids", words)
    found["bad_words_ids"] = tuple(ids for word in words if (ids := _ids(file, "bad_words_ids", word)))
    found |= {key: _ids(file, key, data.pop(key, [])) for key in _TOKENS}
    for key in _COUNTS:
        count = data.pop(key, 0)
        if type(count) is not int or not 0 <= count < 2**31:
            raise _wrong(file, key, count)
        found[key] = count
    penalty = data.pop("repetition_penalty", 1.0)
    if type(penalty) not in (int, float) or not 0 < penalty < 1e30:
        raise _wrong(file, "repetition_penalty", penalty)
    unknown = tuple(key for key, idle in UNFOLLOWED_KEYS.items() if data.get(key) and data[key] not in idle)
    return GenerationSettings(
        **found, repetition_penalty=float(penalty), others=json.dumps(data, sort_keys=True), unknown=unknown
    )


def generation_keys(directory: Path) -> Collection[str]:
    """Return the keys of a directory's `generation_config.json`; none without that file."""
    return _entries(directory / GENERATION_FILE, ()).keys()


def write_generation(directory: Path, settings: GenerationSettings) -> None:
    """Write the `generation_config.json` of `settings` into `directory`, unless it would be empty."""
    if data := settings.to_hf():
        (directory / GENERATION_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _entries(file: Path, ignore_keys: Collection[str]) -> Json:
    """Return the entries of a JSON file that are not null, none where it does not exist."""
    if not file.is_file():
        return {}
    data = read_json(file)
    if not isinstance(data, Mapping):
        raise UserError(f"'{file}' is no JSON object: repair it, or take it away")
    return {key: value for key, value in data.items() if value is not None and key not in ignore_keys}


def _ids(file: Path, key: str, value: Any) -> tuple[int, ...]:
    """Return the token ids of an entry that is one id or a list of them, without -1, which some write for none."""
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and -1 <= i < 2**31 for i in ids):
        raise _wrong(file, key, value)
    return tuple(dict.fromkeys(i for i in ids if i >= 0)) if key != "bad_words_ids" else tuple(ids)


def _wrong(file: Path, key: str, value: Any) -> UserError:
    """Return the error of an entry that is not of its kind."""
    shown = json.dumps(value)
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    return UserError(f"'{file}' has {key}={shown}, which is none: mend it, or give --ignore-config-keys {key}")


def completed(settings: GenerationSettings, config: ModelConfig, tokenizer: Tokenizer | None) -> GenerationSettings:
    """Return the settings with all that sampling would take from elsewhere, for the files of an export.

    These are the start of an encoder-decoder's answers, tokens that its model never writes, the tokenizer's BOS and
    padding, and without `eos_ids` the `default_stops`.
    """
    found: Json = {}
    if config.has_source:
        if settings.decoder_start_id is None:
            found["decoder_start_id"] = config.decoder_start_id
        words = dict.fromkeys([*settings.bad_words_ids, *((i,) for i in config.never_written)])
        found["bad_words_ids"] = tuple(words)
    if tokenizer is not None:
        found |= {name: getattr(tokenizer, name) for name in ("bos_id", "pad_id") if getattr(settings, name) is None}
        if not settings.eos_ids:
            found["eos_ids"] = default_stops(config, tokenizer)
    return dataclasses.replace(settings, **found)


def default_stops(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a text of a model without `eos_ids`: EOS, and a decoder's start of another text."""
    stops = dict.fromkeys(tokenizer.eos_ids)
    # The token that begins a text opens another one: llama2.c's models write nothing else at the end. BART's answers
    # begin with it, so an encoder-decoder's do not end there.
    if not config.has_source:
        stops |= dict.fromkeys(tokenizer.start_ids)
    return tuple(stops)


def special_tokens(settings: GenerationSettings) -> Json:
    """Return the settings that are in an exported `config.json` too: ids of BOS, EOS, padding and an answer's start."""
    return {key: value for key, value in settings.to_hf().items() if key in NAMED_KEYS}
