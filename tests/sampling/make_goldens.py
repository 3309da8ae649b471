"""Write goldens.json: what transformers makes of logits, prompts and conversations by the settings of released models.

    python tests/sampling/make_goldens.py

needs transformers 5.23 and torch, and runs in seconds on a CPU.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    __version__,
)

HERE = Path(__file__).parent
PARITY = HERE.parent / "parity" / "goldens"

# Settings as released files have them: BART, its summarizers, Marian, Whisper, Qwen2 and several at once.
SETTINGS: list[dict] = [
    {"forced_bos_token_id": 0},
    {"forced_eos_token_id": 2},
    {"forced_eos_token_id": [2, 5]},
    {"bad_words_ids": [[7], [2]]},
    {"bad_words_ids": [[3, 4], [5, 1, 6], [4], [1, 1, 1, 8]]},
    {"suppress_tokens": [0, 9, 11]},
    {"begin_suppress_tokens": [4, 5]},
    {"begin_suppress_tokens": [4, 5], "forced_bos_token_id": 3},
    {"min_length": 4},
    {"min_new_tokens": 2},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"repetition_penalty": 1.25},
    {"repetition_penalty": 0.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]], "min_length": 6,
     "forced_bos_token_id": 0, "forced_eos_token_id": 2, "suppress_tokens": [1], "begin_suppress_tokens": [6]},
]  # fmt: skip
VOCABULARY, EOS, MAX_NEW_TOKENS = 12, [2, 9], 4
TEXTS = {  # prompt length -> texts that begin with prompts of this length
    1: [[2], [2, 0], [2, 1, 1], [2, 3, 4, 3], [2, 5, 1, 5]],
    3: [[3, 4, 3], [5, 1, 5], [1, 1, 1], [5, 1, 5, 1], [4, 5, 4, 5, 4], [5, 5, 1, 5, 5, 1], [1, 1, 1, 1, 1, 1]],
}
GENERATED: list[tuple[str, dict]] = [
    ("bart", {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2,
              "pad_token_id": 1, "no_repeat_ngram_size": 3, "min_length": 8}),
    ("bart", {"eos_token_id": [2, 30], "decoder_start_token_id": 5, "pad_token_id": 1, "repetition_penalty": 1.3}),
    ("marian", {"bad_words_ids": [[63]], "eos_token_id": 0, "forced_eos_token_id": 0, "decoder_start_token_id": 63,
                "pad_token_id": 63}),
    ("llama_gqa", {"eos_token_id": [2, 17, 40], "suppress_tokens": [3], "no_repeat_ngram_size": 2, "pad_token_id": 0}),
]  # fmt: skip
PROMPTS, NEW = [[5, 9, 33, 20, 7], [11, 30, 3, 42, 8]], 16

MESSAGES = {
    "question": [{"role": "user", "content": " Hi <b>'there'</b>\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Écris "ça"'}],
    "turns": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "three"},
    ],
}
# In the style of released ones, one for each thing that they use.
TEMPLATES = {
    "chatml": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
        "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "headers_and_date": (
        "{{- bos_token }}\n{%- set date = strftime_now(\"26 Jul 2024\") if strftime_now is defined else 'never' %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '\\n\\n' + system + '<|eot_id|>' }}\n"
        "{%- if tools is not none %}\n{{- tools | tojson(indent=4) }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "instructions": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...!') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
    "lines_and_blocks": (
        "{% for message in messages %}\n  {% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\\n' + message['content'] + eos_token }}\n  {% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\\n' + message['content'] + eos_token }}\n  {% else %}\n"
        "{% generation %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endgeneration %}\n"
        "  {% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "macros_and_loops": (
        "{% macro turn(m) %}[{{ m.role }}]{{ m['content'] | tojson }}{% endmacro %}"
        "{% set ns = namespace(count=0, last='') %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{% set ns.count = ns.count + 1 %}{% set ns.last = m.content %}{{ turn(m) }}"
        "{% if ns.count == 2 %}{% break %}{% endif %}{% endfor %}{{ ns.count }}{{ ns.last.split(' ')[-1] }}"
        "{{ pad_token }}{{ documents }}{{ undefined_name }}{{ messages | map(attribute='role') | join(',') }}"
    ),
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def scores(seed: int, rows: int) -> np.ndarray:
    """Logits of both signs, all different in a row."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(VOCABULARY) for _ in range(rows)]).astype(np.float32) - 5.5


def processed() -> list:
    model = AutoModelForCausalLM.from_pretrained(PARITY / "llama_gqa")
    found = []
    for number, settings in enumerate(SETTINGS):
        for prompt, texts in TEXTS.items():
            config = GenerationConfig(**settings, eos_token_id=EOS, max_length=prompt + MAX_NEW_TOKENS, do_sample=False)
            model._prepare_special_tokens(config, False, device="cpu")
            processors = model._get_logits_processor(config, input_ids_seq_length=prompt)
            for text in texts:
                logits = torch.from_numpy(scores(number, 1))
                after = processors(torch.tensor([text]), logits)[0].tolist()
                found.append([number, prompt, text, [None if x == -np.inf else round(x, 6) for x in after]])
    return found


def generated() -> list:
    found = []
    for name, settings in GENERATED:
        kind = AutoModelForCausalLM if name.startswith("llama") else AutoModelForSeq2SeqLM
        with tempfile.TemporaryDirectory() as place:
            folder = shutil.copytree(PARITY / name, Path(place) / name)
            (folder / "generation_config.json").write_text(json.dumps(settings))
            model = kind.from_pretrained(folder)
        options = {"do_sample": False, "max_new_tokens": NEW}
        rows = [model.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]
        found.append([name, settings, rows])
    return found


def rendered() -> list:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), **NAMES)
    found = []
    for name, template in TEMPLATES.items():
        for kind, messages in MESSAGES.items():
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except TemplateError:  # it raises this itself
                text = None
            found.append([name, kind, text])
    return found


if __name__ == "__main__":
    goldens = {
        "transformers": __version__,
        "settings": SETTINGS, "vocabulary": VOCABULARY, "eos": EOS, "max_new_tokens": MAX_NEW_TOKENS,
        "scores": [scores(number, 1)[0].tolist() for number in range(len(SETTINGS))],
        "processed": processed(),
        "prompts": PROMPTS, "new": NEW, "generated": generated(),
        "templates": TEMPLATES, "messages": MESSAGES, "names": NAMES, "rendered": rendered(),
    }  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in goldens.items()]
    (HERE / "goldens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
