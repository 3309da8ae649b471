"""Whole directories as people have them: the same prompts, greedy texts and stops as the original code.

The goldens are from `make_goldens.py` beside this file: config, generation config, weights, the tokenizer's files and
its chat template, all as transformers or a release writes them, and in expected.json what transformers makes of them.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.models import Compute, from_params
from llama_jax.sampling import Completion, SamplingConfig, complete, conversations, text
from llama_jax.sampling.stops import TextStream
from llama_jax.tokenizers import train_tokenizer

KINDS = {"bpe": 290, "unigram": 290, "byte_bpe": 290, "wordpiece": 40, "whitespace": 18}  # sizes of vocabularies

GOLDENS = Path(__file__).parent / "goldens"
ASK = Path(__file__).parent / "ask_transformers.py"
CASES = sorted(folder.name for folder in GOLDENS.iterdir())


@functools.cache
def expected(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "expected.json").read_text(encoding="utf-8"))


GENERATING = [name for name in CASES if "eos_ids" in expected(name)]


@functools.cache
def loaded(name: str) -> llama_jax.LanguageModel:
    return llama_jax.load(GOLDENS / name, dtype="float32")


def completions(lm: llama_jax.LanguageModel, golden: dict[str, Any]) -> tuple[list[Completion], list[Completion]]:
    """Continuations of the prompts, and answers to the conversations as `chat` gives them, by the same programs."""
    prompts = [text.encoded_prompt(lm, entry["text"]) for entry in golden["texts"]]
    chats = [conversations.encoded_chat(lm, entry["messages"], None) for entry in golden["conversations"]]
    encoded, config = [*prompts, *chats], SamplingConfig(golden["max_new_tokens"], 0.0)
    found = [one for (one,) in text.completed(lm, [""] * len(encoded), encoded, [config] * len(encoded))]
    return found[: len(prompts)], found[len(prompts) :]


def check_texts(lm: llama_jax.LanguageModel, golden: dict[str, Any]) -> None:
    """Ids, text and stop of every prompt, and the text of every answer."""
    texts, answers = completions(lm, golden)
    for entry, found in zip(golden["texts"], texts, strict=True):
        assert found.token_ids == entry["greedy_ids"], entry["text"]
        assert found.completion == entry["greedy_text"]
        assert (found.finish_reason == "stop") == (entry["stopped_by"] is not None)
    for entry, found in zip(golden["conversations"], answers, strict=True):
        assert found.completion == entry["greedy_text"], entry["messages"]


def check_ids(lm: llama_jax.LanguageModel, golden: dict[str, Any]) -> None:
    """Ids of every prompt and conversation, the text of the answer's ids and the stop: nothing a model computes."""
    for entry in golden["conversations"]:
        assert lm.tokenizer.encode_prompt(entry["rendered"], special=True, affixes=False) == entry["ids"]
        assert conversations.encoded_chat(lm, entry["messages"], None).ids == entry["ids"]
    for entry in golden["texts"]:
        assert lm.tokenizer.encode_prompt(entry["text"]) == entry["ids"], entry["text"]
        if "greedy_ids" in entry:
            stream = TextStream(lm, entry["ids"])
            stream.feed(entry["greedy_ids"])
            stream.flush()
            assert stream.text == entry["greedy_text"]
            assert (entry["greedy_ids"][-1] in text.stop_ids(lm)) == (entry["stopped_by"] is not None)


@pytest.mark.quick(
    "bart",
    "bert",
    "bloom",
    "deepseek_v31",
    "gemma2",
    "glm",
    "gpt2_slow",
    "gpt_oss",
    "llama3",
    "llama_slow",
    "llama_yi",
    "marian",
    "mistral_tekken",
    "qwen3",
    "t5_v1_1",
    "xlm_roberta_slow",
)
@pytest.mark.parametrize("name", CASES, scope="module")
def test_ids_texts_and_stops(name):
    golden, lm = expected(name), loaded(name)
    check_ids(lm, golden)
    assert sorted(lm.generation.eos_ids) == sorted(golden.get("eos_ids", lm.generation.eos_ids))


@pytest.mark.quick("bart", "gpt2", "llama3", "t5_v1_1")
@pytest.mark.parametrize("name", GENERATING, scope="module")
def test_greedy_text_and_stop(name):
    check_texts(loaded(name), expected(name))


def test_chat():
    golden = expected("llama_chatml")
    for entry in golden["conversations"][:1]:
        options = {"temperature": 0.0, "max_new_tokens": golden["max_new_tokens"]}
        assert llama_jax.chat(loaded("llama_chatml"), entry["messages"], **options) == entry["greedy_text"]


@pytest.mark.quick("bert", "modernbert", "xlm_roberta_slow")
@pytest.mark.parametrize("name", [name for name in CASES if name not in GENERATING])
def test_encoder_logits(name):
    texts = expected(name)["texts"]
    tokens, mask = np.zeros((2, len(texts), max(len(entry["ids"]) for entry in texts)), np.int32)
    for row, entry in enumerate(texts):
        tokens[row, : len(entry["ids"])], mask[row, : len(entry["ids"])] = entry["ids"], 1
    found = np.asarray(loaded(name).model(tokens, mask=mask))
    for entry, row in zip(texts, found, strict=True):
        logits = row[: len(entry["ids"])]
        np.testing.assert_allclose(logits[0], entry["first_logits"], atol=5e-5)
        assert logits.argmax(-1).tolist() == entry["best_ids"]


@pytest.mark.quick("bart", "bert", "deepseek_v31", "gemma2", "gpt2_slow", "gpt_oss", "llama3", "marian", "t5_v1_1")
@pytest.mark.parametrize("name", CASES, scope="module")
def test_export_read_by_us(name, tmp_path):
    """Config, weights, tokenizer and generation, of which all that is written follows."""
    llama_jax.save(loaded(name), tmp_path / "export", format="hf")
    again = llama_jax.load(tmp_path / "export", dtype="float32")
    assert again.tokenizer.chat_templates == loaded(name).tokenizer.chat_templates
    check_ids(again, expected(name))
    assert again.config == loaded(name).config
    written, wanted = again.model.params(), loaded(name).model.params()
    assert written.keys() == wanted.keys()
    for parameter, value in wanted.items():
        np.testing.assert_array_equal(written[parameter], value, err_msg=parameter)
    if name in GENERATING:
        before = loaded(name).generation
        assert before.pad_id in (None, again.generation.pad_id)
        assert dataclasses.replace(again.generation, pad_id=before.pad_id) == before


def ask(folders: list[Path], goldens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers answers to the questions of the goldens from these directories."""
    python = os.environ.get("LLAMA_JAX_REFERENCE_PYTHON")
    if not python:
        pytest.skip("LLAMA_JAX_REFERENCE_PYTHON names no python that has torch and transformers")
    for folder, golden in zip(folders, goldens, strict=True):
        (folder / "expected.json").write_text(json.dumps(golden), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    subprocess.run([python, str(ASK), *map(str, folders)], check=True, env=environment, stdout=sys.stderr)
    return [json.loads((folder / "answers.json").read_text(encoding="utf-8")) for folder in folders]


@pytest.mark.slow
def test_exports_read_by_transformers(tmp_path):
    """The whole of it: ids, conversations, greedy text and stop, as from the directory that was read."""
    for name in CASES:
        llama_jax.save(loaded(name), tmp_path / name, format="hf")
    goldens = [expected(name) for name in CASES]
    answers = ask([tmp_path / name for name in CASES], goldens)
    found = dict(zip(CASES, zip(answers, goldens, strict=True), strict=True))
    assert [name for name, (answer, golden) in found.items() if answer != golden] == []


@pytest.mark.slow
def test_exports_of_own_tokenizers_read_by_transformers(two_layers, random_params, tmp_path):
    """A model of our own with a tokenizer of each of our kinds: transformers writes what we write."""
    texts = ["the old man sees a house.", "Anna's  letter, 12:30", "hé\nslept"]
    corpus = [f"{text} and then the king was near the river." for text in texts]
    goldens = []
    for kind, size in KINDS.items():
        tokenizer = train_tokenizer(corpus, kind=kind, vocab_size=size, special_tokens=("<pad>",))
        config = dataclasses.replace(two_layers, vocab_size=tokenizer.vocab_size)
        model = from_params(config, random_params(config), Compute(dtype="float32"))
        tokenizer = tokenizer.with_rule(tokenizer.start_ids, ())
        lm = llama_jax.LanguageModel(config, model, tokenizer)
        llama_jax.save(lm, tmp_path / kind, format="hf")
        golden = {"max_new_tokens": 12, "texts": [{"text": text} for text in texts], "conversations": []}
        for entry, found in zip(golden["texts"], complete(lm, texts, SamplingConfig(12, 0.0)), strict=True):
            entry["ids"] = tokenizer.encode_prompt(entry["text"])
            stop = found.token_ids[-1] if found.finish_reason == "stop" else None
            entry |= {"greedy_ids": found.token_ids, "greedy_text": found.completion, "stopped_by": stop}
        goldens.append(golden)
    answers = ask([tmp_path / kind for kind in KINDS], goldens)
    assert [answer["error"] for answer in answers if "error" in answer] == []
    for kind, answer, golden in zip(KINDS, answers, goldens, strict=True):
        for entry, found in zip(golden["texts"], answer["texts"], strict=True):
            if "\ufffd" in found["greedy_text"]:  # bytes that are no text are shown in ways of their own
                entry["greedy_text"] = found["greedy_text"]
            assert found == entry, kind
