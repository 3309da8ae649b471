"""Windows of a stream and their order, for random streams, sizes, rows and restart points."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.data import Batches, HostBatch, Shard, TokenStream, ValidationBatches
from llama_jax.data.mixture import Mixture, Schedule
from llama_jax.data.rows.windows import WindowRows

BOS, EOS = 1, 2


def make_stream(sizes: list[int], *, num_shards: int = 1) -> TokenStream:
    """Documents of `sizes` ordinary tokens between BOS and EOS; ordinary tokens are all different."""
    number = itertools.count(3)
    documents = [[BOS, *itertools.islice(number, size), EOS] for size in sizes]
    shards = []
    for i in range(num_shards):
        part = documents[i * len(documents) // num_shards : (i + 1) * len(documents) // num_shards]
        starts = np.cumsum([0, *map(len, part)])[:-1]
        tokens = np.array([*itertools.chain(*part)], np.uint16)
        shards.append(Shard(tokens, starts, np.zeros(0, np.int64)))
    return TokenStream(shards)


def all_of(stream: TokenStream) -> tuple[list[int], list[int]]:
    """Its tokens, and where documents begin, by counting."""
    tokens = [int(token) for shard in stream.shards for token in shard.tokens]
    return tokens, [place for place, token in enumerate(tokens) if token == BOS]


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def expected_row(stream: TokenStream, index: int, length: int) -> dict[str, list]:
    """Window `index` said token by token."""
    tokens, documents = all_of(stream)
    document_of = np.cumsum(np.isin(np.arange(len(tokens)), documents)).tolist()
    start = index * length
    row = {name: [] for name in ("tokens", "targets", "weights", "segment_ids", "positions")}
    for p in range(start, start + length):
        if p + 1 >= len(tokens):
            values = (0, 0, 0, 0, 0)
        else:
            begin = max(start, max(int(d) for d in documents if d <= p))
            same = document_of[p] == document_of[p + 1]
            values = (tokens[p], tokens[p + 1], int(same), document_of[p] - document_of[start] + 1, p - begin)
        for name, value in zip(row, values, strict=True):
            row[name].append(value)
    return row


@given(sizes=sizes, num_shards=st.integers(1, 4), length=st.integers(1, 12), data=st.data())
def test_window_is_what_it_says(sizes: list[int], num_shards: int, length: int, data: st.DataObject):
    stream = make_stream(sizes, num_shards=num_shards)
    rows = WindowRows(stream, length, partial=True)
    indices = data.draw(st.lists(st.integers(0, rows.num_rows + 1), min_size=1, max_size=4))
    batch = rows.read([(0, index) for index in indices])
    for row, index in enumerate(indices):
        for name, values in expected_row(stream, index, length).items():
            assert batch[name][row].tolist() == values, (name, index)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32", "positions": "int32",
    }  # fmt: skip


@given(sizes=sizes, num_shards=st.integers(1, 4), length=st.integers(1, 12), batch_size=st.sampled_from([4, 8]))
def test_validation_sees_every_target_once(sizes: list[int], num_shards: int, length: int, batch_size: int):
    stream = make_stream(sizes, num_shards=num_shards)
    sources = [WindowRows(stream, length, partial=True)]
    batches = ValidationBatches(sources, global_batch_size=batch_size)
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])  # in order, too
    tokens, documents = all_of(stream)
    assert targets.tolist() == np.delete(tokens, documents).tolist()
    assert all(b["tokens"].shape == (batch_size, length) for b in batches)
    assert len(ValidationBatches(sources, global_batch_size=batch_size, max_batches=1)) == 1
    rows = [3, 0]
    part = ValidationBatches(sources, global_batch_size=batch_size, rows=rows)
    for whole, ours in zip(batches, part, strict=True):
        assert_equal(ours, {name: value[rows] for name, value in whole.items()})


def assert_equal(a: HostBatch, b: HostBatch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


STREAM = make_stream([5, 0, 17, 8, 40, 3] * 5, num_shards=3)


def make_batches(*, seed: int = 0, size: int = 8, **options) -> Batches:
    return Batches([WindowRows(STREAM, 7, partial=False)], global_batch_size=size, seed=seed, **options)


def order_of(batches: Batches, num_steps: int) -> list[int]:
    return [window for step in range(num_steps) for _, _, window in batches.places(step)]


@given(seed=st.integers(0, 2**31), size=st.integers(1, 9))
def test_every_epoch_is_a_permutation(seed: int, size: int):
    check_epochs(seed, size)


def test_every_epoch_of_a_long_stream_is_a_permutation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llama_jax.data.batches.SMALL", 10)
    check_epochs(seed=3, size=4)


def check_epochs(seed: int, size: int) -> None:
    batches = make_batches(seed=seed, size=size)
    n = (STREAM.num_tokens - 1) // 7
    order = order_of(batches, 2 * n // size + 2)
    first, second = order[:n], order[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert first != sorted(first)


def test_seeds_have_orders_of_their_own():
    n = (STREAM.num_tokens - 1) // 7
    orders = [order_of(make_batches(seed=seed, size=1), 2 * n) for seed in (0, 1)]
    assert orders[0][:n] != orders[1][:n]
    assert orders[0][n:] != orders[1][:n]  # not the same sequence shifted by an epoch


@pytest.mark.parametrize("num_prefetch", [0, 1, 5])
@pytest.mark.parametrize("start", [0, 3, 1000])
def test_iterating_is_indexing(num_prefetch: int, start: int):
    batches = make_batches(num_prefetch=num_prefetch)
    for step, batch in zip(range(start, start + 12), batches.iterate(start), strict=False):
        assert_equal(batch, batches.batch(step))


@pytest.mark.parametrize("rows", [range(8), range(4, 8), [0, 1, 6, 7]], ids=str)
def test_rows_are_those_of_the_global_batch(rows: list[int] | range):
    iterator = make_batches(rows=rows).iterate(2)
    for step in range(2, 14):
        assert_equal(next(iterator), {name: value[list(rows)] for name, value in make_batches().batch(step).items()})


@pytest.mark.parametrize("skip", [(0,), (3, 4, 4), (9, 2, 0), ()])
def test_skipped_batches_are_those_that_no_step_takes(skip: tuple[int, ...]):
    batches, plain = make_batches(skip=skip), make_batches()
    left = [number for number in range(15) if number not in skip]
    assert [batches.number(step) for step in range(len(left))] == left
    for step in (0, 3, 5):
        assert_equal(batches.batch(step), plain.batch(left[step]))
    assert_equal(next(batches.iterate(4)), batches.batch(4))


@given(skip=st.lists(st.integers(0, 12), max_size=6), step=st.integers(0, 12))
def test_what_sources_gave_is_what_steps_took(skip: list[int], step: int):
    rows = WindowRows(STREAM, 7, partial=False)
    batches = Batches(
        [rows] * 3, global_batch_size=4, seed=1, mixture=Mixture(((0, Schedule([0.6, 0.3, 0.1])),)), skip=skip
    )
    taken = [source for before in range(step) for source, _, _ in batches.places(before)]
    assert batches.num_sequences(step) == [taken.count(source) for source in range(3)]


def test_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        Batches([WindowRows(make_stream([2]), 300, partial=False)], global_batch_size=1, seed=0)
