"""Settings next to a vocabulary: tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat templates.

They name the special tokens, add tokens to the vocabulary, and give the tokens before and after a prompt. `exported`
writes them for AutoTokenizer of transformers.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import Json
from llama_jax.tokenizers.base import RULE_FILE, SETTINGS_FILE, TEMPLATE_DIRECTORY, TEMPLATE_FILE, Tokenizer

SPECIAL_MAP_FILE, ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
# Keys of further special tokens, a list each.
MORE_KEYS = ("additional_special_tokens", "extra_special_tokens")
END = "<|endoftext|>"
# One class of transformers reads any tokenizer.json as it is: others rebuild parts of it.
EXPORTED_CLASS = "PreTrainedTokenizerFast"
# Keys of a tokenizer_config.json that an export leaves out: of other classes, of files, or written anew.
DROPPED = (
    "auto_map", "backend", "extra_ids", "fast_tokenizer_files", "init_inputs", "is_local", "legacy", "name_or_path",
    "processor_class", "sp_model_kwargs", "special_tokens_map_file", "tokenizer_file", "vocab_file",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """Defaults of a class of transformers, which its files leave out.

    names: special tokens by key, as `eos_token`.
    prefix, suffix: keys of the tokens around a prompt where no file gives them.
    splitting: key of `vocabularies.SPLITS`, for byte-level BPE; None where the class reads other files.
    nfc: text is normalized to NFC first.
    sentencepiece: reads a SentencePiece model, whose ids are the model's own.
    fairseq: but for the special ones, which are in fairseq's order before the pieces.
    keeps_rule: the class ignores the post-processor of a tokenizer.json.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    splitting: str | None = None
    nfc: bool = False
    sentencepiece: bool = False
    fairseq: bool = False
    keeps_rule: bool = False


def _names(**names: str) -> dict[str, str]:
    return {f"{key}_token": name for key, name in names.items()}


_GPT2 = TokenizerClass(_names(bos=END, eos=END), splitting="gpt2")
_GPT_NEOX = TokenizerClass(_names(bos=END, eos=END, pad="<|padding|>"), splitting="gpt2", nfc=True, keeps_rule=True)
_QWEN2 = TokenizerClass(_names(eos=END, pad=END), splitting="qwen2", nfc=True)
_ROBERTA = TokenizerClass(
    _names(bos="<s>", eos="</s>", unk="<unk>", pad="<pad>", cls="<s>", sep="</s>", mask="<mask>"),
    prefix=("cls_token",),
    suffix=("sep_token",),
    splitting="gpt2",
)
# BERT's documents begin and end with the tokens around its sentences.
_BERT = TokenizerClass(
    _names(bos="[CLS]", eos="[SEP]", unk="[UNK]", pad="[PAD]", cls="[CLS]", sep="[SEP]", mask="[MASK]"),
    prefix=("cls_token",),
    suffix=("sep_token",),
)
_LLAMA = TokenizerClass(_names(bos="<s>", eos="</s>", unk="<unk>"), prefix=("bos_token",), sentencepiece=True)
_GEMMA = dataclasses.replace(_LLAMA, names=_names(bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>"))
_T5 = TokenizerClass(_names(eos="</s>", unk="<unk>", pad="<pad>"), suffix=("eos_token",), sentencepiece=True)
_XLM_ROBERTA = dataclasses.replace(_ROBERTA, splitting=None, sentencepiece=True, fairseq=True)
_MARIAN = dataclasses.replace(_T5, sentencepiece=False)
# By name, without "Fast".
CLASSES = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT_NEOX,
    "Qwen2Tokenizer": _QWEN2,
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
    "LEDTokenizer": _ROBERTA,
    "LongformerTokenizer": _ROBERTA,
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "MobileBertTokenizer": _BERT,
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GemmaTokenizer": _GEMMA,
    "T5Tokenizer": _T5,
    "MT5Tokenizer": _T5,
    "XLMRobertaTokenizer": _XLM_ROBERTA,
    "MarianTokenizer": _MARIAN,
    "ChatGLMTokenizer": TokenizerClass(sentencepiece=True),
}
# Classes without defaults: the files decide.
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# Classes of models whose config.json and tokenizer_config.json name none.
MODEL_CLASSES = {
    "gpt2": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "phi": "CodeGenTokenizer",
    "codegen": "CodeGenTokenizer", "gpt_neox": "GPTNeoXTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer", "bart": "BartTokenizer", "bert": "BertTokenizer", "distilbert": "BertTokenizer",
    "t5": "T5Tokenizer", "mt5": "T5Tokenizer", "marian": "MarianTokenizer", "chatglm": "ChatGLMTokenizer",
    "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer", "albert": "AlbertTokenizer", "xlnet": "XLNetTokenizer",
    "pegasus": "PegasusTokenizer", "mbart": "MBartTokenizer", "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer", "deberta-v2": "DebertaV2Tokenizer", "m2m_100": "M2M100Tokenizer",
    "blenderbot": "BlenderbotTokenizer", "deberta": "DebertaTokenizer", "big_bird": "BigBirdTokenizer",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Added:
    """A token added to a vocabulary: its text and how it is found in others (as in the `tokenizers` library)."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    @staticmethod
    def of(value: Any, **defaults: Any) -> "Added":
        """Return the token of a JSON value, a string or an object; `defaults` are for keys that the object lacks."""
        data = value if isinstance(value, dict) else {"content": value}
        if not isinstance(data.get("content", ""), str | None):
            raise TypeError(f"a token {data['content']!r} that is no text")
        fields = {field.name for field in dataclasses.fields(Added)}
        return Added(**(defaults | {key: item for key, item in data.items() if key in fields}))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Contents of the settings files of a directory.

    config, special_map: JSON of tokenizer_config.json and of special_tokens_map.json, {} where absent.
    added: added tokens by id.
    class_name: the tokenizer's class without "Fast"; None where no file names it.
    files: contents of all the files, by name, with the class written out.
    """

    config: Json = dataclasses.field(default_factory=dict)
    special_map: Json = dataclasses.field(default_factory=dict)
    added: Mapping[int, Added] = dataclasses.field(default_factory=dict)
    class_name: str | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def rules(self) -> TokenizerClass:
        """Defaults of the class; empty ones for an unknown class."""
        return CLASSES.get(self.class_name or "", TokenizerClass())

    def as_class(self, name: str) -> "Settings":
        """Return these settings, with class `name` where they name none."""
        return self if self.class_name is not None else dataclasses.replace(self, class_name=name)

    @property
    def naming(self) -> tuple[Json, Json]:
        """The two files that name special tokens, the one that decides last.

        As in transformers that is special_tokens_map.json, the older way, unless tokenizer_config.json lists the added
        tokens.
        """
        if self.config.get("added_tokens_decoder") is None:
            return self.config, self.special_map
        return self.special_map, self.config

    def from_files(self, key: str) -> str | None:
        """Return the token that the files themselves name under `key`, or None."""
        for data in reversed(self.naming):
            if key in data:
                return Added.of(data[key]).content if data[key] else None
        return None

    def name(self, key: str) -> str | None:
        """Return the token under `key`, the class's own where no file has the key."""
        in_files = key in self.config or key in self.special_map
        return self.from_files(key) if in_files else self.rules.names.get(key)

    def named(self) -> dict[str, Added]:
        """Return all special tokens that the files name, by their text."""
        found = {}
        for data in self.naming:
            listed = [data[key] for key in KEYS if data.get(key)]
            for key in MORE_KEYS:
                more = data.get(key) or []
                listed += more.values() if isinstance(more, dict) else more
            found |= {token.content: token for token in (Added.of(value, normalized=False) for value in listed)}
        return {content: dataclasses.replace(token, special=True) for content, token in found.items() if content}

    def affixes(self, id_of: Callable[[str], int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after a prompt where no post-processor gives them.

        `add_bos_token` and `add_eos_token` decide, else the class. `id_of` returns the id of a token by its text.
        """
        prefix, suffix = self.rules.prefix, self.rules.suffix
        if (add_bos := self.config.get("add_bos_token")) is not None and prefix in ((), ("bos_token",)):
            prefix = ("bos_token",) if add_bos else ()
        if (add_eos := self.config.get("add_eos_token")) is not None and not suffix:
            suffix = ("eos_token",) if add_eos else ()
        names = ([self.name(key) for key in keys] for keys in (prefix, suffix))
        first, last = (tuple(i for n in found if n is not None and (i := id_of(n)) is not None) for found in names)
        return first, last


def read_settings(directory: Path) -> Settings:
    """Return the settings in `directory`, whose config.json, if any, gives the class where no other file does.

    Raises ValueError for a file that is damaged.
    """
    found = [directory / name for name in (SETTINGS_FILE, SPECIAL_MAP_FILE, ADDED_FILE, RULE_FILE, TEMPLATE_FILE)]
    found += sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))
    files = {file.relative_to(directory).as_posix(): file.read_bytes() for file in found if file.is_file()}
    model = directory / "config.json"
    model_config = _object("config.json", model.read_bytes()) if model.is_file() else {}
    config = _object(SETTINGS_FILE, files.get(SETTINGS_FILE, b"{}"))
    name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = name or MODEL_CLASSES.get(str(model_config.get("model_type")))
    if name is not None and not config.get("tokenizer_class"):
        # The class must be known without the model's config, too.
        config = {**config, "tokenizer_class": name}
        files[SETTINGS_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return settings_of(files)


def settings_of(files: Mapping[str, bytes]) -> Settings:
    """Return the settings that are in `files`, by file name. Raises ValueError for a damaged one."""
    config, special_map, added = (
        _object(name, files.get(name, b"{}")) for name in (SETTINGS_FILE, SPECIAL_MAP_FILE, ADDED_FILE)
    )
    name = config.get("tokenizer_class")
    settings = Settings(config, special_map, {}, name and str(name).removesuffix("Fast"), files)
    try:
        special = settings.named()
        tokens = {int(i): special.get(text, Added(text)) for text, i in added.items()}
        decoder = config.get("added_tokens_decoder") or {}
        tokens |= {int(i): _merged(Added.of(value), special) for i, value in decoder.items()}
        if min(tokens, default=0) < 0:
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise ValueError("its settings name special or added tokens in a form that is not known") from None
    # A token without text would be found everywhere.
    return dataclasses.replace(settings, added={i: token for i, token in tokens.items() if token.content})


def _merged(token: Added, special: Mapping[str, Added]) -> Added:
    """Return `token`, special where it is in `special`."""
    return dataclasses.replace(token, special=token.special or token.content in special)


def _object(name: str, content: bytes) -> Json:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ValueError(f"'{name}' is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"'{name}' is not a JSON object")
    return data


def guess(names: Sequence[str], id_of: Callable[[str], int | None]) -> int | None:
    """Return the id of the first of `names` that the vocabulary has."""
    return next((i for name in names if (i := id_of(name)) is not None), None)


def exported(
    tokenizer: Tokenizer, data: Json, settings: Settings, *, keeps_processor: bool = False
) -> dict[str, bytes]:
    """Return the files of a directory for transformers: those of `tokenizer`, `data` as `tokenizer.json`, settings.

    The post-processor of `data` puts the ids of `tokenizer`'s rule around a text, unless it `keeps_processor`.
    """
    names = {i: token["content"] for token in data["added_tokens"] if (i := token["id"]) is not None}
    names |= {i: name for name, i in tokenizer.special_tokens.items()}
    if not keeps_processor:
        data["post_processor"] = _template(tokenizer.prefix_ids, tokenizer.suffix_ids, names)
    ids = {"bos_token": tokenizer.bos_id, "unk_token": tokenizer.unk_id, "pad_token": tokenizer.pad_id}
    ids["eos_token"] = next(iter(tokenizer.eos_ids), None)
    found = {key: settings.name(key) for key in KEYS if key not in ids}
    found |= {key: None if i is None else names.get(i) for key, i in ids.items()}
    special = {key: name for key, name in found.items() if name is not None and name in names.values()}
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in data["added_tokens"]
    }
    config = {key: value for key, value in settings.config.items() if key not in DROPPED and key not in KEYS}
    config |= {"tokenizer_class": EXPORTED_CLASS, "added_tokens_decoder": decoder, **special}
    config["add_bos_token"] = tokenizer.prefix_ids == ((tokenizer.bos_id,) if tokenizer.bos_id is not None else None)
    config["add_eos_token"] = bool(tokenizer.eos_ids) and tokenizer.suffix_ids == tokenizer.eos_ids[:1]
    config.setdefault("clean_up_tokenization_spaces", False)
    # The class takes any model for one with token types.
    pairs = ["token_type_ids"] if data["model"]["type"] == "WordPiece" else []
    config.setdefault("model_input_names", ["input_ids", *pairs, "attention_mask"])
    special_map = {key: value for key, value in settings.special_map.items() if key not in KEYS} | special
    files = {name: content for name, content in tokenizer.files.items() if name != RULE_FILE}
    files["tokenizer.json"] = _json(data)
    return files | {SETTINGS_FILE: _json(config), SPECIAL_MAP_FILE: _json(special_map)}


def _json(data: Json) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _template(prefix: Sequence[int], suffix: Sequence[int], names: Mapping[int, str]) -> Json | None:
    """Return the post-processor that puts `prefix` and `suffix` around a text, as JSON; None without both."""
    if not prefix and not suffix:
        return None

    def of(ids: Sequence[int], kind: int) -> list[Json]:
        return [{"SpecialToken": {"id": names.get(i, str(i)), "type_id": kind}} for i in ids]

    first, second = ({"Sequence": {"id": text, "type_id": kind}} for kind, text in enumerate("AB"))
    single = [*of(prefix, 0), first, *of(suffix, 0)]
    tokens = {names.get(i, str(i)): i for i in (*prefix, *suffix)}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, second, *of(suffix, 1)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in tokens.items()},
    }
