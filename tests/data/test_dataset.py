"""The global sequence of batches: of any objective, packed, mixed, on any number of processes, after any restart."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama_jax.config import UserError
from llama_jax.data import (
    Batches,
    Corpus,
    DataConfig,
    Dataset,
    HostBatch,
    Shard,
    Source,
    Stage,
    TokenStream,
    ValidationBatches,
    Vocabulary,
    damaged_files,
    prepare_corpus,
    prepare_dataset,
)
from llama_jax.data.chat import ChatML, ChatTemplate, Llama2Chat, Llama3Chat, Piece
from llama_jax.data.objectives import (
    BlankFilling,
    Causal,
    Chat,
    Document,
    Example,
    MaskedLM,
    ParallelText,
    Prefix,
    SpanCorruption,
)
from llama_jax.data.readers import records
from llama_jax.data.rows.fitting import fit_rows
from llama_jax.data.rows.packing import PackedRows, Packer
from llama_jax.tokenizers import Tokenizer, train_tokenizer

SIZES = {"prose": 60, "code": 35, "notes": 9}  # documents
LENGTH = 24
OBJECTIVES = [Causal(), Prefix(), BlankFilling(), MaskedLM(), SpanCorruption(source_length=20, start_token="bos")]


def texts_of(name: str) -> list[str]:
    rng = np.random.default_rng(len(name))
    return [
        f"{name} {i}: " + " ".join(f"w{rng.integers(20)}" for _ in range(rng.integers(1, 30)))
        for i in range(SIZES[name])
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = {name for objective in OBJECTIVES for name in objective.special_tokens()}
    texts = [text for name in SIZES for text in texts_of(name)]
    return train_tokenizer(texts, vocab_size=300 + len(names), special_tokens=sorted(names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for name in SIZES:
        (folder / name).mkdir()
        for i, text in enumerate(texts_of(name)):
            (folder / name / f"{i:03}.txt").write_text(text)
    return folder


def mixed(folder: Path, shares: dict[str, float], epochs: dict[str, float] | None = None, **options: Any) -> DataConfig:
    sources = [Source(name, (str(folder / name),), share=share) for name, share in shares.items()]
    sources += [Source(name, (str(folder / name),), epochs=number) for name, number in (epochs or {}).items()]
    return DataConfig(
        path=(), sources=tuple(sources), validation_fraction=0.0, cache_dir=str(folder / "cache"), **options
    )


def opened(config: DataConfig, tokenizer: Tokenizer, *, seed: int = 0, length: int = LENGTH) -> Dataset:
    directories = prepare_dataset(config, tokenizer, sequence_length=length)
    return Dataset(config, directories, Vocabulary.of(tokenizer), sequence_length=length, seed=seed)


def batches_of(dataset: Dataset, *, num_steps: int = 50, size: int = 8, **options: Any) -> Batches:
    mixture = dataset.mixture(global_batch_size=size, num_steps=num_steps)
    return Batches(dataset.train, mixture=mixture, global_batch_size=size, seed=0, **options)


def hash_of(parts: list[HostBatch]) -> str:
    """Of a global batch, from the rows of several processes."""
    digest = hashlib.sha256()
    for name in sorted(parts[0]):
        digest.update(name.encode() + np.concatenate([part[name] for part in parts]).tobytes())
    return digest.hexdigest()


@pytest.mark.quick("Causal-cut", "Causal-best_fit", "BlankFilling-best_fit", "SpanCorruption-cut")
@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_any_restart_on_any_number_of_processes_continues(folder, tokenizer, objective, packing: str):
    """Packed mixtures of every objective, with shares that change: hashes of the batches."""
    shares = {"prose": 0.5, "code": 0.3, "notes": 0.2}
    stages = (Stage(7, (0.0, 0.25, 0.75)),)
    config = mixed(folder, shares, objective=objective, packing=packing, stages=stages)
    whole = batches_of(opened(config, tokenizer))
    expected = [hash_of([whole.batch(step)]) for step in range(24)]
    assert len(set(expected)) == 24
    rng = np.random.default_rng(7)
    for num_processes in (1, 4):
        start = int(rng.integers(0, 16))
        parts = [
            # Opened anew, as another process would.
            batches_of(opened(config, tokenizer), rows=range(i * 8 // num_processes, (i + 1) * 8 // num_processes))
            for i in range(num_processes)
        ]
        iterators = [part.iterate(start) for part in parts]
        for step in range(start, start + 8):
            assert hash_of([next(iterator) for iterator in iterators]) == expected[step], (num_processes, step)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_proportions_and_epochs_of_any_mixture(folder, tokenizer, data: st.DataObject):
    """Random shares, batch sizes, processes, stages and restarts: shares to within one, each row once an epoch."""
    names = list(SIZES)
    share = st.integers(1, 9).map(lambda n: n / 10)
    shares = {name: data.draw(share) for name in names}
    starts = sorted(data.draw(st.sets(st.integers(1, 30), max_size=2)))
    stages = tuple(Stage(start, tuple(data.draw(share) for _ in names)) for start in starts)
    dataset = opened(mixed(folder, shares, stages=stages), tokenizer)
    size, num_processes, restart = (
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(0, 40)),
    )
    own = [
        batches_of(dataset, size=size, rows=range(i * size // num_processes, (i + 1) * size // num_processes))
        for i in range(num_processes)
    ]
    again = [batches_of(dataset, size=size) for _ in range(2)]
    places = [
        place
        for step in range(40)
        for place in (
            list(itertools.chain.from_iterable(part.places(step) for part in own))
            if step < restart
            else again[step % 2].places(step)
        )
    ]
    seen = collections.defaultdict(list)
    for source, epoch, row in places:
        seen[source].append((epoch, row))
    for source, taken in seen.items():
        num_rows = dataset.train[source].num_rows
        for epoch, rows in itertools.groupby(taken, key=lambda place: place[0]):
            found = [row for _, row in rows]
            last = epoch == taken[-1][0]
            assert len(set(found)) == len(found)
            assert last or sorted(found) == list(range(num_rows))
        assert [epoch for epoch, _ in taken] == [number // num_rows for number in range(len(taken))]
    for stage, end in zip((Stage(0, tuple(shares.values())), *stages), [*starts, 40], strict=True):
        # Of the stage's shares of the tokens, windows being full.
        within = [source for source, _, _ in places[stage.start_step * size : end * size]]
        for source, portion in enumerate(stage.shares):
            portion /= sum(stage.shares)
            running = np.cumsum(np.array(within) == source) - portion * np.arange(1, len(within) + 1)
            assert np.abs(running).max(initial=0) < 1
    counted = [len(seen[i]) for i in range(len(names))]
    assert again[0].num_sequences(40) == counted
    told = dataset.proportions(again[0], 40)
    for i, name in enumerate(names):
        assert told[f"share/{name}"] == counted[i] / len(places)
        assert told[f"epochs/{name}"] == counted[i] / dataset.train[i].num_rows


def test_epochs_are_what_they_say_and_the_rest_is_shared(folder, tokenizer):
    config = mixed(folder, {"prose": 3.0, "code": 1.0}, {"notes": 2.0})
    dataset = opened(config, tokenizer)
    counts = batches_of(dataset, num_steps=50).num_sequences(50)
    assert counts[2] == 2 * dataset.train[2].num_rows
    assert abs(counts[0] - 3 * counts[1]) <= 4
    alone = opened(mixed(folder, {}, {"prose": 1.0, "notes": 2.0}), tokenizer)
    prose, notes = batches_of(alone, num_steps=50).num_sequences(50)
    ratio = (notes / alone.train[1].num_rows) / (prose / alone.train[0].num_rows)
    assert ratio == pytest.approx(2, rel=0.05)
    with pytest.raises(UserError, match=r"epochs of data.sources are [\d,]+ sequences, and the run has 8"):
        batches_of(dataset, num_steps=1)


def test_shares_are_of_tokens_where_rows_are_not_full(folder, tokenizer):
    """Best fit leaves rows of short documents emptier: more of them make up the same share."""
    config = mixed(folder, {"prose": 0.5, "notes": 0.5}, packing="best_fit", objective=MaskedLM(next_sentence=False))
    dataset = opened(config, tokenizer, length=400)
    batches = batches_of(dataset, num_steps=40)
    mean = [rows.num_tokens / rows.num_rows for rows in dataset.train]
    assert mean[0] > 1.2 * mean[1]
    tokens = [count * each for count, each in zip(batches.num_sequences(40), mean, strict=True)]
    assert abs(tokens[0] - tokens[1]) <= 2 * max(mean)


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("shard_bytes", [1 << 26, 500])
def test_all_text_is_learned_from_once_an_epoch(
    folder, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, shard_bytes: int
):
    monkeypatch.setattr(records, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    config = DataConfig(
        path=(str(folder / "prose"),), validation_fraction=0.0, cache_dir=str(tmp_path), packing=packing
    )
    dataset = opened(config, tokenizer)
    rows = dataset.train[0]
    assert (len(dataset.corpora["data"].train.shards) > 3) == (shard_bytes == 500)
    batch = rows.read([(0, row) for row in range(rows.num_rows)])
    found = collections.Counter(batch["targets"][batch["weights"] > 0].tolist())
    ids = [tokenizer.encode(text, bos=True, eos=True)[1:] for text in texts_of("prose")]
    expected = collections.Counter(itertools.chain.from_iterable(ids))
    if packing == "best_fit":
        assert found == expected
        assert rows.num_tokens == (batch["segment_ids"] > 0).sum()
    else:  # windows leave the tokens behind the last full one
        assert found <= expected
        assert sum(expected.values()) - sum(found.values()) <= LENGTH


def test_noise_is_another_in_every_epoch_and_the_same_again(folder, tokenizer):
    config = mixed(folder, {"prose": 1.0}, objective=MaskedLM(next_sentence=False))
    rows, same, other = (opened(config, tokenizer, seed=seed).train[0] for seed in (0, 0, 1))
    first = rows.read([(0, 3)])["tokens"]
    assert (first == same.read([(0, 3)])["tokens"]).all()
    assert (first != rows.read([(1, 3)])["tokens"]).any()
    assert (first != other.read([(0, 3)])["tokens"]).any()


@dataclasses.dataclass(frozen=True)
class Dropped(Causal):
    """Half of the loss, drawn."""

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        example = super().example(document, rng, vocabulary)
        return example | {"weights": rng.integers(2, size=len(example["weights"])).astype(np.float32)}


def test_noise_of_a_class_that_draws_is_that_of_the_place(folder, tokenizer):
    """Its base draws nothing, and so has no seed: the class has one, whatever was read before."""
    config = mixed(folder, {"prose": 1.0}, objective=Dropped())
    rows, same = (opened(config, tokenizer, seed=0).train[0] for _ in range(2))
    rows.read([(0, 1)])
    assert (rows.read([(0, 3)])["weights"] == same.read([(0, 3)])["weights"]).all()


def test_a_small_source_may_have_none_held_out(folder, tokenizer):
    config = dataclasses.replace(mixed(folder, {"prose": 1.0, "notes": 1.0}), validation_fraction=0.1)
    dataset = opened(config, tokenizer)
    held_out = [corpus.num_documents["validation"] for corpus in dataset.corpora.values()]
    assert held_out[0] > 0 == held_out[1]
    assert len(ValidationBatches(dataset.validation, global_batch_size=2)) > 0
    for own in ({"notes": 1.0}, {"notes": 0.5}):
        with pytest.raises(UserError, match="leaves no document for validation among 9"):
            opened(dataclasses.replace(mixed(folder, own), validation_fraction=0.1), tokenizer)
    with pytest.raises(UserError, match="leaves no document for validation among 9"):
        prepare_corpus(
            DataConfig(path=(str(folder / "notes"),), validation_fraction=0.1, cache_dir=config.cache_dir), tokenizer
        )


def test_next_sentences_are_of_other_documents(folder, tokenizer):
    dataset = opened(mixed(folder, {"notes": 1.0}, objective=MaskedLM()), tokenizer)
    rows = dataset.train[0]
    batch = rows.read([(epoch, row) for epoch in range(4) for row in range(rows.num_rows)])
    labels = batch["pair_targets"][batch["pair_weights"] > 0]
    assert 0 < labels.mean() < 1


def test_a_chat_cut_in_pieces_keeps_whose_turn_it_is(folder, tokenizer):
    """Rows of a long chat: the weights, put together, are those of the chat as one example."""
    lengths = np.random.default_rng(0).integers(1, 30, 12)
    tokens = np.arange(1, lengths.sum() + 1)
    parts = np.cumsum(lengths)[:-1]
    places = np.array([0, len(tokens)])
    shard = Shard(np.tile(tokens, 2), places, np.concatenate([place + parts for place in places]))
    vocabulary = Vocabulary.of(tokenizer)
    whole = Chat().example(Document(tokens.astype(np.int32), parts), np.random.default_rng(0), vocabulary)
    packer = Packer(Chat(), "best_fit", vocabulary, 20)
    index = fit_rows(shard, Chat(), "best_fit", (20,), num_before=1, num_after=1)
    rows = PackedRows(TokenStream([shard]), packer, index, seed=(0,))
    batch = rows.read([(0, row) for row in range(rows.num_rows)])
    trained = batch["targets"][batch["weights"] > 0]
    assert sorted(trained) == sorted([*whole["targets"][whole["weights"] > 0]] * 2)
    assert 0 < len(trained) < 2 * len(tokens)


TURNS = [
    ("system", "be short"),
    ("user", "what is a cat?"),
    ("assistant", "an animal"),
    ("user", "and a mat?"),
    ("assistant", "no animal"),
]


@pytest.mark.parametrize("template", [ChatML(), Llama2Chat(), Llama3Chat()], ids=lambda t: type(t).__name__)
def test_of_chats_only_answers_are_learned(tmp_path: Path, template: ChatTemplate):
    names = [
        "<|begin_of_text|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    words = train_tokenizer([text for _, text in TURNS], vocab_size=290, special_tokens=names)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    lines = [{"messages": messages}, {"messages": messages[1:3]}, {"messages": messages[::-1]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(
        path=(str(tmp_path / "chats.jsonl"),), fields=("messages",), chat_template=template, objective=Chat(),
        validation_fraction=0.0, max_bad_records=1, cache_dir=str(tmp_path / "cache"), packing="best_fit",
    )  # fmt: skip
    directories = prepare_dataset(config, words, sequence_length=200)
    dataset = Dataset(config, directories, Vocabulary.of(words), sequence_length=200, seed=0)
    assert dataset.corpora["data"].bad_records["reasons"] == {"messages that are no conversation": 1}
    rows = dataset.train[0]
    batch = rows.read([(0, row) for row in range(rows.num_rows)])
    end = {"ChatML": "<|im_end|>", "Llama2Chat": "</s>", "Llama3Chat": "<|eot_id|>"}[type(template).__name__]
    learned = batch["targets"][batch["weights"] > 0].tolist()
    answers = "".join(words.decode(list(part)).strip() + end for part in split_at(learned, words.special_tokens[end]))
    assert sorted(answers.split(end)) == sorted(["", "an animal", "no animal", "an animal"])
    with pytest.raises(UserError, match="holds the messages of a chat: set chat_template"):
        prepare_dataset(dataclasses.replace(config, chat_template=None), words, sequence_length=200)


def split_at(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    assert not parts.pop()
    return parts


def test_a_changed_plan_is_another_plan(folder, tokenizer, tmp_path: Path):
    base = dataclasses.replace(mixed(folder, {"prose": 1.0}, packing="best_fit"), cache_dir=str(tmp_path))
    directory = prepare_dataset(base, tokenizer, sequence_length=LENGTH)[0] / "rows"
    before = {path.name for path in directory.iterdir()}
    assert len(before) == 1
    prepare_dataset(base, tokenizer, sequence_length=LENGTH)
    assert {path.name for path in directory.iterdir()} == before
    for config, length in (
        (base, LENGTH + 1),
        (dataclasses.replace(base, objective=BlankFilling()), LENGTH + 1),
        (dataclasses.replace(base, objective=BlankFilling(noise_density=0.3)), LENGTH + 1),
    ):
        prepare_dataset(config, tokenizer, sequence_length=length)
    assert len({path.name for path in directory.iterdir()}) == 4
    (plan,) = directory.glob(f"{before.pop()}/train.pieces")
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-8])
    opened(base, tokenizer)  # it is made again
    assert plan.read_bytes() == whole


def test_wrong_mixtures(folder, tokenizer):
    one = Source("a", ("x",), share=1.0)
    for options, message in (
        ({"path": ("y",), "sources": (one,)}, "path and sources are both given"),
        ({"sources": (one, one)}, "give each another name"),
        ({"sources": (dataclasses.replace(one, share=0.0),)}, "all have the share 0"),
        ({"sources": (one,), "stages": (Stage(0, (1.0,)),)}, "must be after 0"),
        ({"stages": (Stage(3, ()),)}, "there are none: give sources"),
        ({"fields": ("",)}, "must name one field"),
        ({"sources": (one,), "stages": (Stage(1, (1.0, 2.0)),)}, "give each of the 1 sources one"),
        ({"sources": (one,), "stages": (Stage(1, (-1.0,)),)}, "0 or more"),
        ({"sources": (Source("a", ("x",), epochs=1.0),), "stages": (Stage(1, (1.0,)),)}, "a source has epochs"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**{"path": (), **options})
    for options in ({}, {"share": 1.0, "epochs": 1.0}):
        with pytest.raises(UserError, match="one of share and epochs"):
            Source("a", ("x",), **options)
    for options in ({"epochs": 0.0}, {"share": float("nan")}, {"share": -1.0}):
        with pytest.raises(UserError, match="must be a number, "):
            Source("a", ("x",), **options)
    plain = train_tokenizer(texts_of("prose"), vocab_size=280)
    with pytest.raises(UserError, match="no special token '<extra_id_0>'"):
        opened(mixed(folder, {"prose": 1.0}, objective=SpanCorruption()), plain)
    with pytest.raises(UserError, match="no PAD token"):
        opened(mixed(folder, {"prose": 1.0}, objective=SpanCorruption()), tokenizer)
    with pytest.raises(UserError, match=r"cannot fit a token into sequence_length=1"):
        prepare_dataset(mixed(folder, {"prose": 1.0}, objective=MaskedLM()), tokenizer, sequence_length=1)


def test_pairs_and_chats_need_their_parts(folder, tokenizer, tmp_path: Path):
    """Found out when the data is prepared, not when a batch is made."""
    for objective, message in (
        (ParallelText(source_length=20), "60 documents have 60 parts: name two fields"),
        (Chat(), "Chat needs conversations"),
    ):
        with pytest.raises(UserError, match=message):
            opened(mixed(folder, {"prose": 1.0}, objective=objective), tokenizer)
    # WordPiece and whole words make nothing of a space: a pair with such a side is a bad record.
    lines = ['{"en": "one", "fr": "un"}', '{"en": "two", "fr": " "}', '{"en": "", "fr": "trois"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    words = train_tokenizer(["one two un trois"], kind="whitespace", vocab_size=5)
    config = DataConfig(
        path=(str(tmp_path / "pairs.jsonl"),), fields=("en", "fr"), objective=ParallelText(source_length=8),
        validation_fraction=0.0, max_bad_records=2, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    corpus = Corpus(prepare_corpus(config, words).directory, config)
    assert corpus.bad_records["reasons"] == {"has a part without tokens": 2}
    assert corpus.num_documents["train"] == 1


@dataclasses.dataclass(frozen=True)
class Questions(ChatTemplate):
    """Words alone, without a mark."""

    def pieces(self, messages):
        return [Piece(message["content"], trained=message["role"] == "assistant") for message in messages]


def test_answers_stay_answers_without_special_tokens(tmp_path: Path):
    """A tokenizer without BOS and EOS: the end of one document is the beginning of the next."""
    words = train_tokenizer(["who is there me not you"], kind="whitespace", vocab_size=7)
    assert words.bos_id is None
    assert not words.eos_ids
    chat = [{"role": "user", "content": "who is there"}, {"role": "assistant", "content": "not me"}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": chat}) + "\n") * 4)
    config = DataConfig(
        path=(str(tmp_path / "a.jsonl"),), chat_template=Questions(), objective=Chat(), packing="best_fit",
        validation_fraction=0.0, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    dataset = Dataset(
        config, prepare_dataset(config, words, sequence_length=4), Vocabulary.of(words), sequence_length=4, seed=0
    )
    batch = dataset.train[0].read([(0, row) for row in range(4)])
    assert batch["weights"].tolist() == [[0, 0, 1, 1]] * 4
    assert [words.decode(row[2:]) for row in batch["targets"].tolist()] == ["not me"] * 4


def test_a_corpus_that_is_there_is_only_read(folder, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a disk that cannot be written: no lock is taken for what has been made."""
    config = dataclasses.replace(mixed(folder, {"prose": 1.0}, packing="best_fit"), cache_dir=str(tmp_path))
    prepare_dataset(config, tokenizer, sequence_length=LENGTH)

    def no_lock(*_: Any, **__: Any) -> None:
        raise AssertionError("a lock is written")

    for module in ("corpus.prepare", "rows.packing"):
        monkeypatch.setattr(sys.modules[f"llama_jax.data.{module}"], "lock", no_lock)
    assert opened(config, tokenizer).train[0].num_rows
    with pytest.raises(AssertionError, match="a lock is written"):
        prepare_dataset(config, tokenizer, sequence_length=LENGTH + 1)


def test_a_flipped_byte_of_a_plan_is_found(folder, tokenizer, tmp_path: Path):
    config = dataclasses.replace(mixed(folder, {"prose": 1.0}, packing="best_fit"), cache_dir=str(tmp_path))
    (corpus,) = prepare_dataset(config, tokenizer, sequence_length=LENGTH)
    assert damaged_files(corpus) == []
    files = sorted(corpus.glob("rows/*/train.*"))
    assert [file.suffix for file in files] == [".json", ".pieces", ".rows"]
    for file in files:
        content = file.read_bytes()
        for place in np.linspace(0, len(content) - 1, 5, dtype=int):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert [file.name in problem for problem in damaged_files(corpus)] == [True]
            if file.suffix == ".json":  # it is made again
                opened(config, tokenizer)
                assert damaged_files(corpus) == []
                continue
            (rows,) = opened(config, tokenizer).train
            with pytest.raises(UserError, match=f"{file.name}' is not what was written to it"):
                rows.read([(0, row) for row in range(rows.num_rows)])
        file.write_bytes(content)
