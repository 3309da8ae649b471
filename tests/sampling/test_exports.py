"""What transformers makes of an exported directory: the same ids, the same greedy text, the same end.

LLAMA_JAX_REFERENCE_PYTHON names a python that has torch and transformers.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.checkpoint import GenerationSettings, LanguageModel, save
from llama_jax.sampling import SamplingConfig, complete
from llama_jax.sampling.conversations import encoded_chat
from llama_jax.tokenizers.base import TEMPLATE_FILE

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
PROMPTS = ["one fish", "blue fish, red"]
SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder in sys.argv[1:-1]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in json.loads(sys.argv[-1]):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0].tolist()
        size = inputs["input_ids"].shape[1]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_dict=False)
        found.append([out[:size], out[size:], chat])
print(json.dumps(found))
"""


def test_transformers_continues_as_we_do(lm: LanguageModel, tmp_path: Path):
    python = os.environ.get("LLAMA_JAX_REFERENCE_PYTHON")
    if not python:
        pytest.skip("LLAMA_JAX_REFERENCE_PYTHON names no python that has torch and transformers")
    assert lm.tokenizer is not None
    (free,) = complete(lm, PROMPTS[:1], SamplingConfig(20, 0.0))
    released = GenerationSettings(eos_ids=(2, free.token_ids[7]), no_repeat_ngram_size=3, suppress_tokens=(5, 9))
    expected, folders = [], []
    for name, settings, rule in (("own", GenerationSettings(), (1,)), ("released", released, ())):
        tokenizer = lm.tokenizer.with_rule(rule, ())
        tokenizer.files = {**tokenizer.files, TEMPLATE_FILE: TEMPLATE.encode()}
        tokenizer.__dict__.pop("chat_templates", None)  # what other tests have seen of the fixture's files
        told = dataclasses.replace(lm, tokenizer=tokenizer, generation=settings)
        save(told, tmp_path / name, format="hf")
        folders.append(str(tmp_path / name))
        found = complete(told, PROMPTS, SamplingConfig(20, 0.0))
        for prompt, completion in zip(PROMPTS, found, strict=True):
            chat = encoded_chat(told, [{"role": "user", "content": prompt}], None).ids
            expected.append([tokenizer.encode_prompt(prompt), completion.token_ids, chat])
    assert len({len(new) for _, new, _ in expected}) > 1, "one of them has to stop"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    command = [python, "-c", SCRIPT, *folders, json.dumps(PROMPTS)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr)
    assert json.loads(done.stdout) == expected
