"""An example of each objective, worked out by hand."""

import numpy as np
from objective_cases import BOS, CLS, EOP, EOS, HOLE, MASK, PAD, SEP, SOP, STOP, VOCABULARY, X0, X1

from llama_jax.config import choices
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
    SpanCorruption,
)

A, B, C, D, E, F = range(20, 26)


def check(objective: Objective, document: Document, drawn: str = "tokens", **expected: list[int]) -> None:
    """The objective gives `expected` for the first seed that draws the field `drawn` as written there."""
    for seed in range(20000):
        example: Example = objective.example(document, np.random.default_rng(seed), VOCABULARY)
        if example[drawn].tolist() == expected[drawn]:
            assert {name: x.tolist() for name, x in example.items()} == expected
            return
    raise AssertionError(f"no draw gives {drawn}={expected[drawn]}, the last one {example[drawn].tolist()}")


def words(*ids: int, **fields) -> Document:
    return Document(np.array(ids, np.int32), **fields)


def test_causal():
    check(
        Causal(), words(BOS, A, B, EOS),
        tokens=[BOS, A, B], targets=[A, B, EOS], weights=[1, 1, 1], positions=[0, 1, 2],
    )  # fmt: skip


def test_prefix():
    check(
        Prefix(), words(BOS, A, B, C, EOS), drawn="prefix", prefix=[1, 1, 0, 0],
        tokens=[BOS, A, B, C], targets=[A, B, C, EOS], weights=[0, 1, 1, 1], positions=[0, 1, 2, 3],
    )  # fmt: skip


def test_chat():
    check(
        Chat(), words(BOS, A, B, EOS, C, D, EOS, parts=(2, 4, 5)),
        tokens=[BOS, A, B, EOS, C, D], targets=[A, B, EOS, C, D, EOS],
        weights=[0, 1, 1, 0, 1, 1], positions=[0, 1, 2, 3, 4, 5],
    )  # fmt: skip
    # A piece that begins inside an answer: its part 0 is empty.
    check(
        Chat(), words(A, B, C, parts=(0, 2)), tokens=[A, B], targets=[B, C], weights=[1, 0], positions=[0, 1]
    )  # fmt: skip


# Figure 2 of Du et al. 2022: c, and e with f, are missing; the second is predicted first.
FIGURE = {
    "tokens": [A, B, MASK, D, MASK, SOP, E, F, SOP, C], "targets": [0, 0, 0, 0, 0, E, F, EOP, C, EOP],
    "weights": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1], "prefix": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
}  # fmt: skip


def test_blank_filling():
    check(
        BlankFilling(0.5, 1.5), words(A, B, C, D, E, F), **FIGURE,
        positions=[0, 1, 2, 3, 4, 4, 4, 4, 2, 2], block_positions=[0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
    )  # fmt: skip
    one = BlankFilling(0.5, 1.5, two_dimensional=False)
    check(one, words(A, B, C, D, E, F), **FIGURE, positions=list(range(10)))


def test_masked_lm():
    check(
        MaskedLM(), words(A, B, C, D, other=np.array([E, F])), tokens=[CLS, A, MASK, SEP, C, D, SEP],
        targets=[CLS, A, B, SEP, C, D, SEP], weights=[0, 0, 1, 0, 0, 0, 0], positions=[0, 1, 2, 3, 4, 5, 6],
        prefix=[1] * 7, token_types=[0, 0, 0, 0, 1, 1, 1],
        pair_targets=[1, 0, 0, 0, 0, 0, 0], pair_weights=[1, 0, 0, 0, 0, 0, 0],
    )  # fmt: skip
    check(
        MaskedLM(), words(A, B, C, D, other=np.array([E, F])), tokens=[CLS, MASK, B, SEP, E, F, SEP],
        targets=[CLS, A, B, SEP, E, F, SEP], weights=[0, 1, 0, 0, 0, 0, 0], positions=[0, 1, 2, 3, 4, 5, 6],
        prefix=[1] * 7, token_types=[0, 0, 0, 0, 1, 1, 1],
        pair_targets=[0] * 7, pair_weights=[1, 0, 0, 0, 0, 0, 0],
    )  # fmt: skip
    check(
        MaskedLM(next_sentence=False), words(A, B), tokens=[CLS, MASK, B, SEP], targets=[CLS, A, B, SEP],
        weights=[0, 1, 0, 0], positions=[0, 1, 2, 3], prefix=[1] * 4,
    )  # fmt: skip


def test_span_corruption():
    check(
        SpanCorruption(0.5, 1.0, num_sentinels=4), words(A, B, C, D),  # the only way to cut four tokens
        source_tokens=[A, X0, C, X1, EOS], source_positions=[0, 1, 2, 3, 4],
        tokens=[PAD, X0, B, X1, D], targets=[X0, B, X1, D, EOS], weights=[1] * 5, positions=[0, 1, 2, 3, 4],
    )  # fmt: skip


def test_denoising():
    check(
        Denoising(), words(A, STOP, B, C, STOP), drawn="source_tokens",
        source_tokens=[B, HOLE, A, STOP, EOS], source_positions=[0, 1, 2, 3, 4],
        tokens=[EOS, A, STOP, B, C, STOP], targets=[A, STOP, B, C, STOP, EOS],
        weights=[1] * 6, positions=[0, 1, 2, 3, 4, 5],
    )  # fmt: skip


def test_parallel_text():
    check(
        ParallelText(), words(A, B, C, parts=(1,)), source_tokens=[A, EOS], source_positions=[0, 1],
        tokens=[BOS, B, C], targets=[B, C, EOS], weights=[1, 1, 1], positions=[0, 1, 2],
    )  # fmt: skip


def test_classification():
    check(
        Classification(("yes", "no")), words(A, B, C, 21, parts=(3,)),  # 21 is how "no" is written
        tokens=[CLS, A, B, C, SEP], class_targets=[1, 0, 0, 0, 0], weights=[1, 0, 0, 0, 0], positions=[0, 1, 2, 3, 4],
    )  # fmt: skip


def test_preference():
    check(  # prompt A B, chosen C, rejected D E; the document's end belongs to both answers
        Preference(), words(BOS, A, B, C, D, E, EOS, parts=(3, 4)),
        tokens=[BOS, A, B, C, BOS, A, B, D, E], targets=[A, B, C, EOS, A, B, D, E, EOS],
        weights=[0, 0, 1, 1, 0, 0, 1, 1, 1], positions=[0, 1, 2, 3, 0, 1, 2, 3, 4], branch=[0, 0, 0, 0, 1, 1, 1, 1, 1],
    )  # fmt: skip
    check(  # an empty answer is the end alone
        Preference(), words(BOS, A, D, EOS, parts=(2, 2)),
        tokens=[BOS, A, BOS, A, D], targets=[A, EOS, A, D, EOS], weights=[0, 1, 0, 1, 1], positions=[0, 1, 0, 1, 2],
        branch=[0, 0, 1, 1, 1],
    )  # fmt: skip


def test_there_is_one_of_each():
    worked = {name.removeprefix("test_").replace("_", "") for name in globals() if name.startswith("test_")}
    assert {name.lower() for name in choices(Objective)} <= worked
