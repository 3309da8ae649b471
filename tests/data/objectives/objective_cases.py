"""One of every objective, small enough for a vocabulary of 40, and documents for them."""

import numpy as np

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
    Vocabulary,
)

PAD, BOS, EOS, MASK, CLS, SEP, SOP, EOP, HOLE, X0, X1, X2, X3, STOP = range(14)
FIRST_WORD, SIZE = 14, 40
SPECIAL = dict(zip(["[MASK]", "[CLS]", "[SEP]", "<sop>", "<eop>", "<mask>"], range(MASK, X0), strict=True)) | {
    f"<extra_id_{i}>": X0 + i for i in range(4)
}
# An empty one, too, so that documents of every length have a label.
LABELS = {"": (), "yes": (20,), "no": (21,)}
VOCABULARY = Vocabulary(SIZE, BOS, EOS, PAD, special=SPECIAL, start_ids=(BOS,), sentence_ends=(STOP,), texts=LABELS)

CASES: dict[str, Objective] = {
    "Causal": Causal(),
    "Prefix": Prefix(),
    "Chat": Chat(),
    "Classification": Classification(tuple(LABELS)),
    "BlankFilling": BlankFilling(noise_density=0.3, mean_span_length=2.0),
    "BlankFilling, one dimension": BlankFilling(two_dimensional=False),
    "MaskedLM": MaskedLM(),
    "MaskedLM, no pairs": MaskedLM(next_sentence=False),
    "SpanCorruption": SpanCorruption(noise_density=0.3, mean_span_length=2.0, num_sentinels=4),
    "Denoising": Denoising(),
    "Denoising, in order": Denoising(permute_sentences=False),
    "ParallelText": ParallelText(),
    "Preference": Preference(),
}


def document_of(objective: Objective, length: int, rng: np.random.Generator) -> Document:
    """A document of words and full stops, in as many parts as the objective wants, none twice where that is enough."""
    words = np.arange(STOP, SIZE)
    tokens, other = (
        rng.permutation(words)[:length] if length <= len(words) else rng.choice(words, length) for _ in range(2)
    )
    cuts = np.sort(rng.integers(0, length + 1, size=3))
    if isinstance(objective, Classification):
        cuts = np.array([max(length - 1, 0)])
        tokens[cuts[0] :] = rng.choice([20, 21])
    parts = {"Chat": cuts, "ParallelText": cuts[:1], "Classification": cuts, "Preference": cuts[:2]}
    parts = parts.get(type(objective).__name__, ())
    return Document(tokens.astype(np.int32), parts, other if objective.wants_other else None)


def target_start(document: Document) -> int:
    return int(document.parts[0]) if len(document.parts) else 0


def seen_by(objective: Objective, example: Example) -> np.ndarray:
    """Which positions each position of an example may see, the source before the target: as its paper says."""
    n = len(example["tokens"])
    visible = np.tri(n, dtype=bool)
    if isinstance(objective, Prefix):  # up to the first token that is asked for
        visible[:, : int(np.argmax(example["weights"])) + 1] = True
    elif isinstance(objective, BlankFilling):  # part A, before the first span
        visible[:, : int(np.argmax(example["tokens"] == SOP))] = True
    elif isinstance(objective, MaskedLM):
        visible[:] = True
    elif isinstance(objective, Preference):  # each answer its own prompt and itself
        visible &= example["branch"][:, None] == example["branch"]
    if objective.source_length is None:
        return visible
    m = len(example["source_tokens"])
    return np.block([[np.ones((m, m), bool), np.zeros((m, n), bool)], [np.ones((n, m), bool), visible]])
