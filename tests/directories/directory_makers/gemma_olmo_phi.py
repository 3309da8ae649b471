"""Directories of Gemma 2 and 3 (SentencePiece with its own whitespace), OLMo 2 and Phi-3 (tokens that take spaces)."""

import json
from typing import Any

from directory_makers import tokenizer_files as files
from directory_makers.cases import (
    CHAT,
    DECODER,
    LLAMA3_SPLIT,
    LLAMA_SETTINGS,
    LLAMA_SPECIAL,
    SYSTEM,
    Case,
    decoder_table,
    fast,
    llama_model,
    named,
)
from directory_makers.tokenizer_files import added, as_json
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
RUNS = ("\n", "\n\n", "▁▁", "▁▁▁")
GEMMA_TURNS = (
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% set rest, first = messages, '' %}" + GEMMA_TURNS
)
GEMMA3_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set rest, first = messages[1:], messages[0]['content'] + '\n\n' %}"
    "{% else %}{% set rest, first = messages, '' %}{% endif %}" + GEMMA_TURNS
)
OLMO2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '' if loop.last and m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)


def gemma_json(model: bytes) -> str:
    """tokenizer.json of Gemma: spaces are kept as ▁, none is put before, runs of them and of newlines are tokens."""
    vocab = {piece: i for i, (piece, _) in enumerate(files.pieces(model))}
    pairs = [
        (vocab[piece], vocab[piece[:i]], vocab[piece[i:]], (piece[:i], piece[i:]))
        for piece in vocab
        for i in range(1, len(piece))
        if piece not in (*GEMMA_SPECIAL, *TURNS) and piece[:i] in vocab and piece[i:] in vocab
    ]
    merges = [pair for *_, pair in sorted(pairs)]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*GEMMA_SPECIAL, *TURNS]])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in RUNS])
    tokenizer.post_processor = files.template(tokenizer, ("<bos>",))
    return tokenizer.to_str(pretty=True) + "\n"


def gemma(kind: str, template: str, config: dict[str, Any], conversation: tuple[dict[str, str], ...]) -> Case:
    model = files.sentencepiece_model(
        340,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        add_dummy_prefix=False,
        user_defined_symbols=[*TURNS, *RUNS],
    )
    names = [piece for piece, _ in files.pieces(model)]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(names.index(name)): added(name) | {"special": name not in RUNS}
            for name in (*GEMMA_SPECIAL, *TURNS, *RUNS)
        },
        "additional_special_tokens": list(TURNS),
        "bos_token": "<bos>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 8192,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    tokenizer = {
        "tokenizer.model": model,
        "tokenizer.json": gemma_json(model),
        "tokenizer_config.json": as_json(settings),
    }
    usual = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": False}
    config = named(DECODER | usual | {"pad_token_id": 0} | config)
    return Case(kind, config, tokenizer, ("<eos>", "<end_of_turn>"), conversations=(conversation,))


def gemma2() -> Case:
    return gemma("Gemma2ForCausalLM", GEMMA2_CHAT, {}, CHAT)


def gemma3() -> Case:
    return gemma("Gemma3ForCausalLM", GEMMA3_CHAT, {"sliding_window_pattern": 2}, SYSTEM)


def olmo2() -> Case:
    """Bytes, split as Llama 3's; no token before a text, but one before a conversation."""
    names = ("<|endoftext|>", "<|pad|>")
    tokenizer = files.byte_level(60, (), names, pattern=LLAMA3_SPLIT)
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder_table(tokenizer, names),
        "bos_token": "<|endoftext|>",
        "chat_template": OLMO2_CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 4096,
        "pad_token": "<|pad|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    return Case(
        "Olmo2ForCausalLM",
        named(DECODER),
        fast(settings, tokenizer) | files.gpt2_files(tokenizer),
        ("<|endoftext|>", "."),
        conversations=(SYSTEM,),
    )


def phi3() -> Case:
    """Llama 2's pieces with more tokens, which take the spaces behind them; no token before a text."""
    model, extra = llama_model(), ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    data = json.loads(files.llama_json(model, (), LLAMA_SPECIAL, extra, legacy=True))
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] in extra
    table = {str(token.pop("id")): token for token in json.loads(json.dumps(data["added_tokens"]))}
    settings = LLAMA_SETTINGS | {"add_bos_token": False, "added_tokens_decoder": table, "chat_template": PHI3_CHAT}
    settings |= {"bos_token": "<s>", "eos_token": "<|endoftext|>", "legacy": False, "pad_token": "<|endoftext|>"}
    tokenizer = {
        "tokenizer.model": model,
        "tokenizer.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
        "tokenizer_config.json": as_json(settings | {"unk_token": "<unk>"}),
        "added_tokens.json": as_json({name: 340 + i for i, name in enumerate(extra)}),
    }
    config = DECODER | {"pad_token_id": 340, "sliding_window": 8, "tie_word_embeddings": True}
    return Case(
        "Phi3ForCausalLM",
        named(config),
        tokenizer,
        ("<|endoftext|>", "<|end|>"),
        texts=("the river sees a house", "Anna's letter, and then the king (at 12:30)\n\nslept."),
        conversations=(CHAT,),
    )


CASES = {make.__name__: make for make in (gemma2, gemma3, olmo2, phi3)}
