"""The command `sample` as people use it: flags, files of prompts, output, conversations in a terminal."""

import argparse
import dataclasses
import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_jax.__main__ import main, parse
from llama_jax.chat_terminal import _edited_reader, answer
from llama_jax.checkpoint import LanguageModel, save
from llama_jax.data.chat import ChatML
from llama_jax.sample_flags import sampling_config
from llama_jax.sampling import Conversation, SamplingConfig, chat, complete, generate_text
from llama_jax.tokenizers import train_tokenizer

ONE: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
# How a value of a field's type is typed, and what it is.
EXAMPLES: dict[Any, tuple[str, Any]] = {
    int: ("3", 3),
    float: ("0.5", 0.5),
    tuple[int, ...]: ("3,5", (3, 5)),
    tuple[str, ...]: ("a, b", ("a, b",)),
    tuple[tuple[int, float], ...]: ('{"7": -2}', ((7, -2),)),
    str: ("{}", "{}"),
}


@pytest.fixture(scope="module")
def saved(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "model"
    save(lm, path)
    return path


@pytest.fixture(scope="module")
def chatting(lm: LanguageModel, make_model) -> LanguageModel:
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(["one fish, two fish"] * 4, vocab_size=272, special_tokens=special)
    config = dataclasses.replace(lm.config, max_positions=128, vocab_size=tokenizer.vocab_size)
    return LanguageModel(config, make_model(config), tokenizer, chat_template=ChatML())


@pytest.fixture(scope="module")
def saved_chat(chatting: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chatting") / "model"
    save(chatting, path)
    return path


@pytest.fixture(scope="module")
def texts(lm: LanguageModel) -> dict[str, str]:
    prompts = ["one fish", "red", "blue"]
    return dict(zip(prompts, generate_text(lm, prompts, **ONE), strict=True))


def words(saved: Path, *more: str) -> list[str]:
    return ["sample", str(saved), "--max-new-tokens", "6", "--temperature", "0", *more]


@pytest.mark.parametrize("field", dataclasses.fields(SamplingConfig), ids=lambda field: field.name)
def test_every_setting_is_a_flag(field: dataclasses.Field):
    name = f"--{field.name.replace('_', '-')}"
    if field.name == "controls":  # functions
        return
    if field.type is bool:
        args, expected = parse(["sample", "x", name]), True
    elif field.name == "early_stopping":
        args, expected = parse(["sample", "x", name, "never"]), "never"
    else:
        kind = next(k for k in EXAMPLES if k == field.type or k | None == field.type)
        typed, expected = EXAMPLES[kind]
        args = parse(["sample", "x", name, typed])
    found = sampling_config(vars(args))
    assert getattr(found, field.name) == expected
    others = {"temperature": 0.0} if field.name == "num_beams" else {}  # beams are greedy where nothing is said
    assert dataclasses.replace(found, **{field.name: field.default}) == SamplingConfig(**others)


@pytest.mark.slow
def test_prompts_come_from_files(saved: Path, texts: dict[str, str], tmp_path: Path, capsys, monkeypatch):
    lines = tmp_path / "prompts.txt"
    lines.write_text("red\r\n\nblue\n")
    assert main(words(saved, "--prompt", "one fish", "--prompt-file", str(lines))) == 0
    assert capsys.readouterr().out == "".join(f"{prompt}{text}\n" for prompt, text in texts.items())
    records = [{"prompt": "one fish", "id": 7}, "red", {"prompt": "blue"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(record) + "\n" for record in records)))
    out = tmp_path / "out.jsonl"
    assert main(words(saved, "--prompt-file", "-", "--output", str(out), "--quiet")) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["prompt"], record["completion"]) for record in found] == list(texts.items())
    assert found[0]["id"] == 7


def test_samples_and_stop_strings(lm: LanguageModel, saved: Path, texts: dict[str, str], capsys):
    flags = ["--temperature", "1.5", "--seed", "3", "--num-samples", "2", "--prompt", "red"]
    assert main(words(saved, *flags, "--json")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = complete(lm, ["red"], SamplingConfig(6, 1.5, seed=3, num_samples=2))
    assert [(o["sample"], o["completion"]) for o in found] == [(i, e.completion) for i, e in enumerate(expected)]
    assert main(words(saved, *flags)) == 0
    assert capsys.readouterr().out == "\n---\n".join(f"red{e.completion}" for e in expected) + "\n"
    stop = texts["red"][2:4]
    assert main(words(saved, "--prompt", "red", "--stop", stop)) == 0
    assert capsys.readouterr().out == "red" + texts["red"].partition(stop)[0]


def test_speed_is_on_stderr(saved: Path, capsys):
    for flags, pattern in (
        ([], r"6 tokens in \S+, \S+ tokens/s\n"),
        (["--stats"], r"first token after \S+, 6 tokens in .*\n"),
        (["--stats", "--draft", "prompt"], r"first token after .*\n\d+ of \d+ drafted tokens accepted .*\n"),
        (["--quiet"], ""),
    ):
        assert main(words(saved, "--prompt", "red", *flags)) == 0
        assert re.fullmatch(pattern, capsys.readouterr().err)


@pytest.mark.slow
def test_conversations_come_from_files(chatting: LanguageModel, saved_chat: Path, tmp_path: Path, capsys):
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"prompt": "red"}) + "\n")
    flags = ["--prompt-file", str(file), "--system", "s", "--json"]
    system = {"role": "system", "content": "s"}
    expected = [chat(chatting, [system, *said], **ONE) for said in (talk, talk[:1])]
    assert main(words(saved_chat, "--chat", *flags)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["completion"] for record in found] == expected
    assert "prompt" not in found[0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompt-file", "nowhere.txt"], "cannot be read (No such file"),
        (["--prompt-file", "{tmp}/empty.txt"], "has no prompts"),
        (["--prompt-file", "{tmp}/bad.jsonl"], "line 2 must be an object with a `prompt`"),
        (["--prompt", "a", "--output", "{tmp}/none/out"], "cannot be written (No such file"),
        (["--output", "x"], "--output is for prompts"),
        (["--num-samples", "2"], "--num-samples is for prompts"),
        (["--prompt", "a", "--system", "b"], "--system is for conversations"),
        (["--prompt", "a", "--logprobs", "2"], "give --json too"),
        (["--prompt", "a", "--early-stopping", "maybe"], "early_stopping='maybe' is not of type bool or never"),
        (["--prompt", "a", "--stop-ids", "a"], "stop_ids='a' is not of type list of int"),
        (["--prompt", "a", "--prompt", "{long}", "--json"], "prompt 1: a prompt of"),
        (["--prompt", "a", "--stop", ""], "stop=('',) must be texts"),
    ],
)
def test_mistakes_are_one_sentence(more: list[str], sentence: str, saved: Path, tmp_path: Path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    given = [word.format(tmp=tmp_path, long="one fish" * 60) for word in more]
    assert main(["sample", str(saved), "--max-new-tokens", "6", *given]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert sentence in shown.err


@pytest.mark.slow
def test_commands_of_a_conversation(chatting: LanguageModel, saved_chat: Path, tmp_path: Path, capsys, monkeypatch):
    file = tmp_path / "talk.jsonl"
    typed = [
        "red",
        "/reset",
        "/system brief",
        "/set max-new-tokens 4",
        "/temperature 0",
        "/rest",
        "/set top_q 1",
        "blue",
    ]
    typed += [f"/save {file}", f"/save {file}", "/set", "/help", "/exit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    assert main(["sample", str(saved_chat), "--chat", "--max-new-tokens", "6"]) == 0
    shown = capsys.readouterr()
    asked = [{"role": "system", "content": "brief"}, {"role": "user", "content": "blue"}]
    told = chat(chatting, asked, max_new_tokens=4, temperature=0)
    assert shown.out.endswith(f"{told}\n")
    (talk,) = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert talk == [*asked, {"role": "assistant", "content": told}], "of the time before /reset nothing is left"
    for sentence in (
        "there is no command /rest: did you mean /reset?",
        "there is no setting 'top_q': did you mean top_",
        "cannot be written (File exists)",
        "max_new_tokens = 4\ntemperature = 0.0\n",
        "/save FILE",
    ):
        assert sentence in shown.err
    assert max(len(line) for line in shown.err.partition("/help")[2].splitlines()[:9]) <= 40, "of a narrow terminal"


def test_an_interrupt_ends_the_answer_alone(chatting: LanguageModel, capsys):
    args = argparse.Namespace(chat=True, quiet=True, stats=False)
    conversation = Conversation(chatting, max_new_tokens=40, temperature=1.0, ignore_eos=True)
    whole = list(conversation.stream("red"))
    assert len(whole) > 3
    conversation.reset()

    class Interrupted(Conversation):
        def stream(self, text: str, **options: Any):
            for number, piece in enumerate(super().stream(text, **options)):
                if number == 2:
                    signal.raise_signal(signal.SIGINT)
                yield piece

    conversation.__class__ = Interrupted
    before = signal.getsignal(signal.SIGINT)
    answer(conversation, "red", args)
    shown = capsys.readouterr()
    assert shown.out == "".join(whole[:3]) + "\n"
    assert shown.err == "stopped\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(whole[:3])}
    assert signal.getsignal(signal.SIGINT) == before
    conversation.__class__ = Conversation
    assert chat(chatting, [*conversation.messages, {"role": "user", "content": "blue"}], **ONE) == "".join(
        conversation.stream("blue", **ONE)
    ), "what was written of it is a part of the conversation"


def test_lines_are_edited(tmp_path: Path, monkeypatch):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input

    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    with create_pipe_input() as typed, create_app_session(input=typed):
        read = _edited_reader()
        typed.send_text("one\\\rtwo\x1b\rthree\r")  # a backslash, then Alt+Enter
        assert read() == "one\ntwo\nthree"
        typed.send_text("\r/he\t\r")  # an empty line is nothing; a command is completed
        assert read() == "/help"
        typed.send_text("abc\x03\x1b[A\x1b[A\r")  # Ctrl-C empties the line; the last but one text of the history
        assert read() == "one\ntwo\nthree"
        typed.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        typed.send_text("\x04")
        with pytest.raises(EOFError):
            read()
    assert (tmp_path / "sample_history").stat().st_mode & 0o077 == 0, "what was typed is for its user alone"
