"""The least that a train step must communicate in a layout, from the sizes of the model alone."""

import dataclasses
import math

from llama_jax.models import DecoderConfig, abstract_params
from llama_jax.nn import GroupedQuery
from llama_jax.run_config import RunConfig

BF16, F32 = 2, 4


def minimum(config: RunConfig, *, scattering: int = 1) -> dict[str, float]:
    """Bytes that one device sends in a step over each mesh axis, with bfloat16 on the wire and full remat.

    fsdp: every weight is gathered for the forward pass and again for the backward pass, embedding and head once, and
    every gradient is scattered once, or, with `scattering=2`, summed on every device. data and context: what a device
    stores of the gradients is reduced once. tensor: each of attention and feed-forward sums [B, T, D] once forward and
    once backward, attention once more for what remat computes again; so does the embedding, and the loss once backward.
    context: keys and values go around the ring forward, again for remat and again backward, and their gradients in
    float32.
    """
    model, sizes = config.model, dataclasses.asdict(config.mesh)
    assert isinstance(model, DecoderConfig)
    assert isinstance(model.attention, GroupedQuery)
    data, fsdp, tensor, context = (sizes[axis] for axis in ("data", "fsdp", "tensor", "context"))
    tokens = config.global_batch_size // (data * fsdp) * config.sequence_length // context

    def share(n: int) -> float:  # of a whole that is gathered or scattered: all but one's own part travels
        return (n - 1) / n

    params = {name: BF16 * math.prod(p.shape) for name, p in abstract_params(model).items()}
    norms = sum(size for name, size in params.items() if "norm" in name)
    layers = sum(size for name, size in params.items() if name.startswith("layers.") and "norm" not in name) / tensor
    ends = (sum(params.values()) - norms) / tensor - layers
    stored = (layers + ends) / fsdp + norms
    hidden = BF16 * tokens * model.hidden_size
    statistics = 3 * F32 * tokens  # of the logits: the largest, the sum of exponentials, the target's
    keys_and_values = 2 * BF16 * tokens * model.attention.num_kv_heads * model.attention.head_dim / tensor
    return {
        "data": 2 * share(data) * stored,
        "fsdp": share(fsdp) * (2 * layers + ends + scattering * (layers + ends) + 2 * norms),
        "tensor": 2 * share(tensor) * ((5 * model.num_layers + 2) * hidden + statistics),
        "context": 2 * share(context) * stored + (context - 1) * model.num_layers * 5 * keys_and_values,
    }
