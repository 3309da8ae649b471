"""XLM-RoBERTa's SentencePiece model: the ids of its tokenizer.json, and a copy that is read again."""

from pathlib import Path

import pytest

from llama_jax.config import UserError
from llama_jax.tokenizers import load_tokenizer

DIRECTORIES = Path(__file__).parent.parent / "directories" / "goldens"
TEXTS = ("", "the river sees", "  Anna's \n letter…  ", "ﬁve 12:30 é日本", "x" * 40)


@pytest.fixture(scope="module")
def slow():
    return load_tokenizer(DIRECTORIES / "xlm_roberta_slow")


def test_ids_are_those_of_its_tokenizer_json(slow):
    fast = load_tokenizer(DIRECTORIES / "xlm_roberta")
    assert slow.special_tokens == fast.special_tokens
    assert list(slow.special_tokens.values()) == [0, 1, 2, 3, slow.vocab_size - 1]
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id", "unk_id"):
        assert getattr(slow, name) == getattr(fast, name), name
    for text in (*TEXTS, "the <mask> sees </s>", "<mask>"):
        assert slow.encode_prompt(text, special=True) == fast.encode_prompt(text, special=True), text
    for text in TEXTS:
        assert slow.encode_prompt(text) == fast.encode_prompt(text), text
        assert slow.decode(slow.encode_prompt(text)) == fast.decode(fast.encode_prompt(text)), text


def test_a_saved_one_is_the_same(slow, tmp_path):
    slow.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special_tokens == slow.special_tokens
    assert [again.encode_prompt(text) for text in TEXTS] == [slow.encode_prompt(text) for text in TEXTS]


def test_a_model_with_other_first_pieces_is_refused(tmp_path):
    model = (DIRECTORIES / "mt5" / "spiece.model").read_bytes()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(UserError, match="its first pieces are not"):
        load_tokenizer(tmp_path)
