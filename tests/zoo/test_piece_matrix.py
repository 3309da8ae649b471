"""Every choice of attention, norms, positions and feed-forward: it has gradients, or is refused in a sentence."""

from pathlib import Path

import jax
import numpy as np
import pytest
from piece_matrix import ATTENTIONS, combinations, covering, gradient, made, matrix

from llama_jax.parallel import make_mesh

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"


def test_what_is_refused_says_what_to_change():
    """Attention goes with everything, recurrent networks have no scores and no rotary positions."""
    found = {names: made(names) for names in combinations()}
    refused = {names: sentence for names, sentence in found.items() if isinstance(sentence, str)}
    assert 0 < len(refused) < len(found) / 3
    for (attention, _, positions, _), sentence in refused.items():
        assert attention in ("sparse", "Elman", "LSTM", "GRU", "delta rule", "n-gram", "Mamba-2"), attention
        assert positions in ("rotary", "ALiBi", "relative bias"), positions
        assert ": set it to none" in sentence or "has no 'rope'" in sentence, sentence


def test_the_page_has_the_matrix():
    assert matrix() in PAGE.read_text("utf-8"), "run: python docs/zoo_table.py"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_pair_has_gradients(attention: str):
    for names in (names for names in covering() if names[0] == attention):
        config = made(names)
        assert not isinstance(config, str)
        with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
            loss, found = gradient(config)
        assert abs(loss - np.log(config.vocab_size)) < 1.5, names
        for name, value in found.items():
            assert np.isfinite(value).all(), (names, name)
            # What is added to all keys alike does not change who is seen; an indexer without a loss is not trained.
            idle = name.endswith("k_proj.bias") or "indexer" in name
            assert idle or np.abs(value).max() > 0, f"{names}: {name} has no gradient"
