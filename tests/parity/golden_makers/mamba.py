"""Goldens of Mamba-2: as it is released, and with several groups, biases and limits of the step."""

from typing import Any

from golden_makers.causal import causal

TINY: dict[str, Any] = {
    "bos_token_id": 1,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_size": 24,
    "model_type": "mamba2",
    "n_groups": 1,
    "num_heads": 6,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "state_size": 5,
    "tie_word_embeddings": True,
    "vocab_size": 64,
}
GROUPS = {
    "n_groups": 2,
    "tie_word_embeddings": False,
    "time_step_limit": [0.3, 1.2],
    "use_bias": True,
    "use_conv_bias": False,
}


def mamba(name: str, settings: dict[str, Any], **options: Any) -> Any:
    return causal(
        name,
        settings,
        blocks=lambda model: model.backbone.layers,
        last_norm=lambda model: list(model.backbone.norm_f.parameters()),
        **options,
    )


CASES = {"mamba2": mamba("mamba2", TINY), "mamba2_groups": mamba("mamba2_groups", TINY | GROUPS, gain=1.1)}
