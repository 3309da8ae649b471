"""Tokenizers in the metadata of GGUF files: SentencePiece's BPE with scores, and byte-level BPE with merges."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from llama_jax.config import Json, UserError
from llama_jax.gguf_header import read_header
from llama_jax.tokenizers.base import SETTINGS_FILE, Tokenizer
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.sentencepiece import BPE, ModelProto, SentencePieceTokenizer
from llama_jax.tokenizers.settings import EXPORTED_CLASS, settings_of
from llama_jax.tokenizers.vocabularies import CL100K_SPLIT, GPT2_SPLIT, SPLITS, byte_level_bpe

_GLM = ("chatglm-bpe", "glm4")  # prompts begin with its two tokens
# By the names of the ways to split a text (llama.cpp, src/llama-vocab.cpp), expressions that split one after the other.
_GPT2, _LLAMA3, _DIGITS = (GPT2_SPLIT,), (CL100K_SPLIT,), (r"\p{N}", GPT2_SPLIT)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
WAYS_TO_SPLIT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", *_GLM, "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (str(SPLITS["qwen2"]),)),
    "deepseek-v3": _DEEPSEEK,
}
# Files of these say nothing, and llama.cpp puts BOS before their texts and keeps a word that is a token whole.
_BOS_UNSAID = ("llama3", "llama-v3", "llama-bpe")
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # types of tokens, as in SentencePiece
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a GGUF file, with its special tokens, chat templates, stops and tokens before a prompt.

    Raises UserError for a kind or a way to split texts that is not known here, and where the metadata do not fit.
    """
    data = {key.removeprefix("tokenizer.ggml."): value for key, value in read_header(path).metadata.items()}
    kind = data.get("model")
    if kind not in ("llama", "gpt2"):
        raise UserError(f"'{path}' has a tokenizer of the kind {kind!r}, and llama and gpt2 are read: {_OTHER}")
    try:
        return _made(path, kind, data)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError, AttributeError) as error:
        raise UserError(f"'{path}' has a tokenizer that cannot be used ({error}): {_OTHER}") from None


_OTHER = "give that of the model's release, as --tokenizer PATH"


def _made(path: Path, kind: str, data: Json) -> Tokenizer:
    tokens, way = data["tokens"], data.get("pre", "gpt-2" if data.get("general.architecture") == "gpt2" else None)
    types = data.get("token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens have {len(types)} types")
    ids = {name: data.get(f"{key}_token_id") for name, key in _NAMES.items()}
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    start = "tokenizer.chat_template"
    templates = {key.removeprefix(start)[1:] or "default": text for key, text in data.items()
                 if key == start or key.startswith(f"{start}.")}  # fmt: skip
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    config["chat_template"] = listed if len(listed) > 1 else templates.get("default")
    if kind == "llama":
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        model = _sentencepiece(tokens, types, data)
        made: Tokenizer = SentencePieceTokenizer(model, settings_of({SETTINGS_FILE: json.dumps(config).encode()}))
    else:
        added = {i: kind == _CONTROL for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
        decoder = {i: {"content": tokens[i], "special": special, "normalized": False} for i, special in added.items()}
        config |= {"tokenizer_class": EXPORTED_CLASS, "added_tokens_decoder": decoder}
        settings = settings_of({SETTINGS_FILE: json.dumps(config).encode()})
        found = json_tokenizer(path, _byte_level(tokens, way, data), settings)
        assert found is not None
        made = found
    ends = [i for end in ("eos", "eot", "eom") if 0 <= (i := data.get(f"{end}_token_id", -1)) < len(tokens)]
    made.eos_ids = tuple(dict.fromkeys([*ends, *made.eos_ids]))
    says_bos = data.get("add_bos_token", kind == "llama" or way in _BOS_UNSAID)
    prefix = made.start_ids if says_bos else ()
    if way in _GLM:  # the file has them in its chat template alone
        prefix = tuple(made.special_tokens[name] for name in ("[gMASK]", "<sop>") if name in made.special_tokens)
    return made.with_rule(prefix, made.eos_ids[:1] if data.get("add_eos_token", False) else ())


def _sentencepiece(tokens: list[str], types: list[int], data: Json) -> bytes:
    """Return the SentencePiece model of these tokens."""
    model = ModelProto()
    for token, score, kind in zip(tokens, data["scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.vocab_size = BPE, len(tokens)
    model.trainer_spec.byte_fallback = _BYTE in types
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", data.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = data.get("remove_extra_whitespaces", False)
    return model.SerializeToString()


def _byte_level(tokens: list[str], way: str | None, data: Json) -> bytes:
    """Return the tokenizer.json of these tokens, whose texts are split as `way` names."""
    if way is None or way not in WAYS_TO_SPLIT:
        raise ValueError(f"it splits texts in the way {way!r}, and {', '.join(WAYS_TO_SPLIT)} are known")
    merges = [(left, right) for left, right in (merge.split(" ", 1) for merge in data["merges"])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        made = byte_level_bpe(vocabulary, merges, (), ignore_merges=way in _BOS_UNSAID)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WAYS_TO_SPLIT[way]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=data.get("add_space_prefix", False), use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])  # type: ignore[assignment]
    return made.to_str().encode()
