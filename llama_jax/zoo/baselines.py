"""Language models from before attention, at the sizes of their papers. They were never released as weights.

A block is only its mixer: no norm, no residual, no feed-forward, and the head has a bias.
"""

from llama_jax.models import DecoderConfig
from llama_jax.nn import LSTM, Mixer, NGram
from llama_jax.zoo.registry import Presets


def _plain(*, vocab_size: int, hidden_size: int, num_layers: int, mixer: Mixer, dropout: float = 0.0) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=4096,  # they have no limit: only the length of sampled texts
        attention=mixer,
        feed_forward=None,
        norm=None,
        residual=False,
        tie_embeddings=False,
        dropout=dropout,
        head_bias="trained",
    )


def _lstm(width: int, dropout: float) -> DecoderConfig:
    return _plain(vocab_size=10_000, hidden_size=width, num_layers=2, mixer=LSTM(state_size=width), dropout=dropout)


BASELINES = Presets(
    name="baselines",
    title="Language models from before attention",
    presets={
        # Bengio et al. 2003, table 1, MLP9: n = 5, h = 100, m = 30, without direct connections. Their hidden layer goes
        # to the vocabulary at once; here it comes back to the width m first.
        "ngram_brown": _plain(vocab_size=16_383, hidden_size=30, num_layers=1, mixer=NGram(order=5, hidden_size=100)),
        # Zaremba et al. 2014, section 4.1: the model without regularization, the medium and the large one.
        "lstm_ptb_small": _lstm(200, 0.0),
        "lstm_ptb_medium": _lstm(650, 0.5),
        "lstm_ptb_large": _lstm(1500, 0.65),
    },
)
