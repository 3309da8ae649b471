"""1,000 random cases of settings, texts and logits; a group is a batch under the same settings of a model's files."""

from typing import Any

import numpy as np

GROUPS, ROWS = 5, 200
VOCABULARY, EOS, LENGTH = 14, (2, 9), 12


def files(group: int) -> dict[str, Any]:
    """What a generation_config.json says, in transformers' words."""
    rng = np.random.default_rng([14, group])
    ids = rng.permutation(VOCABULARY).tolist()
    found = {
        "repetition_penalty": float(rng.uniform(0.6, 1.6)),
        "no_repeat_ngram_size": int(rng.integers(2, 4)),
        "bad_words_ids": [[ids[0]], [ids[1], ids[2]], [ids[3], ids[4], ids[5]]],
        "min_length": int(rng.integers(3, 8)),
        "min_new_tokens": int(rng.integers(1, 4)),
        "forced_bos_token_id": ids[6],
        "forced_eos_token_id": ids[7],
        "suppress_tokens": ids[8:9],
        "begin_suppress_tokens": ids[9:11],
    }
    return {key: value for key, value in found.items() if rng.random() < 0.5}


def user(group: int, row: int) -> dict[str, Any]:
    """Options of `SamplingConfig`."""
    rng = np.random.default_rng([2, group, row])
    # transformers refuses to forbid what is forced.
    forced = {files(group).get(key) for key in ("forced_bos_token_id", "forced_eos_token_id")}
    ids = [i for i in rng.permutation(VOCABULARY).tolist() if i not in forced]
    found = {
        "top_k": int(rng.integers(1, VOCABULARY)),
        "top_p": float(rng.uniform(0.2, 0.98)),
        "min_p": float(rng.uniform(0.02, 0.5)),
        "typical_p": float(rng.uniform(0.2, 0.98)),
        "repetition_penalty": float(rng.uniform(0.6, 1.6)),
        "no_repeat_ngram_size": int(rng.integers(1, 4)),
        "logit_bias": {i: float(rng.normal(0, 3)) for i in ids[:3]},
        "banned_ids": ids[3:5],
        "min_new_tokens": int(rng.integers(1, 5)),
    }
    found = {key: value for key, value in found.items() if rng.random() < 0.35}
    temperature = float(rng.uniform(0.3, 2)) if rng.random() < 0.7 else 0.0
    return {"temperature": temperature, "max_new_tokens": int(rng.integers(1, 6)), **found}


def text(group: int, row: int) -> tuple[list[int], int]:
    """Ids of the text so far, and how many of them are the prompt."""
    rng = np.random.default_rng([3, group, row])
    length = int(rng.integers(1, LENGTH))
    # Few different tokens, so that sequences come again.
    ids = rng.integers(0, VOCABULARY) + rng.integers(0, 3, length)
    return (ids % VOCABULARY).tolist(), int(rng.integers(1, length + 1))


def logits(group: int) -> np.ndarray:
    """Float32 [rows, vocabulary]."""
    return np.random.default_rng([4, group]).normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)
