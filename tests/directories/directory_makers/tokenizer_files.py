"""Tiny tokenizers as the files that releases have, by name; trained on a text that is made here."""

import io
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece
from transformers.convert_slow_tokenizer import SentencePieceExtractor

Files = dict[str, str | bytes]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{%- for message in messages -%}<|{{ message.role }}|>\n{{ message.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# GLM-4.5: thoughts of earlier answers are left out, an empty pair of marks stays.
GLM45 = """[gMASK]<sop>
{%- macro shown(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set asked = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set text = shown(m.content) -%}
{%- if m.role == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
<|assistant|>
{%- if thought and loop.index0 > asked.last -%}{{ '\n<think>' + thought.strip() + '</think>' }}
{%- else -%}{{ '\n<think></think>' }}{%- endif -%}
{%- if text.strip() -%}{{ '\n' + text.strip() }}{%- endif -%}
{%- else -%}
<|{{ m.role }}|>
{{ text }}
{%- if m.role == 'user' and enable_thinking is defined and not enable_thinking -%}{{ '/nothink' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking -%}{{ '\n<think></think>' }}{%- endif -%}
{%- endif -%}"""
# DeepSeek-R1: the system's message first, answers without their thoughts, and a thought begun.
DEEPSEEK_R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set found = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set found.system = message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ found.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# V3.1: thinks where it is asked to, and else begins with the end of a thought.
DEEPSEEK_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- else %}"
    "{{ '<｜Assistant｜></think>' + message['content'].split('</think>', 1)[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif %}{%- endfor -%}{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
    "{{ '<think>' if thinking else '</think>' }}{%- endif %}"
)
# Harmony's conversations (OpenAI 2025): what the release's template makes of messages and tools, in fewer words. The
# date is a constant, which strftime leaves as it is.
HARMONY = """\
{%- macro of_type(spec) -%}
    {%- if spec.type == "array" -%}
        {{- of_type(spec['items']) + "[]" -}}
    {%- elif spec.enum is defined -%}
        {%- for value in spec.enum -%}{{- value | tojson -}}{%- if not loop.last %} | {% endif -%}{%- endfor -%}
    {%- elif spec.type == "integer" -%}
        number
    {%- else -%}
        {{- spec.type or "any" -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro message(role, channel, content, end) -%}
    {{- "<|start|>" + role -}}
    {%- if channel -%}{{- "<|channel|>" + channel -}}{%- endif -%}
    {{- "<|message|>" + content + end -}}
{%- endmacro -%}
{%- set system -%}
    {{- "You are a little model.\\nKnowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("2025-06-28") -}}
    {{- "\\n\\nReasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") -}}
    {{- "\\n\\n# Valid channels: analysis, commentary, final." -}}
{%- endset -%}
{{- message("system", none, system, "<|end|>") -}}
{%- if messages[0].role in ["system", "developer"] -%}
    {%- set instructions, rest = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set instructions, rest = none, messages -%}
{%- endif -%}
{%- if instructions or tools -%}
    {%- set text = namespace(value="") -%}
    {%- if instructions -%}{%- set text.value = "# Instructions\\n\\n" + instructions -%}{%- endif -%}
    {%- for tool in tools or [] -%}
        {%- set function = tool.function -%}
        {%- set text.value = text.value + "\\n\\n// " + function.description -%}
        {%- set text.value = text.value + "\\ntype " + function.name + " = (_: {" -%}
        {%- for name, spec in function.parameters.properties.items() -%}
            {%- set text.value = text.value + name + ": " + of_type(spec) + "," -%}
        {%- endfor -%}
        {%- set text.value = text.value + "}) => any;" -%}
    {%- endfor -%}
    {{- message("developer", none, text.value, "<|end|>") -}}
{%- endif -%}
{%- set last_call = namespace(name=none) -%}
{%- for m in rest -%}
    {%- if m.role == "assistant" and "<|channel|>" in (m.content or "") -%}
        {{- raise_exception("An answer has the text of its final channel alone.") -}}
    {%- elif m.role == "assistant" and m.tool_calls -%}
        {%- set call = m.tool_calls[0].function -%}
        {%- set last_call.name = call.name -%}
        {{- message("assistant to=functions." + call.name, "commentary json", call.arguments | tojson, "<|call|>") -}}
    {%- elif m.role == "assistant" -%}
        {%- set closes = loop.last and not add_generation_prompt -%}
        {{- message("assistant", "final", m.content, "<|return|>" if closes else "<|end|>") -}}
    {%- elif m.role == "tool" -%}
        {{- message("functions." + last_call.name + " to=assistant", "commentary", m.content | tojson, "<|end|>") -}}
    {%- else -%}
        {{- message(m.role, none, m.content, "<|end|>") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""
TOOLS = "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}" + CHATML


# NFKC would be 240 kB in every file.
NORMALIZED = (("ﬁ", "fi"), ("Ａ", "A"), ("\u00a0", " "), ("\n", " "), ("\t", " "), ("…", "..."))

BERT_NAMES = ("UNK", "CLS", "SEP", "PAD", "MASK")


def sentences(count: int = 400) -> list[str]:
    """Sentences of a little language, every one different."""
    draw = random.Random(0)
    names = ["the river", "a house", "Anna", "the old man", "an hour", "the sea", "Tom", "a letter", "the king"]
    verbs = ["sees", "finds", "was near", "has lost", "went to", "did not like", "can't hear", "will open"]
    ends = [".", "!", "?", ", and then slept.", " in 1905.", " (at 12:30).", "; he's here.", " - so it was."]
    return [f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}{draw.choice(ends)}" for _ in range(count)]


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def added(name: str, *, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False, "special": special}
    return {"content": name} | flags


def written(name: str, **flags: bool) -> dict[str, Any]:
    """A named token as tokenizer_config.json has it where there is no table of added tokens."""
    return {"__type": "AddedToken"} | added(name, normalized=True) | flags


# -- SentencePiece


def sentencepiece_model(vocab_size: int, **options: Any) -> bytes:
    """A model's file; by default as Llama's: BPE, bytes, the text as it is."""
    llama = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    }
    file = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        if options.pop("normalized", False):
            llama |= {"normalization_rule_tsv": rules.name, "normalization_rule_name": ""}
            rules.write("".join(f"{ord(old):X}\t{' '.join(f'{ord(c):X}' for c in new)}\n" for old, new in NORMALIZED))
            rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_writer=file,
            vocab_size=vocab_size,
            num_threads=1,
            minloglevel=2,
            **(llama | options),
        )
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    model.normalizer_spec.ClearField("normalization_rule_tsv")  # a temporary file's name
    return model.SerializeToString()


def normalization(model: bytes) -> bytes:
    """The table of characters that a model replaces."""
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        return SentencePieceExtractor(file.name).proto.normalizer_spec.precompiled_charsmap


def pieces(model: bytes) -> list[tuple[str, float]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]


def llama_json(
    model: bytes, prefix: Sequence[str], special: Sequence[str], extra: Sequence[str] = (), *, legacy: bool
) -> str:
    """tokenizer.json of a SentencePiece BPE model as transformers 4 wrote it; `extra` are added behind the model's.

    Where it is `legacy`, a space is put before what stands behind a special token too.
    """
    vocab = {piece: i for i, (piece, _) in enumerate(pieces(model))}
    pairs = [
        (vocab[piece], vocab[piece[:i]], vocab[piece[i:]], (piece[:i], piece[i:]))
        for piece in vocab
        for i in range(1, len(piece))
        if piece not in special and piece[:i] in vocab and piece[i:] in vocab
    ]
    merges = [pair for *_, pair in sorted(pairs)]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*special, *extra]])
    tokenizer.post_processor = template(tokenizer, prefix)
    return tokenizer.to_str(pretty=True) + "\n"


def template(tokenizer: Tokenizer, prefix: Sequence[str], suffix: Sequence[str] = ()) -> Any:
    single, names = [*prefix, "$A", *suffix], {*prefix, *suffix}
    pair = [*prefix, "$A", *suffix, *(f"{name}:1" for name in prefix), "$B:1", *(f"{name}:1" for name in suffix)]
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, tokenizer.token_to_id(name)) for name in sorted(names)]
    )


def t5_json(model: bytes, sentinels: int = 100) -> str:
    """tokenizer.json of T5: its sentinels behind the model's pieces, from the last to the first."""
    extra = [f"<extra_id_{i}>" for i in range(sentinels)]
    vocab = pieces(model) + [(name, 0.0) for name in reversed(extra)]
    tokenizer = Tokenizer(models.Unigram(vocab, 2))
    tokenizer.normalizer = normalizers.Precompiled(normalization(model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    special = ["<pad>", "</s>", "<unk>", *extra]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.post_processor = template(tokenizer, (), ("</s>",))
    return tokenizer.to_str(pretty=True) + "\n"


def xlm_roberta_json(model: bytes) -> str:
    """tokenizer.json of XLM-RoBERTa: fairseq's special tokens before the pieces, and the mask."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *pieces(model)[3:], ("<mask>", 0.0)], 3))
    tokenizer.normalizer = normalizers.Precompiled(normalization(model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = template(tokenizer, ("<s>",), ("</s>",))
    return tokenizer.to_str(pretty=True) + "\n"


def modernbert_json() -> str:
    """tokenizer.json of ModernBERT: OLMo's bytes, runs of spaces as added tokens, and BERT's names."""
    tokenizer = byte_level(60, ("|||IP_ADDRESS|||", "<|padding|>"), ordinary=["    ", "   ", "  "])
    tokenizer.normalizer = normalizers.NFC()
    names = [AddedToken(f"[{name}]", lstrip=name == "MASK", normalized=False) for name in BERT_NAMES]
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False), *names])
    tokenizer.post_processor = template(tokenizer, ("[CLS]",), ("[SEP]",))
    return tokenizer.to_str(pretty=True) + "\n"


def marian_files(vocab_size: int) -> Files:
    """Two SentencePiece models that share one vocabulary: </s> first, <pad> last."""
    options = {"model_type": "unigram", "byte_fallback": False, "bos_id": -1, "eos_id": 0, "unk_id": 1, "pad_id": -1}
    options |= {"normalized": True, "remove_extra_whitespaces": True, "hard_vocab_limit": False}
    source = sentencepiece_model(vocab_size, **options)
    target = sentencepiece_model(vocab_size - 20, **options)
    names = ["</s>", "<unk>", *sorted({piece for piece, _ in pieces(source) + pieces(target)} - {"</s>", "<unk>"})]
    vocab = {name: i for i, name in enumerate([*names, "<pad>"])}
    return {"source.spm": source, "target.spm": target, "vocab.json": as_json(vocab)}


# -- byte-level BPE


def byte_level(
    merges: int,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    *,
    pattern: str | None = None,
    digits: bool = False,
    prefix: Sequence[str] = (),
    suffix: Sequence[str] = (),
    ordinary: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer of bytes; special tokens stand before (`first`) or behind (`last`) what is learned.

    `pattern` splits the text in place of GPT-2's, `digits` one by one before it; `ordinary` are added, and text.
    """
    tokenizer = Tokenizer(BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        steps += [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 256 + merges,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*first, *last]])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ordinary])
    if prefix or suffix:
        tokenizer.post_processor = template(tokenizer, prefix, suffix)
    return tokenizer


def split_by(*patterns: str) -> Any:
    """Bytes of texts that are split by one pattern after another."""
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2_files(tokenizer: Tokenizer) -> Files:
    """`vocab.json` and `merges.txt` of a byte-level tokenizer; only tokens of its model are in them."""
    model = json.loads(tokenizer.to_str())["model"]
    added_names = {token["content"] for token in json.loads(tokenizer.to_str())["added_tokens"]}
    vocab = {name: i for name, i in model["vocab"].items() if name not in added_names or i < 256}
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    return {"vocab.json": as_json(vocab), "merges.txt": "#version: 0.2\n" + merges}


def roberta_like(merges: int) -> Tokenizer:
    """BART's and RoBERTa's: <s>, <pad>, </s>, <unk> first, <mask> last, and <s> .. </s> around a text."""
    tokenizer = byte_level(merges, ("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")), True, False
    )
    return tokenizer


# -- WordPiece


def wordpiece(vocab_size: int) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sorted(sentences()), trainer)
    return tokenizer


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
