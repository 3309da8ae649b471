"""Files of a Hugging Face directory, made so that AutoTokenizer of transformers gives a tokenizer's ids.

They hold one `tokenizer.json` for every kind, with the class that reads just that: other classes rebuild parts of it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llama_jax.config import UserError
from llama_jax.tokenizers.base import RULE_FILE, SETTINGS_FILE, Tokenizer
from llama_jax.tokenizers.pieces import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Piece, read_options, read_pieces
from llama_jax.tokenizers.settings import KEYS, SPECIAL_MAP_FILE, Added, Settings

CLASS = "PreTrainedTokenizerFast"
# Keys of a tokenizer_config.json that speak of other classes, of files, or of what is written anew.
DROPPED = (
    "auto_map", "backend", "extra_ids", "fast_tokenizer_files", "init_inputs", "is_local", "legacy", "name_or_path",
    "processor_class", "sp_model_kwargs", "special_tokens_map_file", "tokenizer_file", "vocab_file",
)  # fmt: skip


def exported(
    tokenizer: Tokenizer, data: dict[str, Any], settings: Settings, *, keeps_processor: bool = False
) -> dict[str, bytes]:
    """Return the files of `tokenizer`, whose `tokenizer.json` is `data`: its own, and the settings that go with it.

    The post-processor puts the ids of `tokenizer`'s rule around a text, unless it `keeps_processor`.
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
    config |= {"tokenizer_class": CLASS, "added_tokens_decoder": decoder, **special}
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


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _template(prefix: Sequence[int], suffix: Sequence[int], names: Mapping[int, str]) -> dict[str, Any] | None:
    """The post-processor that puts `prefix` and `suffix` around a text, as JSON; None where there are none."""
    if not prefix and not suffix:
        return None

    def of(ids: Sequence[int], kind: int) -> list[dict[str, Any]]:
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


def sentencepiece_json(model_file: bytes, added: Mapping[int, Added], *, prefixes_first_only: bool) -> dict[str, Any]:
    """Return the `tokenizer.json` that does what a SentencePiece model and the tokens `added` to it, by id, do.

    `prefixes_first_only`: no space is put before the text behind an added token.
    Raises UserError for a model of words or characters, and for one whose spaces end words.
    """
    pieces, options = read_pieces(model_file), read_options(model_file)
    if options.algorithm not in (1, 2) or not options.plain:
        raise UserError("this SentencePiece model can have no tokenizer.json: only BPE and unigram models that mark "
                        "the beginning of words can be exported")  # fmt: skip
    size = max([len(pieces), *(i + 1 for i in added)])
    # Ids that stand for nothing need a name, too.
    pieces += [Piece(f"<unused_{i}>", 0.0, CONTROL) for i in range(len(pieces), size)]
    for i, token in added.items():
        pieces[i] = Piece(token.content, 0.0, CONTROL)
    defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    unk_id = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), 0)
    if options.algorithm == 1:
        vocabulary = [(piece.text, piece.score) for piece in pieces]
        model = models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=options.byte_fallback)
    else:
        model = models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=merges(pieces),
            unk_token=pieces[unk_id].text,
            fuse_unk=True,
            byte_fallback=options.byte_fallback,
            ignore_merges=bool(defined),  # words of their own, below
        )
    made = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(options.charsmap)] if options.charsmap else []
    if options.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    first_only = options.add_dummy_prefix and prefixes_first_only
    if first_only:
        # Metaspace puts no space before a text that has one: SentencePiece does.
        steps += [normalizers.Replace(Regex(r"\A "), "  "), normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2)]
    else:
        steps += [normalizers.Prepend(SPACE)] if options.add_dummy_prefix else []
        steps += [normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    splits: list[Any] = [pre_tokenizers.Metaspace(prepend_scheme="first", split=False)] if first_only else []
    if defined:
        longest = sorted(defined, key=len, reverse=True)
        splits.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest))), "isolated"))
    if options.algorithm == 1 and options.byte_fallback:
        # The name of a byte, written out, is no byte.
        splits.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    if splits:
        made.pre_tokenizer = pre_tokenizers.Sequence(splits)  # type: ignore[assignment]
    strips = options.add_dummy_prefix or options.remove_extra_whitespaces
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if strips else [])
    )
    options_of = {token.content: token for token in added.values()}
    control = (Added(piece.text, special=True) for piece in pieces if piece.kind == CONTROL)
    tokens = (options_of.get(token.content, token) for token in control)
    # Not normalized: a space would be put before their names.
    made.add_tokens([AddedToken(**vars(dataclasses.replace(token, normalized=False))) for token in tokens])
    made.add_special_tokens([AddedToken(pieces[unk_id].text, special=True, normalized=False)])
    return json.loads(made.to_str())


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Return the merges of byte-pair encoding that give what SentencePiece's scores give.

    SentencePiece joins the neighbours whose union has the greatest score, so every way to cut a piece in two known
    ones is a merge; of equal ones those with the longer left part come first, as the leftmost neighbours do.
    """
    known = {piece.text for piece in pieces if piece.kind == NORMAL}
    found = []
    for piece in pieces:
        if piece.kind == NORMAL:
            text = piece.text
            cuts = (i for i in range(len(text) - 1, 0, -1) if text[:i] in known and text[i:] in known)
            found += [(-piece.score, text[:cut], text[cut:]) for cut in cuts]
    found.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in found]
