"""What every objective keeps to, whatever is drawn."""

import dataclasses
import itertools

import numpy as np
import objective_cases as cases
import pytest
from hypothesis import given, settings, strategies as st
from objective_cases import BOS, CASES, EOP, EOS, HOLE, MASK, PAD, SOP, STOP, VOCABULARY, X0, X1

from llama_jax.config import UserError, choices, field_docs, field_types
from llama_jax.data.objectives import (
    BlankFilling,
    Causal,
    Chat,
    Classification,
    Denoising,
    Document,
    Example,
    MaskedLM,
    Objective,
    ParallelText,
    Preference,
    Prefix,
    SequenceToSequence,
    SpanCorruption,
    Vocabulary,
)
from llama_jax.data.objectives.encoder_decoder import permuted

# With a text that is written as another is.
SAME = dataclasses.replace(VOCABULARY, texts=cases.LABELS | {"si": (20,)})
every_objective = pytest.mark.parametrize("name", CASES)


def example_of(objective: Objective, document: Document, seed: int = 0) -> Example:
    return objective.example(document, np.random.default_rng(seed), VOCABULARY)


def words(*ids: int, **fields) -> Document:
    return Document(np.array(ids, np.int32), **fields)


def test_every_objective_has_its_cases():
    assert {type(objective).__name__ for objective in CASES.values()} == set(choices(Objective))


@every_objective
def test_fields_are_those_announced(name: str):
    objective = CASES[name]
    for length in (0, 1, 2, 20):
        document = cases.document_of(objective, length, np.random.default_rng(length))
        example = example_of(objective, document)
        assert set(example) == set(objective.fields())
        for source in (True, False):
            assert len({x.shape for field, x in example.items() if field.startswith("source_") == source}) <= 1
        for field, x in example.items():
            assert x.dtype == (np.float32 if "weights" in field else np.int32), field
    assert any(field.startswith("source_") for field in example) == (objective.source_length is not None)
    assert objective.overlap == (not objective.bare), "left to right needs the token before, and the text's own ends"


@every_objective
@settings(max_examples=3)
@given(seed=st.integers(0, 1 << 32))
def test_lengths_are_exact_for_every_size_and_draw(name: str, seed: int):
    objective, sizes = CASES[name], np.r_[0:60, 60:301:7]
    rng = np.random.default_rng(seed)
    documents = [cases.document_of(objective, int(n), rng) for n in sizes]
    starts = np.array([cases.target_start(document) for document in documents])
    examples = [objective.example(document, rng, VOCABULARY) for document in documents]
    streams = ["tokens"] + ["source_tokens"] * (objective.source_length is not None)
    expected = objective.lengths(sizes, starts)
    assert len(expected) == len(streams)
    for stream, lengths in zip(streams, expected, strict=True):
        np.testing.assert_array_equal([len(example[stream]) for example in examples], lengths)
    for lengths in objective.lengths(sizes, np.zeros_like(sizes)):
        assert (np.diff(lengths) >= 0).all(), "a longer document must not get a shorter example"


@pytest.mark.parametrize("objective", [BlankFilling, SpanCorruption, Denoising])
@settings(max_examples=40)
@given(
    length=st.integers(0, 300), density=st.floats(0.01, 0.99), mean=st.floats(1, 20), seed=st.integers(0, 1000)
)  # fmt: skip
def test_lengths_are_exact_for_every_density(objective, length: int, density: float, mean: float, seed: int):
    noisy = objective(noise_density=density, mean_span_length=mean)
    if isinstance(noisy, SpanCorruption):
        noisy = dataclasses.replace(noisy, num_sentinels=4)
    document = cases.document_of(noisy, length, np.random.default_rng(seed))
    example = example_of(noisy, document, seed)
    lengths = noisy.lengths(np.array([length]), np.array([0]))
    found = [len(example[stream]) for stream in ("tokens", "source_tokens") if stream in example]
    assert found == [int(x[0]) for x in lengths]
    rising = noisy.lengths(np.arange(length + 2), np.zeros(length + 2, int))
    assert all((np.diff(x) >= 0).all() for x in rising)


@every_objective
def test_an_example_is_a_function_of_the_generator(name: str):
    objective = CASES[name]
    document = cases.document_of(objective, 20, np.random.default_rng(3))
    first, again, *others = (example_of(objective, document, seed) for seed in (1, 1, 2, 3, 4, 5))
    for field, x in first.items():
        np.testing.assert_array_equal(again[field], x)
    drawn = any((first[field] != other[field]).any() for other in others for field in first)
    assert drawn == (not isinstance(objective, Causal | Chat | Classification | ParallelText | Preference))


def num_targets(objective: Objective, document: Document, example: Example) -> int:
    """How many tokens must have a loss, counted on the document."""
    text, length = document.tokens.tolist(), len(document.tokens)
    if isinstance(objective, Prefix):
        return length - int(example["prefix"].sum())
    if isinstance(objective, Chat):
        one, two, three = document.parts
        return len([t for t in range(1, length) if one <= t < two or t >= three])
    if isinstance(objective, BlankFilling):
        seen = example["tokens"][: int(example["prefix"].sum())].tolist()
        return len(set(text) - set(seen)) + seen.count(MASK)  # and the end of each span
    if isinstance(objective, MaskedLM):
        return max(1, round(0.15 * length))
    if isinstance(objective, SpanCorruption):
        source = example["source_tokens"].tolist()
        return len(set(text) - set(source)) + len(set(source) - set(text))  # sentinels and EOS
    if isinstance(objective, Classification):
        return 1
    if isinstance(objective, ParallelText):
        return length - int(document.parts[0]) + 1
    if isinstance(objective, Preference):
        start, middle = document.parts
        return sum(max(n - (start == 0), 0) for n in (middle - start, length - middle))
    return length + (1 if isinstance(objective, Denoising) else -1)


@every_objective
@pytest.mark.parametrize("length", [4, 11, 26])
def test_weights_count_the_tokens_that_are_asked_for(name: str, length: int):
    objective = CASES[name]
    for seed in range(5):
        document = cases.document_of(objective, length, np.random.default_rng(seed))
        example = example_of(objective, document, seed)
        assert set(example["weights"].tolist()) <= {0.0, 1.0}
        assert example["weights"].sum() == num_targets(objective, document, example)


def filled(example: Example) -> list[int]:
    """The text of blanks and the spans that fill them, by the blanks' positions."""
    tokens, targets = example["tokens"].tolist(), example["targets"].tolist()
    starts = [i for i, token in enumerate(tokens) if token == SOP]
    spans = {int(example["positions"][i]): targets[i : targets.index(EOP, i)] for i in starts}
    part_a = tokens[: starts[0]]
    return [x for i, token in enumerate(part_a) for x in (spans[i] if token == MASK else [token])]


def spliced(example: Example) -> list[int]:
    """The text of a source's sentinels and the spans behind them in the target."""
    source, target = example["source_tokens"][:-1].tolist(), example["targets"][:-1].tolist()
    starts = [i for i, token in enumerate(target) if X0 <= token < STOP]
    spans = {target[i]: target[i + 1 : j] for i, j in itertools.pairwise([*starts, len(target)])}
    return [x for token in source for x in spans.get(token, [token])]


@settings(max_examples=60)
@given(length=st.integers(1, 26), seed=st.integers(0, 1000), density=st.floats(0.05, 0.9))
def test_the_text_comes_back_from_source_and_target(length: int, seed: int, density: float):
    for objective, read in (
        (BlankFilling(density, 2.0), filled),
        (SpanCorruption(density, 2.0, num_sentinels=4), spliced),
    ):
        document = cases.document_of(objective, length, np.random.default_rng(seed))
        assert read(example_of(objective, document, seed)) == document.tokens.tolist()


@settings(max_examples=60)
@given(length=st.integers(1, 26), seed=st.integers(0, 1000), density=st.floats(0.05, 0.9))
def test_an_infilling_lacks_tokens_only_where_a_mask_stands(length: int, seed: int, density: float):
    objective = Denoising(density, 2.0, permute_sentences=False)
    document = cases.document_of(objective, length, np.random.default_rng(seed))
    example = example_of(objective, document, seed)
    text, source = document.tokens.tolist(), example["source_tokens"].tolist()
    assert example["targets"].tolist() == [*text, EOS]
    assert example["tokens"].tolist() == [EOS, *text]
    last = -1
    for before, token in itertools.pairwise([PAD, *source[:-1]]):
        if token != HOLE:
            place = text.index(token)
            assert place > last if before == HOLE else place == last + 1
            last = place
    assert last == length - 1 or source[-2] == HOLE


def test_spans_of_no_tokens_are_masks_too():
    objective = Denoising(permute_sentences=False)
    document = cases.document_of(objective, 26, np.random.default_rng(0))
    neighbours = set(itertools.pairwise(document.tokens.tolist()))
    sources = [example_of(objective, document, seed)["source_tokens"].tolist() for seed in range(30)]
    around = [
        (a, c) for source in sources for a, b, c in zip(source, source[1:], source[2:], strict=False) if b == HOLE
    ]
    assert neighbours & set(around)
    assert {pair for pair in around if HOLE not in pair} - neighbours


def test_sentences_are_permuted_whole():
    sentences = [[20, 21, STOP], [22, STOP], [STOP], [23, 24, 25]]
    text = np.concatenate(sentences)
    found = {tuple(permuted(np.random.default_rng(seed), text, (STOP,)).tolist()) for seed in range(300)}
    assert found == {tuple(itertools.chain.from_iterable(order)) for order in itertools.permutations(sentences)}


def test_one_in_ten_stays_and_one_in_ten_is_random():
    vocabulary = Vocabulary(1000, 1, 2, 0, special={"[MASK]": 500, "[CLS]": 999, "[SEP]": 7})
    text = np.random.default_rng(0).choice(np.setdiff1d(np.arange(1000), vocabulary.special_ids), 40000)
    example = MaskedLM(next_sentence=False).example(Document(text), np.random.default_rng(1), vocabulary)
    chosen = example["weights"] == 1
    tokens, targets = example["tokens"][chosen], example["targets"][chosen]
    assert (example["tokens"][~chosen] == example["targets"][~chosen]).all()
    np.testing.assert_array_equal(example["targets"][1:-1], text)
    total = int(chosen.sum())
    assert total == 6000
    kept, masked = int((tokens == targets).sum()), int((tokens == 500).sum())
    for count, share in ((masked, 0.8), (kept, 0.1), (total - masked - kept, 0.1)):
        assert abs(count - share * total) < 4 * np.sqrt(total * share * (1 - share))
    random = tokens[(tokens != 500) & (tokens != targets)]
    assert not np.isin(random, vocabulary.special_ids).any()
    quarters = np.bincount(random // 250, minlength=4) / len(random)
    assert (abs(quarters - 0.25) < 0.08).all(), "all of the vocabulary"


def test_random_ids_are_all_but_the_special_ones():
    drawn = VOCABULARY.random_ids(np.random.default_rng(0), 2000)
    assert set(drawn.tolist()) == set(range(STOP, cases.SIZE))
    scattered = Vocabulary(6, None, 5, 0, special={"a": 2, "b": 3})
    assert set(scattered.random_ids(np.random.default_rng(0), 100).tolist()) == {1, 4}


def test_special_tokens_of_a_text_are_never_chosen():
    document = words(20, EOS, 21, BOS, PAD, X1)
    for seed in range(50):
        example = example_of(MaskedLM(next_sentence=False, masked_fraction=0.9), document, seed)
        assert example["weights"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_half_of_the_pairs_follow_and_their_lengths_tell_nothing():
    own, other = np.arange(14, 24), np.arange(24, 34)
    for theirs, size_b in ((other, 5), (other[:3], 3)):
        follows = 0
        for seed in range(400):
            example = example_of(MaskedLM(), Document(own, other=theirs), seed)
            label, targets = int(example["pair_targets"][0]), example["targets"]
            a, b = targets[1 : 11 - size_b], targets[12 - size_b : -1]
            np.testing.assert_array_equal(a, own[: 10 - size_b])
            if label:
                np.testing.assert_array_equal(b, own[10 - size_b :])
            else:
                assert set(b.tolist()) <= set(theirs.tolist())
                assert (np.diff(b) == 1).all()
            np.testing.assert_array_equal(example["token_types"], np.arange(13) >= 12 - size_b)
            np.testing.assert_array_equal(example["pair_weights"], np.arange(13) == 0)
            assert (example["pair_targets"][1:] == 0).all()
            follows += label
        assert abs(follows - 200) < 40
    alone = example_of(MaskedLM(), Document(own))
    assert alone["pair_targets"][0] == 1, "where there is no other, B follows"


def test_prefixes_of_every_length_are_as_likely():
    document = words(*range(14, 20))
    lengths = [int(example_of(Prefix(), document, seed)["prefix"].sum()) for seed in range(500)]
    counts = np.bincount(lengths, minlength=6)
    assert counts[0] == 0
    assert (abs(counts[1:] - 100) < 40).all()


def test_no_text_has_more_spans_than_there_are_sentinels():
    objective = SpanCorruption(noise_density=0.5, mean_span_length=1.0, num_sentinels=4)
    document = cases.document_of(objective, 300, np.random.default_rng(0))
    source = example_of(objective, document)["source_tokens"]
    assert [t for t in source.tolist() if X0 <= t < STOP] == list(range(X0, STOP))


@every_objective
def test_what_a_tokenizer_lacks_is_named(name: str):
    objective = CASES[name]
    document = cases.document_of(objective, 20, np.random.default_rng(0))
    for token in objective.special_tokens()[:3]:  # of the sentinels those that this text needs
        if token == "<extra_id_2>":
            continue
        lacking = {other: i for other, i in cases.SPECIAL.items() if other != token}
        with pytest.raises(
            UserError, match=f"no special token '{token}': train it with special_tokens".replace("[", r"\[")
        ):
            objective.example(document, np.random.default_rng(0), dataclasses.replace(VOCABULARY, special=lacking))
    if isinstance(objective, SequenceToSequence):
        for which in {"eos", objective.start_token}:
            vocabulary = dataclasses.replace(VOCABULARY, **{f"{which}_id": None})
            with pytest.raises(UserError, match=f"has no {which.upper()} token"):
                objective.example(document, np.random.default_rng(0), vocabulary)


@every_objective
def test_every_option_says_what_it_is(name: str):
    cls = type(CASES[name])
    assert set(field_docs(cls)) == set(field_types(cls))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MaskedLM(masked_fraction=1.0), "masked_fraction=1.0 must be between 0 and 1"),
        (lambda: BlankFilling(noise_density=0.0), "noise_density=0.0 must be between 0 and 1"),
        (lambda: Denoising(mean_span_length=0.5), "mean_span_length=0.5 must be at least 1"),
        (lambda: SpanCorruption(num_sentinels=0), "num_sentinels=0 must be at least 1"),
        (lambda: ParallelText(source_length=0), "source_length=0 must be at least 1"),
        (lambda: Classification(("yes",)), "labels=yes must be two different ones or more"),
        (lambda: Classification(("yes", "yes")), "labels=yes,yes must be two different ones"),
        (lambda: example_of(Classification(("yes", "no")), words(20, 21)), "1 documents have 1 parts: name two fields"),
        (lambda: example_of(Classification(("yes", "no")), words(30, 22, parts=(1,))), r"tokens \[22\], and none of"),
        (lambda: Classification(("yes", "")).check(VOCABULARY), "writes the label '' with no token"),
        (lambda: Classification(("yes", "si")).check(SAME), "writes the label 'si' as it does 'yes'"),
        (lambda: example_of(ParallelText(), words(20, 21)), "1 documents have 1 parts: name two fields"),
    ],
)
def test_impossible_objectives(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()
