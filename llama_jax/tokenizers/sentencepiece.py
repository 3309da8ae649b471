"""SentencePiece models, and llama2.c's tokenizers, which are SentencePiece models in another file format."""

import codecs
import dataclasses
import functools
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, override

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llama_jax.config import Json, UserError
from llama_jax.tokenizers.base import TextStream, Tokenizer
from llama_jax.tokenizers.borders import piece_border
from llama_jax.tokenizers.checking import SPACE as SPACE, check_model
from llama_jax.tokenizers.fairseq import ModelProto, in_fairseq_order
from llama_jax.tokenizers.settings import GENERIC, Added, Settings, exported

Kind: Any = ModelProto.SentencePiece
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CHATGLM, CLASS_FILES = "ChatGLMTokenizer", ("spiece.model", "sentencepiece.bpe.model")
MT5_SENTINEL = re.compile(rf"{SPACE}<extra_id_\d+>")  # a piece that begins with a space
# In the order of their ids, the first after the model's last piece; those of roles follow.
CHATGLM_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM3_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (BPE or unigram), given as the content of its file, with the tokens added to it.

    With byte fallback and identity normalization (Llama's settings) every string survives encode and decode, except
    that U+2581 becomes a space. `settings` name special tokens and add tokens, and their class may have more: T5's
    sentinels, ChatGLM2's `CHATGLM_SPECIAL`, whose prompts and documents begin with [gMASK] and sop, and ChatGLM3's
    roles where a file names one. `file_name` is the model's. Raises RuntimeError where `model` is no such model.
    """

    def __init__(self, model: bytes, settings: Settings | None = None, file_name: str = "tokenizer.model"):
        self._settings = settings = settings or Settings()
        self.files = {file_name: model, **settings.files}
        model = in_fairseq_order(model) if settings.rules.fairseq else model
        self._processor = _processor(model)
        self._model = ModelProto.FromString(model)
        pieces = self._model.pieces
        self._added = _added(pieces, settings)
        if any(i < len(pieces) for i in self._added):
            # A piece that is an added token now must not be found in ordinary text.
            self._processor = _processor(_without_text(self._model, self._added).SerializeToString())
        self._text_tokens = AddedTokens({i: token for i, token in self._added.items() if not token.special})
        self.vocab_size = max([len(pieces) - 1, *self._added]) + 1
        kinds = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
        added = {i: token.content for i, token in self._added.items()}
        special = {i: piece.piece for i, piece in enumerate(pieces) if piece.type in kinds} | added
        self.special_tokens = {name: i for i, name in sorted(special.items())}
        ids = {piece.piece: i for i, piece in enumerate(pieces)} | {name: i for i, name in added.items()}
        self.bos_id = _named(settings, "bos_token", ids, self._processor.bos_id())
        self.pad_id = _named(settings, "pad_token", ids, self._processor.pad_id())
        self.unk_id = self._processor.unk_id()
        eos_id = _named(settings, "eos_token", ids, self._processor.eos_id())
        self.eos_ids = () if eos_id is None else (eos_id,)
        if settings.class_name == CHATGLM:
            self.bos_id, self.pad_id = ids["sop"], self.unk_id
            self.start_ids = (ids["[gMASK]"], ids["sop"])
            self.eos_ids += tuple(ids[name] for name in ("<|user|>", "<|observation|>") if name in ids)

    @functools.cached_property
    @override
    def border(self) -> re.Pattern[str] | None:
        return piece_border(self._model, self._text_tokens.by_content, self._processor.normalize)

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config, (prefix, suffix) = self._settings.config, (self._settings.rules.prefix, self._settings.rules.suffix)
        add_bos, add_eos = config.get("add_bos_token", prefix or not suffix), config.get("add_eos_token") or suffix
        return (self.start_ids if add_bos else ()), (self.eos_ids if add_eos else ())

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._text_tokens:
            return [self._join(self._text_tokens.split(text)) for text in texts]
        num_threads = int(os.environ.get("LLAMA_JAX_TOKENIZER_THREADS", "-1"))  # -1: all cores
        return self._processor.encode(list(texts), num_threads=num_threads)

    def _encode_special(self, text: str) -> list[int]:
        self.check_text(text)
        return self._join(self._all_tokens.split(text))

    @functools.cached_property
    def _all_tokens(self) -> "AddedTokens":
        special = {i: Added(name, special=True) for name, i in self.special_tokens.items() if i != self.unk_id}
        return AddedTokens(special | self._added)

    def _join(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of texts and of the added tokens between them."""
        first = [part for part in parts[:1] if isinstance(part, str)]
        others = [part for part in parts[1:] if isinstance(part, str)]
        plain = self._inner if self._prefixes_first_only else self._processor
        encoded = iter([*self._processor.encode(first), *plain.encode(others)])
        ids: list[int] = []
        for part in parts:
            ids += next(encoded) if isinstance(part, str) else [part]
        return ids

    @functools.cached_property
    def _prefixes_first_only(self) -> bool:
        """True where no space is put before the text after an added token: transformers' Llama with `legacy` off."""
        is_llama = self._settings.class_name in ("LlamaTokenizer", "CodeLlamaTokenizer")
        return is_llama and not self._settings.config.get("legacy", False)

    @functools.cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the space that it puts before a text."""
        model = _without_text(self._model, self._added)
        model.normalizer_spec.add_dummy_prefix = False
        return _processor(model.SerializeToString())

    @override
    def stream(self) -> "_PieceStream":
        return _PieceStream(self)

    @override
    def export_files(self) -> dict[str, bytes]:
        data = sentencepiece_json(self._model, self._added, prefixes_first_only=self._prefixes_first_only)
        return exported(self, data, self._settings)

    @functools.cached_property
    @override
    def token_bytes(self) -> list[bytes]:
        """Text of every id in UTF-8, with the leading space that decoding may drop; nothing for special tokens."""
        pieces = [self._text(i, piece) for i, piece in enumerate(self._model.pieces)]
        pieces += [b""] * (self.vocab_size - len(pieces))
        for i, token in self._added.items():
            pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    def _text(self, i: int, piece: Any) -> bytes:
        if piece.type == Kind.CONTROL:
            return b""
        if piece.type == Kind.BYTE:  # <0x0A>
            return bytes([int(piece.piece[3:5], 16)])
        if piece.type == Kind.UNKNOWN:
            # transformers' classes take it for a special token, SentencePiece writes " \u2047 ".
            return self._processor.decode([i]).encode() if self._settings.class_name is None else b""
        return piece.piece.replace(SPACE, " ").encode()

    @functools.cached_property
    def leading_spaces(self) -> tuple[bool, bool]:
        """Two flags: decoding drops the first space (which the encoder put there), and drops all leading ones."""
        model = self._processor
        spaced = next((i for i in range(len(self._model.pieces)) if self.starts_with_space(i)), None)
        if spaced is None:
            return False, False
        strips = model.decode([spaced]) != model.id_to_piece(spaced).replace(SPACE, " ")
        space = model.piece_to_id(SPACE)
        return strips, strips and model.id_to_piece(space) == SPACE and not model.decode([space, space])

    def starts_with_space(self, token_id: int) -> bool:
        """Return whether the piece begins with a space."""
        known = token_id not in self._added and token_id < len(self._model.pieces)
        return known and self._model.pieces[token_id].piece.startswith(SPACE)


class AddedTokens:
    """Tokens by id that are found in a text before a model splits the rest of it."""

    def __init__(self, tokens: Mapping[int, Added]):
        self.by_content = {token.content: (i, token) for i, token in tokens.items()}
        # Of several at one place the longest is found.
        longest_first = sorted(tokens.values(), key=lambda token: -len(token.content))
        forms = [(re.escape(token.content), token.single_word) for token in longest_first]
        self._pattern = re.compile("|".join(rf"(?<!\w){form}(?!\w)" if word else form for form, word in forms))

    def __bool__(self) -> bool:
        return bool(self.by_content)

    def split(self, text: str) -> list[str | int]:
        """Return the ids of the tokens in `text`, and the texts between them."""
        parts: list[str | int] = []
        end, strips = 0, False
        for match in self._pattern.finditer(text) if self else ():
            i, token = self.by_content[match[0]]
            between = text[end : match.start()]
            between = between.lstrip() if strips else between
            parts += [between.rstrip() if token.lstrip else between, i]
            end, strips = match.end(), token.rstrip
        return [part for part in (*parts, text[end:].lstrip() if strips else text[end:]) if part != ""]


def _added(pieces: Sequence[Any], settings: Settings) -> dict[int, Added]:
    """Return the tokens that are added to `pieces` or change one of them, by id."""
    added = {i: Added(p.piece[1:], special=True) for i, p in enumerate(pieces) if MT5_SENTINEL.fullmatch(p.piece)}
    added |= settings.added
    names: Sequence[str] = ()
    if settings.class_name == CHATGLM:  # whose files may name some of them
        roles = CHATGLM3_ROLES if {token.content for token in added.values()} & {*CHATGLM3_ROLES} else ()
        added |= {i: Added(name, special=True) for i, name in enumerate(CHATGLM_SPECIAL + roles, len(pieces))}
    elif settings.rules.suffix and not settings.rules.fairseq:  # T5
        if type(number := settings.config.get("extra_ids", 100)) is not int or not 0 <= number < 1 << 16:
            raise ValueError(f"extra_ids={number!r} is no number of tokens")
        names = [f"<extra_id_{i}>" for i in reversed(range(number))]
    known = {piece.piece for piece in pieces} | {token.content for token in added.values()}
    more = [Added(name, special=True) for name in names if name not in known]
    more += [token for name, token in settings.named().items() if name not in known.union(names)]
    first = max([len(pieces) - 1, *added]) + 1
    added |= {first + i: token for i, token in enumerate(more)}

    def changes(i: int, token: Added) -> bool:
        piece = pieces[i]
        return piece.piece != token.content or (token.special and piece.type not in (Kind.UNKNOWN, Kind.CONTROL))

    return {i: token for i, token in added.items() if i >= len(pieces) or changes(i, token)}


def _named(settings: Settings, key: str, ids: Mapping[str, int], token_id: int) -> int | None:
    """Return the id of the token that `settings` name under `key`, the model's own `token_id` where they do not."""
    if key in settings.config or key in settings.special_map:
        name = settings.from_files(key)
        return None if name is None else ids.get(name)
    return None if token_id < 0 else token_id


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    check_model(model)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _without_text(model: Any, ids: Iterable[int]) -> Any:
    """Return a copy of `model` with the pieces `ids` made control pieces, which are never found in a text."""
    changed = ModelProto.FromString(model.SerializeToString())
    for i in ids:
        if i < len(changed.pieces):
            changed.pieces[i].type = Kind.CONTROL
    return changed


class _PieceStream(TextStream):
    def __init__(self, tokenizer: SentencePieceTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips, self._strips_all = tokenizer.leading_spaces

    def feed(self, token_id: int) -> str:
        text = self._tokenizer.token_bytes[self._tokenizer.check_id(token_id)]
        if self._strips and text:
            if self._tokenizer.starts_with_space(token_id):
                text = text[1:]
                self._strips = self._strips_all and not text
            else:
                self._strips = False
        return self._decoder.decode(text)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def sentencepiece_tokenizer(path: Path, content: bytes, settings: Settings) -> SentencePieceTokenizer:
    """Return the tokenizer of a SentencePiece model, read as the class that `settings` name reads it.

    A lone spiece.model is T5's where pad, eos and unk have the ids 0, 1, 2. Raises RuntimeError where `content` is not
    a model, ValueError for a class that gives the pieces other ids, and for a file of such a class.
    """
    processor, file_name = _processor(content), path.name
    if settings.class_name is None and file_name in CLASS_FILES:
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id())
        if file_name != "spiece.model" or ids != (0, 1, 2, -1):
            raise ValueError(
                f"{file_name} is read in another way by each of its classes (T5, ALBERT, XLNet, XLM-RoBERTa, mBART and "
                "others), and no tokenizer_config.json or config.json names one: give the tokenizer.json of the model"
            )
        settings = settings.as_class("T5Tokenizer")
    if settings.class_name is not None and not settings.rules.sentencepiece and settings.class_name not in GENERIC:
        raise ValueError(
            f"its class {settings.class_name} reads SentencePiece models in a way that is not known: give the "
            "tokenizer.json of the model"
        )
    return SentencePieceTokenizer(content, settings, file_name if file_name in CLASS_FILES else "tokenizer.model")


def llama2c_tokenizer(path: Path, content: bytes, settings: Settings) -> SentencePieceTokenizer | None:
    """Return the tokenizer of llama2.c's file, which is a SentencePiece model in another format; None for another file.

    The format (karpathy/llama2.c, tokenizer.py): int32 longest length, then float32 score, int32 length and the bytes
    of every piece, with spaces for U+2581 and line ends around the names of BOS and EOS.
    """
    model = ModelProto()
    position, longest = 4, 0
    while position < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, position)
            (piece,) = struct.unpack_from(f"{length}s", content, position + 8)
            model.pieces.add(piece=piece.decode(), score=score)
        except (struct.error, UnicodeDecodeError, OverflowError):
            return None
        position, longest = position + 8 + length, max(longest, length)
    if len(model.pieces) < 259 or content[:4] != struct.pack("<i", longest):
        return None
    for i, piece in enumerate(model.pieces):
        is_name = i in (1, 2)
        piece.type = Kind.UNKNOWN if i == 0 else Kind.CONTROL if is_name else Kind.BYTE if i < 259 else Kind.NORMAL
        piece.piece = piece.piece.strip("\n") if is_name else piece.piece.replace(" ", SPACE)
    model.trainer_spec.model_type, model.trainer_spec.vocab_size = BPE, len(model.pieces)
    model.trainer_spec.byte_fallback = True
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    return SentencePieceTokenizer(model.SerializeToString(), settings)


def with_dummy_prefix(model: bytes) -> bytes:
    """Return `model` with a space put before every text, as Llama has it: protobuf merges appended messages."""
    prefix = ModelProto()
    prefix.normalizer_spec.add_dummy_prefix = True
    return model + prefix.SerializeToString()


def sentencepiece_json(model: Any, added: Mapping[int, Added], *, prefixes_first_only: bool) -> Json:
    """Return the `tokenizer.json` that gives the ids of a SentencePiece model and the tokens `added` to it, by id.

    `prefixes_first_only`: no space is put before the text after an added token.
    Raises UserError for a model of words or characters, and for one whose spaces end words.
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    marks_beginnings = normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix
    if trainer.model_type not in (UNIGRAM, BPE) or not marks_beginnings:
        raise UserError("this SentencePiece model can have no tokenizer.json: only BPE and unigram models that mark "
                        "the beginning of words can be exported")  # fmt: skip
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    # Ids without a piece need a name, too.
    pieces += [(f"<unused_{i}>", 0.0, Kind.CONTROL) for i in range(len(pieces), max([-1, *added]) + 1)]
    for i, token in added.items():
        pieces[i] = (token.content, 0.0, Kind.CONTROL)
    defined = sorted((text for text, _, kind in pieces if kind == Kind.USER_DEFINED), key=len, reverse=True)
    unk_id = next((i for i, (_, _, kind) in enumerate(pieces) if kind == Kind.UNKNOWN), 0)
    fallback = trainer.byte_fallback
    if trainer.model_type == UNIGRAM:
        vocabulary = [(text, score) for text, score, _ in pieces]
        made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=fallback))
    else:
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab={text: i for i, (text, _, _) in enumerate(pieces)},
                merges=_merges({text: score for text, score, kind in pieces if kind == Kind.NORMAL}),
                unk_token=pieces[unk_id][0],
                fuse_unk=True,
                byte_fallback=fallback,
                ignore_merges=bool(defined),  # each is a word, by the split below
            )
        )
    first_only = normalizer.add_dummy_prefix and prefixes_first_only
    made.normalizer = _normalization(normalizer, first_only)  # type: ignore[assignment]
    splits: list[Any] = [pre_tokenizers.Metaspace(prepend_scheme="first", split=False)] if first_only else []
    if defined:
        splits.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, defined))), "isolated"))
    if trainer.model_type == UNIGRAM and fallback:
        # The name of a byte that is written out in a text is ordinary text.
        splits.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    if splits:
        made.pre_tokenizer = pre_tokenizers.Sequence(splits)  # type: ignore[assignment]
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    options = {token.content: token for token in added.values()}
    tokens = [options.get(text, Added(text, special=True)) for text, _, kind in pieces if kind == Kind.CONTROL]
    # Not normalized: a space would be put before their names.
    made.add_tokens([AddedToken(**vars(dataclasses.replace(token, normalized=False))) for token in tokens])
    made.add_special_tokens([AddedToken(pieces[unk_id][0], special=True, normalized=False)])
    return json.loads(made.to_str())


def _normalization(normalizer: Any, first_only: bool) -> normalizers.Sequence:
    steps: list[Any] = [normalizers.Precompiled(table)] if (table := normalizer.precompiled_charsmap) else []
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if first_only:
        # Metaspace puts no space before a text that has one: SentencePiece does.
        steps += [normalizers.Replace(Regex(r"\A "), "  "), normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2)]
    else:
        steps += [normalizers.Prepend(SPACE)] if normalizer.add_dummy_prefix else []
        steps += [normalizers.Replace(" ", SPACE)]
    return normalizers.Sequence(steps)


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges of byte-pair encoding that give the same as SentencePiece's scores, by piece.

    SentencePiece joins the neighbours whose union has the greatest score, so every way to cut a piece in two known
    ones is a merge; of equal ones those with the longer left part come first, as the leftmost neighbours do.
    """
    found = [
        (-score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: merge[0])]  # stable
