"""Conversations: templates rendered as transformers does, prompts without a second BOS, answers, the command."""

import copy
import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

import llama_jax
from llama_jax.__main__ import main
from llama_jax.checkpoint import GenerationSettings, LanguageModel, save
from llama_jax.config import UserError
from llama_jax.data.chat import ChatGLM2Chat, ChatML, ChatTemplate, Llama2Chat, Llama3Chat
from llama_jax.sampling import SamplingConfig, chat, generate
from llama_jax.sampling.conversations import encoded_chat, render, special_names
from llama_jax.sampling.text import completed
from llama_jax.tokenizers import train_tokenizer
from llama_jax.tokenizers.base import SETTINGS_FILE, TEMPLATE_FILE

GOLDENS = json.loads(Path(__file__).with_name("goldens.json").read_text(encoding="utf-8"))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = [{"role": "user", "content": "one fish"}]


@pytest.fixture(scope="module")
def chatting(lm: LanguageModel, make_model) -> LanguageModel:
    """A model with a template of its own, whose answers end with <|im_end|> and nothing else."""
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(
        ["one fish, two fish", "red fish, blue fish"] * 4, vocab_size=278, special_tokens=special
    )
    tokenizer.files = {**tokenizer.files, TEMPLATE_FILE: TEMPLATE.encode()}
    generation = GenerationSettings(eos_ids=(tokenizer.special_tokens["<|im_end|>"],))
    config = dataclasses.replace(lm.config, max_positions=128, vocab_size=tokenizer.vocab_size)
    return LanguageModel(config, make_model(config), tokenizer, generation=generation)


@pytest.mark.parametrize(("name", "kind", "text"), GOLDENS["rendered"], ids=str)
def test_templates_render_as_in_transformers(name: str, kind: str, text: str | None):
    messages, names = GOLDENS["messages"][kind], GOLDENS["names"]
    if text is None:
        with pytest.raises(UserError, match="refuses this conversation: Roles must alternate user/assistant"):
            render(GOLDENS["templates"][name], messages, names)
    else:
        assert render(GOLDENS["templates"][name], messages, names) == text


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "cannot be read, at line 1"),
        ("{{ messages.__class__.__mro__ }}", "refuses .*unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses .*unsafe"),
        ("{{ messages.append(1) }}", "refuses .*(unsafe|not safely callable)"),
        ("{% set ns = namespace(_x=1) %}", "refuses .*no attribute '_x'"),
        ("{{ cycler.__init__.__globals__.os }}", "refuses .*unsafe"),
        ("{{ nothing.of.this }}", "refuses .*'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "fails .*TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails .*Range too big"),
        (
            "{% for i in range(90000) %}{% for i in range(90000) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
            "characters",
        ),
        ("{% include 'x' %}", "(refuses|fails) "),
    ],
)
def test_templates_do_no_harm(template: str, sentence: str):
    with pytest.raises(UserError, match=sentence) as told:
        render(template, USER, {})
    assert "\n" not in str(told.value)


def test_the_prompt_is_the_rendered_text(chatting: LanguageModel):
    """Special tokens are these tokens, BOS stands there once, and nothing behind."""
    tokenizer = chatting.tokenizer
    assert tokenizer is not None
    assert special_names(tokenizer)["bos_token"] == "<s>"
    start, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    found = encoded_chat(chatting, USER, None)
    assert found.stop_ids == (end,)
    assert found.ids.count(1) == 1
    assert [i for i in found.ids if i in (1, start, end)] == [1, start, end, start]
    answer = chat(chatting, USER, max_new_tokens=12, temperature=0)
    new = generate(chatting, [found.ids], max_new_tokens=12, eos_id=end)[0, len(found.ids) :].tolist()
    ((completion,),) = completed(chatting, ["one fish"], [found], [SamplingConfig(12, 0.0)])
    assert completion.completion == answer
    assert completion.token_ids == new[: len(completion.token_ids)]
    assert answer


@pytest.mark.slow
def test_templates_travel_with_the_model(chatting: LanguageModel, tmp_path: Path):
    expected = chat(chatting, USER, max_new_tokens=8, temperature=0.9, seed=2**63)
    for form in ("native", "hf"):
        save(chatting, tmp_path / form, format=form)  # type: ignore[arg-type]
        again = llama_jax.load(tmp_path / form)
        assert again.tokenizer is not None
        assert again.tokenizer.chat_templates["default"] == TEMPLATE
        assert again.generation.eos_ids == chatting.generation.eos_ids
        assert encoded_chat(again, USER, None) == encoded_chat(chatting, USER, None)
    assert llama_jax.chat(llama_jax.load(tmp_path / "native"), USER, max_new_tokens=8, temperature=0.9, seed=2**63) == (
        expected
    )


def test_a_run_answers_by_the_template_of_its_training(chatting: LanguageModel, tmp_path: Path):
    trained = dataclasses.replace(chatting, chat_template=ChatML())
    save(trained, tmp_path / "native")
    again = llama_jax.load(tmp_path / "native")
    assert encoded_chat(again, USER, None) == encoded_chat(chatting, USER, ChatML())
    assert encoded_chat(again, USER, "default") == encoded_chat(chatting, USER, None)
    assert encoded_chat(chatting, USER, "ChatML") == encoded_chat(chatting, USER, ChatML())
    # A run's own config has it with the data.
    (tmp_path / "native" / "origin.json").unlink()
    model = json.loads((tmp_path / "native" / "config.json").read_text())
    run = {"model": model, "data": {"chat_template": {"type": "Llama2Chat"}}}
    (tmp_path / "native" / "config.json").write_text(json.dumps(run))
    assert llama_jax.load(tmp_path / "native").chat_template == Llama2Chat()


@pytest.mark.parametrize("template", [ChatGLM2Chat(), ChatML(), Llama2Chat(), Llama3Chat()], ids=repr)
@pytest.mark.parametrize("roles", [("user",), ("system", "user"), ("system", "user", "assistant", "user")])
def test_built_in_templates_are_their_jinja(template: ChatTemplate, roles: tuple[str, ...]):
    messages = [{"role": role, "content": f" {role} {i} "} for i, role in enumerate(roles)]
    names = {"BOS": "<s>", "EOS": "</s>"}
    pieces = [*template.pieces(messages), *template.opening()]
    expected = "".join(names.get(piece.text, piece.text) if piece.special else piece.text for piece in pieces)
    assert template.JINJA is not None
    assert render(template.JINJA, messages, {"bos_token": "<s>", "eos_token": "</s>"}) == expected


def test_an_export_has_the_template_of_the_training(chatting: LanguageModel, tmp_path: Path):
    tokenizer = chatting.tokenizer
    assert tokenizer is not None
    plain = dataclasses.replace(chatting, chat_template=Llama2Chat())
    save(plain, tmp_path / "hf", format="hf")
    again = llama_jax.load(tmp_path / "hf")
    assert encoded_chat(again, USER, None).ids == encoded_chat(chatting, USER, Llama2Chat()).ids
    assert set(again.generation.eos_ids) >= {tokenizer.eos_ids[0], *chatting.generation.eos_ids}


@pytest.mark.parametrize(
    ("messages", "template", "sentence"),
    [
        ([], None, "must end with the message to answer"),
        ([*USER, {"role": "assistant", "content": "x"}], None, "must end with the message to answer"),
        ([{"content": "x"}], None, 'message 1 must have a "role"'),
        ([{"role": "user"}], None, 'message 1 must have a "role" and a "content"'),
        ([*USER, {"role": "tool", "content": "x"}], None, "refuses this conversation: no tools"),
        (USER, "rag", "has no chat template 'rag': it has default"),
        ([*USER, *USER], ChatML(), "has the role user where assistant belongs"),
        (USER, Llama3Chat(), "no special token"),
    ],
)
def test_what_cannot_be_answered(messages: list, template, sentence: str, chatting: LanguageModel):
    with pytest.raises(UserError, match=sentence):
        chat(chatting, messages, template=template)


@pytest.mark.parametrize(
    ("file", "content"),
    [(SETTINGS_FILE, b'{"chat_template": [{"template": "x"}]}'), (SETTINGS_FILE, b'{"chat_template": 3}'),
     (TEMPLATE_FILE, b"\xff")],
)  # fmt: skip
def test_damaged_templates_are_refused_when_they_are_needed(file: str, content: bytes, lm: LanguageModel):
    tokenizer = copy.copy(lm.tokenizer)
    assert tokenizer is not None
    vars(tokenizer).pop("chat_templates", None)
    tokenizer.files = {**tokenizer.files, file: content}
    with pytest.raises(UserError, match="chat templates are damaged"):
        chat(dataclasses.replace(lm, tokenizer=tokenizer), USER)


def test_models_without_a_template_name_the_built_in_ones(lm: LanguageModel):
    with pytest.raises(UserError, match=r"without a chat template: .*ChatGLM2Chat, ChatML, Llama2Chat, Llama3Chat"):
        chat(lm, USER)
    assert chat(lm, USER, template=Llama2Chat(), max_new_tokens=4, temperature=0)


def run(saved: Path, *more: str) -> list[str]:
    return ["sample", str(saved), "--chat", "--max-new-tokens", "8", "--temperature", "0", *more]


@pytest.fixture(scope="module")
def saved(chatting: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    save(chatting, path)
    return path


def test_the_command_answers(chatting: LanguageModel, saved: Path, capsys, monkeypatch):
    def answer(messages: list) -> str:
        return chat(chatting, messages, max_new_tokens=8, temperature=0)

    first = answer(USER)
    assert main(run(saved, "--prompt", "one fish", "--prompt", "red")) == 0
    assert capsys.readouterr().out == f"{first}\n{answer([{'role': 'user', 'content': 'red'}])}"
    assert main(run(saved, "--prompt", "one fish", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["completion"]) == ("one fish", first)
    # What was said before is in the conversation; a message that is refused is not.
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one fish\r\n{'one fish' * 99}\r\nred\r\n\r\nnever read\r\n"))
    assert main(run(saved)) == 0
    talk = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "red"}]
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{answer(talk)}\n"
    assert "shorten the prompt" in shown.err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--chat", "--chat-template", "Nonsense", "--prompt", "a"],
            "unknown chat template 'Nonsense': the built-in",
        ),
        (["--chat-template", "ChatML", "--prompt", "a"], "--chat-template is for conversations"),
        (["--chat", "--chat-template", "Llama3Chat", "--prompt", "a"], "no special token"),
    ],
)
def test_mistakes_are_one_sentence(more: list[str], sentence: str, saved: Path, capsys):
    assert main(["sample", str(saved), *more]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert sentence in shown.err
