"""Decoders that transformers builds of a config alone, one line for each golden."""

from collections.abc import Callable, Mapping
from typing import Any

from golden_makers.common import check_reads, own_config, released, write
from golden_makers.decoders import IDS, decoded, find
from transformers import AutoConfig, AutoModelForCausalLM

# Sizes of a tiny decoder, and its special tokens.
TINY = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "vocab_size": 64,
}


def causal(
    name: str,
    settings: Mapping[str, Any],
    *,
    blocks: Callable[[Any], Any] = lambda model: model.model.layers,
    last_norm: Callable[[Any], Any] = lambda model: list(model.model.norm.parameters()),
    change: Callable[[Any], None] = lambda model: None,
    config: Mapping[str, Any] | None = None,
    gain: float = 1.5,
) -> Callable[[], None]:
    """The maker of a golden of `settings`, `model_type` included.

    Its config.json is what the library writes today, with the keys of `config` in place of it where one is given: that
    of a release. `change` is called with the random model.
    """

    def make() -> None:
        kind = AutoModelForCausalLM.from_config(own := AutoConfig.for_model(**settings)).__class__
        model, found = find(name, kind, own, gain=gain, last_norm=last_norm, change=change)
        expected = decoded(model, blocks(model)) | found
        folder = write(name, config or own_config(model), released(model), expected)
        check_reads(folder, kind, lambda model: model(IDS).logits, expected["logits"])

    return make
