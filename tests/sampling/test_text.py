"""Texts continued: `generate_text`, `stream_text` and the command."""

import copy
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import LanguageModel, save
from llama_jax.config import UserError
from llama_jax.sampling import SamplingConfig, complete, generate, generate_text, stream_text

PROMPTS = ["one fish", "", "blue fish, red"]


def test_the_text_is_that_of_the_tokens(lm: LanguageModel):
    assert lm.tokenizer is not None
    found = complete(lm, PROMPTS, SamplingConfig(10, 0.0))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = lm.tokenizer.encode(prompt, bos=True)
        expected = generate(lm, [ids], max_new_tokens=10)[0, len(ids) :].tolist()
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert prompt + completion.completion == lm.tokenizer.decode(ids + completion.token_ids)
        assert (completion.prompt, completion.finish_reason) == (prompt, "length")
        assert len(completion.token_ids) == 10
    # A text that is not in a list is one prompt.
    assert generate_text(lm, PROMPTS[2], max_new_tokens=10, temperature=0) == [found[2].completion]


def test_the_stream_is_the_text(lm: LanguageModel):
    """Drawn; tests of stops below have greedy ones."""
    texts = generate_text(lm, PROMPTS, max_new_tokens=20, temperature=1.0, seed=5)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        pieces = list(stream_text(lm, prompt, max_new_tokens=20, temperature=1.0, seed=5, row=row))
        assert "".join(pieces) == text
        assert len(pieces) > 2, "it has to come in pieces"


def stopping(lm: LanguageModel, token_id: int) -> LanguageModel:
    """The same, with `token_id` as second end-of-text token."""
    changed = copy.copy(lm.tokenizer)
    assert changed is not None
    changed.eos_ids = (2, token_id)
    return dataclasses.replace(lm, tokenizer=changed)


def test_a_text_stops_at_any_end_of_text_token(lm: LanguageModel):
    (free,) = complete(lm, PROMPTS[:1], SamplingConfig(20, 0.0))
    end = free.token_ids[7]
    ending = stopping(lm, end)
    (found,) = complete(ending, PROMPTS[:1], SamplingConfig(20, 0.0))
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert "".join(stream_text(ending, PROMPTS[0], max_new_tokens=20, temperature=0)) == found.completion


def test_a_stop_string_ends_a_text_and_is_left_out(lm: LanguageModel):
    free = complete(lm, PROMPTS, SamplingConfig(20, 0.0))
    stop = free[0].completion[6:9]
    config = SamplingConfig(20, 0.0, stop=(stop, "never written"))
    found = complete(lm, PROMPTS, config)
    for prompt, before, after in zip(PROMPTS, free, found, strict=True):
        assert after.completion == before.completion.partition(stop)[0]
        stops = stop in before.completion
        assert after.finish_reason == ("stop" if stops else "length")
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        pieces = list(generate_text(lm, prompt, stream=True, max_new_tokens=20, temperature=0, stop=stop))
        assert "".join(pieces) == after.completion
        assert lm.tokenizer is not None
        ids = lm.tokenizer.encode_prompt(prompt)
        for count, contains in ((len(after.token_ids), True), (len(after.token_ids) - 1, False)):
            text = lm.tokenizer.decode([*ids, *after.token_ids[:count]])[len(prompt) :]
            assert not stops or (stop in text) == contains, "its ids end with the token that completed it"


def test_samples_of_a_prompt_are_those_of_prompts_alone(lm: LanguageModel):
    options = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    found = generate_text(lm, PROMPTS[:2], num_samples=3, **options)
    assert found == [
        generate_text(lm, [prompt] * 6, **options)[first : first + 3]
        for prompt, first in ((PROMPTS[0], 0), (PROMPTS[1], 3))
    ]
    assert len({text for texts in found for text in texts}) == 6


def test_only_one_text_streams(lm: LanguageModel):
    for prompts, options, sentence in (
        (PROMPTS, {}, "stream=True writes one text, and there are 3 prompts"),
        ("a", {"num_samples": 2}, "num_samples=2 writes several texts"),
        ("a" * 400, {}, "shorten the prompt"),
    ):
        with pytest.raises(UserError, match=sentence):  # at once, not when it is read
            generate_text(lm, prompts, stream=True, **options)


def test_ids_beyond_the_tokenizer_have_no_text(lm: LanguageModel, make_model):
    config = dataclasses.replace(lm.config, num_layers=1, vocab_size=4 * lm.config.vocab_size)
    padded = dataclasses.replace(lm, config=config, model=make_model(config))
    (found,) = complete(padded, PROMPTS[:1], SamplingConfig(16, 1e6))
    assert max(found.token_ids) >= lm.config.vocab_size
    assert lm.tokenizer is not None
    known = [i for i in found.token_ids if i < lm.config.vocab_size]
    ids = lm.tokenizer.encode(PROMPTS[0], bos=True)
    assert PROMPTS[0] + found.completion == lm.tokenizer.decode(ids + known)


def test_what_texts_need(lm: LanguageModel):
    assert generate_text(lm, []) == []
    with pytest.raises(UserError, match="came without a tokenizer"):
        generate_text(dataclasses.replace(lm, tokenizer=None), ["a"])
    with pytest.raises(UserError, match="shorten the prompt"):
        generate_text(lm, ["one fish" * 60])


def test_what_stands_around_a_prompt_is_the_tokenizers_rule(lm: LanguageModel):
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    for prefix, suffix in (((), ()), ((5, 6), ()), ((1,), (2,))):
        ruled = dataclasses.replace(lm, tokenizer=tokenizer.with_rule(prefix, suffix))
        (found,) = complete(ruled, ["one fish"], SamplingConfig(3, 0.0))
        ids = [*prefix, *tokenizer.encode("one fish"), *suffix]
        assert found.token_ids == generate(lm, [ids], max_new_tokens=3)[0, len(ids) :].tolist()


def test_a_tokenizer_may_have_more_tokens_than_the_model(lm: LanguageModel, make_model):
    """Only a token that is really fed is refused."""
    assert lm.tokenizer is not None
    rows = lm.tokenizer.vocab_size - 1  # the last token is not in the embedding
    config = dataclasses.replace(lm.config, num_layers=1, vocab_size=rows)
    smaller = dataclasses.replace(lm, config=config, model=make_model(config))
    assert generate_text(smaller, ["xyz"], max_new_tokens=2)
    last = lm.tokenizer.decode([rows])
    with pytest.raises(UserError, match=f"token id {rows} is outside the model's vocabulary of {rows}"):
        generate_text(smaller, [last], max_new_tokens=2)


@pytest.fixture(scope="module")
def saved(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "model"
    save(lm, path)
    return path


def options(*more: str) -> list[str]:
    return ["--max-new-tokens", "10", "--temperature", "0", *more]


def test_the_command_prints_prompt_and_continuation(lm: LanguageModel, saved: Path, capsys: pytest.CaptureFixture):
    texts = generate_text(lm, PROMPTS, max_new_tokens=10, temperature=0)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(saved), *prompts, *options()]) == 0
    assert capsys.readouterr().out == "\n".join(p + text for p, text in zip(PROMPTS, texts, strict=True))
    assert main(["sample", str(saved), *prompts, *options("--json")]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["prompt"] for o in objects] == PROMPTS
    assert [o["completion"] for o in objects] == texts
    assert all(o["finish_reason"] == "length" and len(o["token_ids"]) == 10 for o in objects)


def test_interactive_until_an_empty_line(
    lm: LanguageModel, saved: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    too_long = "one fish" * 60
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one fish\r\n{too_long}\nred\n\nnever read\n"))
    assert main(["sample", str(saved), *options()]) == 0
    shown = capsys.readouterr()
    texts = generate_text(lm, ["one fish", "red"], max_new_tokens=10, temperature=0)
    assert shown.out == f"one fish{texts[0]}\nred{texts[1]}\n"
    assert shown.err.count("prompt> ") == 4
    assert "shorten the prompt" in shown.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--prompt", "a"], "'nowhere' does not exist"),
        (["{saved}", "--prompt", "a", "--top-p", "2"], "top_p=2.0 must be"),
        (["{saved}", "--prompt", "a", "--max-new-tokens", "999"], "take at most"),
        (["{saved}", "--json"], "at least one --prompt"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, saved: Path, capsys: pytest.CaptureFixture):
    assert main(["sample", *(word.format(saved=saved) for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_an_ascii_terminal_gets_escapes(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """What it cannot show does not end the command; what is typed in UTF-8 is read."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode()), encoding="ascii"))
    assert main(["sample", str(saved), *options()]) == 0
    assert main(["sample", str(saved), "--prompt", "one 🐟", *options()]) == 0
    out.flush()
    shown = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith(b"\\xe9")
    assert b"\none \\U0001f41f" in shown


def test_real_weights_give_the_published_text(shared_data: Path):
    """llama2.c's own test: 200 greedy steps of stories260K, every byte. Fails when q and k are not permuted."""
    folder = shared_data / "llama2c"
    command = [sys.executable, "sample.py", str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tok512.bin")]
    command += ["--prompt", "", "--temperature", "0", "--max-new-tokens", "200", "--quiet"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (folder / "stories260K_expected_greedy200.txt").read_bytes()
