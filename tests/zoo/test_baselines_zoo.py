"""The presets of the baselines have the sizes of their papers; no checkpoint is theirs."""

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters

baselines = zoo.all_presets()["baselines"]


def ngram(vocab: int, order: int, hidden: int, width: int) -> int:
    """Word features, the hidden layer of their n - 1, the way back to the width, the head; Bengio et al. 2003 save
    the third."""
    return vocab * width + ((order - 1) * width + 1) * hidden + (hidden + 1) * width + (width + 1) * vocab


def lstm(vocab: int, width: int, layers: int) -> int:
    """Each of a layer's four gates has a matrix for the input, one for the state, and a bias."""
    return vocab * width + layers * 4 * (2 * width + 1) * width + (width + 1) * vocab


COUNTS = {
    "ngram_brown": ngram(vocab=16_383, order=5, hidden=100, width=30),
    "lstm_ptb_small": lstm(vocab=10_000, width=200, layers=2),
    "lstm_ptb_medium": lstm(vocab=10_000, width=650, layers=2),
    "lstm_ptb_large": lstm(vocab=10_000, width=1500, layers=2),
}


def test_presets_have_the_sizes_of_their_papers():
    found = {name: num_parameters(config) for name, config in baselines.presets.items()}
    assert found == COUNTS
    assert [round(found[f"lstm_ptb_{size}"] / 1e6) for size in ("medium", "large")] == [20, 66]
    assert baselines.presets.items() <= zoo.presets().items()


def test_they_are_no_family_of_released_weights():
    assert "llama" in zoo.families()
    with pytest.raises(UserError, match=r"model_type 'baselines' is not one of the families that are known: .*llama"):
        zoo.family("baselines")
