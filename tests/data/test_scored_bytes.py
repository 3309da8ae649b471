"""Bits per byte: nats and bytes of the same text, or no number."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama_jax.data import Batches, DataConfig, Dataset, ValidationBatches, Vocabulary, prepare_dataset
from llama_jax.data.corpus import shards
from llama_jax.data.objectives import Prefix
from llama_jax.tokenizers import Tokenizer

TEXTS = ["a", "ab", "é", "word after word", "b" * 37, "naïve", "x\ny\n"]
LENGTH = 8


class Bytes(Tokenizer):
    """A token a byte, from 3 on; the `lost` ones are token 0, which decodes to nothing."""

    def __init__(self, *, bos: bool, eos: bool, lost: bytes = b""):
        self.vocab_size, self.bos_id, self.eos_ids = 259, 1 if bos else None, (2,) if eos else ()
        self.pad_id, self.unk_id, self.special_tokens, self.lost = None, 0, {"<unk>": 0}, lost
        self.files = {"bytes": f"{bos} {eos} {lost!r}".encode()}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0 if byte in self.lost else byte + 3 for byte in text.encode()] for text in texts]

    def decode(self, ids) -> str:
        return bytes(i - 3 for i in ids if i > 2).decode(errors="replace")

    def stream(self):
        raise NotImplementedError


def dataset_of(folder: Path, tokenizer: Tokenizer, records: Sequence[object] = TEXTS, **options) -> Dataset:
    """All of it held out, but for one document."""
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": record}) for record in records))
    config = DataConfig(path=(str(folder / "a.jsonl"),), validation_fraction=1 - 1e-9, cache_dir=str(folder / "cache"))
    config = dataclasses.replace(config, **options)
    with pytest.MonkeyPatch.context() as patch:
        split_of = shards.split_of
        patch.setattr(shards, "split_of", lambda c, o: "train" if b"train" in c else split_of(c, o))
        directories = prepare_dataset(config, tokenizer, sequence_length=LENGTH)
    return Dataset(config, directories, Vocabulary.of(tokenizer), sequence_length=LENGTH, seed=0)


def scored(dataset: Dataset) -> list[int]:
    """The targets of validation that count."""
    batches = ValidationBatches(dataset.validation, global_batch_size=2)
    return [int(i) for batch in batches for i in batch["targets"][batch["weights"] > 0]]


TRAIN = "all of this is train"


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_a_byte_is_eight_bits_to_a_uniform_model(tmp_path: Path, bos: bool, eos: bool, packing):
    texts = [TRAIN, *(text for text in TEXTS if bos or text[0].isascii())]
    dataset = dataset_of(tmp_path, Bytes(bos=bos, eos=eos), texts, packing=packing)
    targets = [i for i in scored(dataset) if i > 2]
    nats = len(targets) * math.log(256)  # of a model that gives every byte 1 / 256 and special tokens 1
    assert dataset.scored_bytes() == len(targets) > 50
    assert nats / math.log(2) / dataset.scored_bytes() == pytest.approx(8)
    lost = sum(len(text.encode()) for text in texts[1:]) - len(targets)
    assert lost == (0 if bos else len(texts) - 1)
    cut = dataset_of(tmp_path / "cut", Bytes(bos=bos, eos=eos), texts, packing=packing, document_chars=7)
    assert cut.scored_bytes() == sum(i > 2 for i in scored(cut))


def told(dataset: Dataset) -> list[str]:
    mixture = dataset.mixture(global_batch_size=2, num_steps=2)
    return dataset.describe(Batches(dataset.train, mixture=mixture, global_batch_size=2, seed=0), 2)


def test_no_number_where_bytes_and_nats_are_of_different_text(tmp_path: Path):
    whole = Bytes(bos=True, eos=True)
    for i, (tokenizer, records, reason) in enumerate(
        (
            (whole, [TRAIN, "text", [100, 101]], "line 3 of .* is no text but token ids"),
            (Bytes(bos=True, eos=True, lost=b"w"), [TRAIN, "text", "word"], "loses text: line 3 of .* is not what its"),
            (Bytes(bos=True, eos=True, lost=b"word"), [TRAIN, "word"], "loses text: line 2 of"),
            (Bytes(bos=False, eos=True), [TRAIN, "text", "é"], "first token of line 3 of .* is part of a character"),
        )
    ):
        dataset = dataset_of(tmp_path / str(i), tokenizer, records)
        assert dataset.scored_bytes() is None
        assert re.match(f"data: no val_bits_per_byte, for .*{reason}", told(dataset)[-1])
    assert dataset_of(tmp_path / "text", whole, [TRAIN, "text"]).scored_bytes() == 4
    prefix = dataset_of(tmp_path / "prefix", whole, [TRAIN, "text"], objective=Prefix())
    assert prefix.scored_bytes() is None
    assert not any("bits" in line for line in told(prefix))


def test_what_was_left_out_is_told_each_time(tmp_path: Path):
    """Also of a corpus that an older version prepared, which says less."""
    tokenizer = Bytes(bos=True, eos=True)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "notes.txt").write_bytes(b"text\xff")
    config = {"path": (str(tmp_path / "*"),), "exclude": ("cache*",), "max_bad_records": 1}
    for _ in range(2):
        dataset = dataset_of(tmp_path, tokenizer, [TRAIN, "text", 3], **config)
        first, second = f"{tmp_path / 'notes.txt'}: not UTF-8", f"{tmp_path / 'picture.png'}: a PNG image"
        assert told(dataset)[1:] == [
            f"data: skipped: 2, the first being {first}; {second}",
            f"data: bad records (has a field of another type): 1, first line 3 of '{tmp_path / 'a.jsonl'}' has a field "
            "of another type ('text' is no text, no list of token ids and no list of messages)",
        ]
    corpus = dataset.corpora["data"]
    index = json.loads((corpus.directory / "index.json").read_text())
    assert (index.pop("scored_bytes"), index.pop("unscored")) == (4, "")
    (corpus.directory / "index.json").write_text(json.dumps(index))
    old = dataset_of(tmp_path, tokenizer, [TRAIN, "text", 3], **config)
    assert old.corpora["data"].directory == corpus.directory
    assert old.scored_bytes() is None
    assert f"prepared before the bytes were counted: remove '{corpus.directory}'" in told(old)[-1]
