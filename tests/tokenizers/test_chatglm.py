"""ChatGLM2's tokenizer: its own ids behind those of a SentencePiece model, and what stands before every text."""

import json
import shutil
from pathlib import Path

import pytest

from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel, load, save
from llama_jax.config import UserError, override
from llama_jax.data import DataConfig, Dataset, prepare_dataset
from llama_jax.data.chat import ChatGLM2Chat, DirectoryChat, chat_prompt, chat_tokens
from llama_jax.data.objectives import BlankFilling, Chat, Vocabulary
from llama_jax.models import Compute, from_params, init_params
from llama_jax.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n问：你好吗？\n答：我很好。[Round 1]\n" * 4
NAMES = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
TALK = [{"role": "user", "content": "你好sop"}, {"role": "assistant", "content": "quick [gMASK]"}]


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """The SentencePiece model alone."""
    return train_tokenizer([TEXT], vocab_size=340)


@pytest.fixture(scope="module")
def folder(pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory as it is released, without its weights."""
    folder = tmp_path_factory.mktemp("chatglm2")
    pieces.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_special_tokens_come_after_the_model_s_pieces(tokenizer: Tokenizer, pieces: Tokenizer):
    size = pieces.vocab_size
    added = {name: i for name, i in tokenizer.special_tokens.items() if i >= size}
    assert added == {name: size + i for i, name in enumerate(NAMES)}
    assert tokenizer.vocab_size == size + 5
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.unk_id) == (pieces.eos_ids, 0, 0)
    start = [size + 1, size + 3]
    assert tokenizer.encode(TEXT, bos=True, eos=True) == [*start, *pieces.encode(TEXT), *pieces.eos_ids]
    assert tokenizer.encode(TEXT) == pieces.encode(TEXT)
    assert list(map(len, tokenizer.encode_batch([TEXT, ""]))) == [len(pieces.encode(TEXT)), 0]


def test_special_tokens_are_no_text(tokenizer: Tokenizer, pieces: Tokenizer):
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    assert tokenizer.decode(ids) == pieces.decode(pieces.encode(TEXT))
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, [*ids, pieces.vocab_size + 4])) + stream.flush() == tokenizer.decode(ids)
    assert max(tokenizer.encode("".join(NAMES))) < pieces.vocab_size
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} is outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_copy_says_itself_what_it_is(tokenizer: Tokenizer, folder: Path, tmp_path: Path):
    again = load_tokenizer(tokenizer.save(tmp_path / "copy"))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("sop", bos=True) == tokenizer.encode("sop", bos=True)
    # The release says it in tokenizer_config.json too, which is kept as it is.
    shutil.copytree(folder, tmp_path / "release")
    settings = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False}
    (tmp_path / "release" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "release" / "config.json").unlink()
    released = load_tokenizer(tmp_path / "release")
    assert released.vocab_size == tokenizer.vocab_size
    assert json.loads(released.files["tokenizer_config.json"]) == settings


@pytest.fixture(scope="module")
def chatglm3(pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ChatGLM3-6B is released: its file names some of the tokens, at their ids."""
    folder, size = tmp_path_factory.mktemp("chatglm3"), pieces.vocab_size
    pieces.save(folder)
    names = {1: "[gMASK]", 3: "sop", 6: "<|user|>", 7: "<|assistant|>", 8: "<|observation|>"}
    template = (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}"
        "<|{{ message['role'] }}|>\n {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = {
        "added_tokens_decoder": {
            str(size + i): {"content": name, "special": True, "normalized": False} for i, name in names.items()
        },
        "chat_template": template,
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "tokenizer_class": "ChatGLMTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_chatglm3_s_turns_are_special_tokens(chatglm3: Path, pieces: Tokenizer, tmp_path: Path):
    """A message is its role's token, the ids of a line end, and those of its text, as ChatGLM3's code joins them."""
    tokenizer, size = load_tokenizer(chatglm3), pieces.vocab_size
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    added = {name: i for name, i in tokenizer.special_tokens.items() if i >= size}
    assert added == {name: size + i for i, name in enumerate(NAMES + roles)}
    assert tokenizer.eos_ids == (*pieces.eos_ids, added["<|user|>"], added["<|observation|>"])
    expected = [added["[gMASK]"], added["sop"]]
    talk = [{"role": "system", "content": "quick"}, {"role": "user", "content": "你好吗？ brown"}]
    for message in talk:
        expected += [added[f"<|{message['role']}|>"], *pieces.encode("\n"), *pieces.encode(message["content"])]
    assert chat_prompt(talk, DirectoryChat(), tokenizer) == [*expected, added["<|assistant|>"]]
    again = load_tokenizer(tokenizer.save(tmp_path / "copy"))
    assert (again.special_tokens, again.eos_ids) == (tokenizer.special_tokens, tokenizer.eos_ids)


def test_chatglm3_s_answers_end_where_the_user_s_turn_begins(chatglm3: Path, tmp_path: Path):
    """Its config.json has EOS alone, its code all three; an export says so in its files."""
    config = zoo.presets()["chatglm3_6b"]
    sizes = {"vocab_size": 352, "hidden_size": 16, "num_layers": 1, "attention.num_heads": 4, "attention.head_dim": 8}
    config = override(config, sizes | {"feed_forward.intermediate_size": 8, "attention.rope.rotary_dim": 4})
    model = from_params(config, init_params(config, 0), Compute())
    save(LanguageModel(config, model, load_tokenizer(chatglm3), model_type="chatglm"), tmp_path / "hf", format="hf")
    shutil.copytree(chatglm3, tmp_path / "hf", dirs_exist_ok=True)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    (tmp_path / "hf" / "generation_config.json").unlink()
    data = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"eos_token_id": 2}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(data))
    lm = load(tmp_path / "hf")
    assert lm.generation.eos_ids == lm.tokenizer.eos_ids
    assert len(lm.generation.eos_ids) == 3


def test_others_get_no_special_tokens(pieces: Tokenizer, tmp_path: Path):
    pieces.save(tmp_path)
    for name, content in (("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}), ("config.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).vocab_size == pieces.vocab_size
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be used as a tokenizer"):
        load_tokenizer(tmp_path)


def dataset_of(tokenizer: Tokenizer, folder: Path, content: dict, **options) -> Dataset:
    """One document, a row long."""
    (folder / "one.jsonl").write_text(json.dumps(content) + "\n")
    config = DataConfig(
        path=(str(folder / "one.jsonl"),), validation_fraction=0.0, cache_dir=str(folder / "cache"),
        packing="best_fit", **options,
    )  # fmt: skip
    directories = prepare_dataset(config, tokenizer, sequence_length=64)
    return Dataset(config, directories, Vocabulary.of(tokenizer), sequence_length=64, seed=0)


def stored(dataset: Dataset) -> list[int]:
    (stream,) = (corpus.train for corpus in dataset.corpora.values())
    return stream.read(0, stream.num_tokens).tolist()


def test_documents_begin_as_prompts_do(tokenizer: Tokenizer, tmp_path: Path):
    found = stored(dataset_of(tokenizer, tmp_path, {"text": "brown fox"}))
    assert found == tokenizer.encode("brown fox", bos=True, eos=True)


def test_chats_begin_as_prompts_do(tokenizer: Tokenizer, tmp_path: Path):
    template = ChatGLM2Chat()
    tokens, (answer,) = chat_tokens(TALK, template, tokenizer)
    expected = tokens.tolist()
    assert (tuple(expected[:2]), expected[-1]) == (tokenizer.start_ids, tokenizer.eos_ids[0])
    assert tokenizer.decode(expected[:answer]).strip() == "[Round 1]\n\n问：你好sop\n\n答："
    assert tokenizer.decode(expected).endswith("答：quick [gMASK]")
    options = {"objective": Chat(), "fields": ("messages",), "chat_template": template}
    assert stored(dataset_of(tokenizer, tmp_path, {"messages": TALK}, **options)) == expected


def test_blanks_are_of_the_text_alone(tokenizer: Tokenizer, tmp_path: Path):
    objective = BlankFilling(two_dimensional=False, start_token="sop", end_token="eop")
    text = "brown fox jumps over the lazy dog"
    (rows,) = dataset_of(tokenizer, tmp_path, {"text": text}, objective=objective).train
    batch = rows.read([(0, 0)])
    tokens, targets = (batch[name][0].tolist() for name in ("tokens", "targets"))
    special = tokenizer.special_tokens
    assert special["[MASK]"] in tokens
    assert tokens.count(special["sop"]) == tokens.count(special["[MASK]"])
    assert special["eop"] in targets
    # Neither what begins a document nor what ends it was left in, or taken for text.
    learned = [i for i, weight in zip(targets, batch["weights"][0], strict=True) if weight]
    given = [i for i, seen in zip(tokens, batch["prefix"][0], strict=True) if seen]
    assert sorted({*learned, *given} - set(special.values())) == sorted(set(tokenizer.encode(text)))
    assert not {special["[gMASK]"], *tokenizer.eos_ids} & {*tokens, *learned}
