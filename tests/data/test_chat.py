"""Conversations as tokens: the formats letter by letter, and who speaks where."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest

from llama_jax.config import UserError, choices
from llama_jax.data.chat import ChatGLM2Chat, ChatML, ChatTemplate, Llama2Chat, Llama3Chat, chat_prompt, chat_tokens
from llama_jax.data.objectives import Chat, Document, Vocabulary
from llama_jax.tokenizers.base import TextStream, Tokenizer

SPECIAL = ("<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
           "<|im_end|>", "[gMASK]", "sop")  # fmt: skip


class Letters(Tokenizer):
    """A token for every letter but where `pairs` join two; `space` puts one before a text, as SentencePiece does."""

    bos_id, eos_ids, pad_id = 0, (1,), None
    files: Mapping[str, bytes] = {}

    def __init__(self, pairs: Sequence[str] = (), space: bool = False, special: Sequence[str] = SPECIAL):
        self.special_tokens = {name: i for i, name in enumerate(special)}
        self.texts = [*special, *map(chr, range(128)), *"问答：", *pairs]
        self.vocab_size, self.space, self.pairs = len(self.texts), space, pairs

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_one(" " * self.space + text) for text in texts]

    def _encode_one(self, text: str) -> list[int]:
        ids = []
        while text:
            size = 2 if text[:2] in self.pairs else 1
            ids.append(self.texts.index(text[:size], len(self.special_tokens)))
            text = text[size:]
        return ids

    def stream(self) -> TextStream:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.texts[i] for i in ids)


SYSTEM = {"role": "system", "content": " Be brief. "}
TALK = [
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " So long "},
]
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMATS = {
    "Llama2Chat": (
        Llama2Chat(),
        [
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]", " Hello. </s>",
            "<s>[INST] Bye [/INST]", " So long </s>",
        ],
    ),
    "Llama3Chat": (
        Llama3Chat(),
        [
            "<|begin_of_text|>" + HEADER.format("system") + "Be brief.<|eot_id|>" + HEADER.format("user")
            + "Hi<|eot_id|>" + HEADER.format("assistant"), "Hello.<|eot_id|>",
            HEADER.format("user") + "Bye<|eot_id|>" + HEADER.format("assistant"), "So long<|eot_id|>",
        ],
    ),
    "ChatML": (
        ChatML(),
        [
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
            "Hello.<|im_end|>",
            "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", " So long <|im_end|>", "\n",
        ],
    ),
    "ChatGLM2Chat": (
        ChatGLM2Chat(),
        [
            "[gMASK]sop Be brief. \n\n[Round 1]\n\n问： Hi \n\n答：", "Hello.",
            "\n\n[Round 2]\n\n问：Bye\n\n答：", " So long </s>",
        ],
    ),
}  # fmt: skip


def parts_of(messages, template: ChatTemplate, tokenizer: Letters) -> list[str]:
    tokens, starts = chat_tokens(messages, template, tokenizer)
    assert (tokens.dtype, starts.dtype) == (np.int32, np.int64)
    return [tokenizer.decode(part) for part in np.split(tokens, starts)]


def test_every_template_has_its_format():
    # A directory's own template has the format that the directory gives it: tests/finetuning.
    assert set(choices(ChatTemplate)) - {"DirectoryChat"} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_letter_by_letter(name: str):
    template, expected = FORMATS[name]
    assert parts_of([SYSTEM, *TALK], template, Letters()) == expected
    alone = parts_of(TALK, template, Letters())
    assert "Be brief" not in "".join(alone)
    assert alone[1:] == expected[1:]


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_what_has_a_loss(name: str):
    template, expected = FORMATS[name]
    tokenizer = Letters()
    tokens, parts = chat_tokens([SYSTEM, *TALK], template, tokenizer)
    example = Chat().example(Document(tokens, parts), np.random.default_rng(0), Vocabulary.of(tokenizer))
    assert tokenizer.decode(example["targets"][example["weights"] == 1]) == expected[1] + expected[3]


@pytest.mark.parametrize("name", FORMATS)
def test_no_message_makes_a_special_token(name: str):
    template, tokenizer = FORMATS[name][0], Letters()
    inserted = "".join(SPECIAL)
    talk = [{"role": "user", "content": inserted}, {"role": "assistant", "content": inserted}]
    plain = [message | {"content": "x"} for message in talk]
    count = lambda talk: int((chat_tokens(talk, template, tokenizer)[0] < len(SPECIAL)).sum())  # noqa: E731
    assert count(talk) == count(plain) > 0


def test_texts_are_cut_from_the_whole():
    # With a space put in front of every text, none comes between a question and its answer.
    assert parts_of(TALK[:2], Llama2Chat(), Letters(space=True)) == ["<s> [INST] Hi [/INST]", " Hello. </s>"]
    # A token that would be in both is not made.
    assert parts_of(TALK[:2], Llama2Chat(), Letters(pairs=["] "])) == ["<s>[INST] Hi [/INST]", " Hello. </s>"]
    # Others are.
    tokens, _ = chat_tokens(TALK[:2], Llama2Chat(), Letters(pairs=["lo"]))
    assert tokens.tolist().count(Letters(pairs=["lo"]).vocab_size - 1) == 1


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "must end with the assistant's answer"),
        (TALK[:1], "must end with the assistant's answer"),
        (TALK[1:2], "message 1 has the role assistant where system or user belongs"),
        ([TALK[0], TALK[0]], "message 2 has the role user where assistant belongs"),
        ([SYSTEM, SYSTEM], "message 2 has the role system where user belongs"),
        ([*TALK[:2], SYSTEM], "message 3 has the role system where user belongs"),
        ([{"role": "tool", "content": "x"}], "message 1 has the role 'tool': give one of system, user, assistant"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([{"role": "user"}], "message 1, of role user, has no content"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, sentence: str):
    with pytest.raises(UserError, match=sentence):
        chat_tokens(messages, ChatML(), Letters())


def test_a_special_token_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"no special token '<\|im_start\|>': train it with special_tokens"):
        chat_tokens(TALK, ChatML(), Letters(special=SPECIAL[:3]))
    nameless = Letters()
    nameless.bos_id = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="no special token 'BOS'"):
        chat_tokens(TALK, Llama2Chat(), nameless)


def test_the_vocabulary_of_a_tokenizer():
    found = Vocabulary.of(Letters(pairs=["d?"]))
    assert (found.size, found.bos_id, found.eos_id, found.pad_id) == (len(SPECIAL) + 128 + 3 + 1, 0, 1, None)
    assert found.id("</s>") == 1
    ends = [Letters().texts.index(mark, len(SPECIAL)) for mark in ".!"]
    assert found.sentence_ends == tuple(ends), "the question mark is no token of its own there"


@pytest.mark.parametrize("template", [Llama2Chat(), Llama3Chat(), ChatML(), ChatGLM2Chat()])
@pytest.mark.parametrize("messages", [TALK[:1], TALK[:3], [SYSTEM, *TALK[:3]]])
def test_a_prompt_is_the_beginning_of_what_was_trained_on(template: ChatTemplate, messages: list):
    """Up to where the answer begins; of the conversation with its answer the last part is what the model writes."""
    tokenizer = Letters()
    tokens, parts = chat_tokens([*messages, TALK[1]], template, tokenizer)
    begins = parts[0::2]  # parts alternate, the first is given
    prompt = chat_prompt(messages, template, tokenizer)
    assert prompt == tokens[: begins[-1]].tolist()
    with pytest.raises(UserError, match="must end with the user's message"):
        chat_prompt([*messages, TALK[1]], template, tokenizer)
