"""Directories as Mistral and Qwen release them."""

import base64
from typing import Any

from directory_makers import tokenizer_files as files
from directory_makers.cases import (
    CHAT,
    DECODER,
    NO_LEADING_SPACE,
    SYSTEM,
    TEXTS,
    Case,
    decoder_table,
    fast,
    fixed,
    named,
)
from directory_makers.tokenizer_files import Files, added, as_json
from tokenizers import normalizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML with a system text of its own where there is none, tools, and answers that call them.
QWEN2_5 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content if messages[0].role == 'system' else 'You are near the river.' }}
    {{- '\\n\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are near the river.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or
        (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# What was thought before the last question is left out; an empty thought where thinking is switched off.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content, thought = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
# Mistral's third: the system text goes into the last question; a token ends a question.
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate.") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- " " + message["content"] | trim + eos_token }}{%- endif %}
{%- endfor %}
"""
MISTRAL_V7 = """{{- '<s>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- else %}{{- message.content + '</s>' }}{%- endif %}
{%- endfor %}
"""
QWEN_NAMES, QWEN_TEXTS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool_call>", "<think>", "</think>")


def qwen_tokenizer() -> Any:
    tokenizer = files.byte_level(50, (), QWEN_NAMES, pattern=QWEN_SPLIT, ordinary=QWEN_TEXTS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    return tokenizer


def qwen_settings(tokenizer: Any) -> dict[str, Any]:
    table = decoder_table(tokenizer, QWEN_NAMES)
    table |= {str(tokenizer.token_to_id(name)): added(name, special=False) for name in QWEN_TEXTS}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": table,
        "additional_special_tokens": list(QWEN_NAMES[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


QWEN_TEXT = (*TEXTS, "the se\u0301a")  # becomes one letter
STOPS = ("<|im_end|>", "<|endoftext|>")


def qwen2() -> Case:
    """Qwen2.5: all three files of the tokenizer, and a vocabulary padded beyond it."""
    tokenizer = qwen_tokenizer()
    return Case(
        "Qwen2ForCausalLM",
        fixed(DECODER | {"tie_word_embeddings": True}),
        fast(qwen_settings(tokenizer) | {"chat_template": QWEN2_5}, tokenizer) | files.gpt2_files(tokenizer),
        STOPS,
        config_stops=STOPS[:1],
        conversations=(CHAT, SYSTEM),
        texts=QWEN_TEXT,
        extra_rows=4,
    )


def qwen3() -> Case:
    """Qwen3 without a tokenizer.json."""
    tokenizer = qwen_tokenizer()
    settings = {"tokenizer_config.json": as_json(qwen_settings(tokenizer)), "chat_template.jinja": QWEN3}
    thought = {"role": "assistant", "content": "<think>\nwas it?\n</think>\n\nan hour."}
    return Case(
        "Qwen3ForCausalLM",
        fixed(DECODER | {"tie_word_embeddings": True, "head_dim": 8}),
        files.gpt2_files(tokenizer) | settings,
        STOPS,
        config_stops=STOPS[:1],
        texts=QWEN_TEXT,
        conversations=(SYSTEM, (CHAT[0], thought, CHAT[2])),
    )


CONTROL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[control_8]")


def mistral() -> Case:
    """Mistral 7B v0.3: control tokens behind the first three."""
    model = files.sentencepiece_model(346, control_symbols=list(CONTROL))
    special = ("<unk>", "<s>", "</s>", *CONTROL)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {str(i): added(name) for i, name in enumerate(special)},
        "bos_token": "<s>",
        "chat_template": MISTRAL_V3,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    tokenizer: Files = {
        "tokenizer.json": files.llama_json(model, ("<s>",), special, legacy=True),
        "tokenizer.model": model,
        "tokenizer_config.json": as_json(settings),
    }
    return Case(
        "MistralForCausalLM",
        named(DECODER | {"sliding_window": None, "tie_word_embeddings": True}),
        tokenizer,
        ("</s>", "."),
        texts=NO_LEADING_SPACE,
        conversations=(CHAT, SYSTEM),
    )


def mistral_tekken() -> Case:
    """Mistral's newer releases: tekken.json and no other file of a tokenizer, and a window shorter than the texts."""
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    learned = files.json.loads(files.byte_level(60, pattern=TEKKEN_SPLIT).to_str())["model"]["vocab"]
    byte = {letter: i for i, letter in bytes_to_unicode().items()}
    # tiktoken's order: the bytes, then tokens in the order of their merges.
    tokens = sorted((bytes(byte[c] for c in token) for token in learned), key=lambda token: len(token) > 1)
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    sizes = {"default_num_special_tokens": 12, "default_vocab_size": 12 + len(tokens), "num_vocab_tokens": len(tokens)}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    data = {"config": {"pattern": TEKKEN_SPLIT, "version": "v7"} | sizes, "special_tokens": special, "vocab": vocab}
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    found = {
        "chat_template.jinja": MISTRAL_V7,
        "tekken.json": files.json.dumps(data) + "\n",
        "tokenizer_config.json": as_json(settings),
    }
    return Case(
        "MistralForCausalLM",
        fixed(DECODER | {"bos_token_id": 1, "sliding_window": 6, "tie_word_embeddings": True}),
        found,
        ("</s>",),
        conversations=(SYSTEM,),
    )


CASES = {make.__name__: make for make in (qwen2, qwen3, mistral, mistral_tekken)}
