"""GLaM (Du et al. 2021, arXiv 2112.06905): every other layer has 64 experts, two of them for each token.

From the paper: the sizes (table 4), experts of two matrices in every other layer, dense layers whose first matrix is
a GELU-gated pair (section 4), top-2 routing as in GShard, the balance loss of 0.01 (section 5.1), 1024 positions,
a vocabulary of 256K. These sum to 1.16T parameters, 96.6B of them active, as the paper says, with the embedding shared.
Not from the paper: RMS norms without biases; GShard's capacity of 2T/E, which GLaM's does not name; one relative bias
for all layers, where GLaM has Transformer-XL's in each. Its weights were never released.
"""

from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import Experts, GatedLinearUnit, GroupedQuery, GShardRouter, RelativeBias, RMSNorm


def _glam(num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, head_dim: int) -> DecoderConfig:
    experts = Experts(
        num_experts=64,
        intermediate_size=intermediate_size,
        router=GShardRouter(),
        activation="gelu_tanh",
        gated=False,
        capacity_factor=1.0,
        load_balance_loss=0.01,
    )
    return DecoderConfig(
        vocab_size=256_000,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=1024,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            rope=None,
            qkv_bias=False,
            out_bias=False,
        ),
        feed_forward=GatedLinearUnit(intermediate_size, activation="gelu_tanh", bias=False),
        norm=RMSNorm(eps=1e-6),
        tie_embeddings=True,
        overrides=(LayerOverride(tuple(range(1, num_layers, 2)), experts),),
        position_bias=RelativeBias(num_heads, num_buckets=32, max_distance=128, bidirectional=False),
    )


PRESETS: dict[str, DecoderConfig] = {
    "glam_64b_64e": _glam(64, 8192, 32_768, 128, 128),
}
