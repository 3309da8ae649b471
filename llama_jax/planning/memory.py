"""Bytes on one device: exact for what a train step takes, estimated for what it makes on the way.

The estimate follows the programs that XLA makes for TPUs, read from its buffer assignments: which arrays are alive
together at the three places where memory can peak, the loss, the backward pass of a layer, and the gradient of the
embedding. Arrays that a TPU keeps in its on-chip memory are counted as if they lay in HBM.
"""

import dataclasses
import math

from llama_jax.parallel import fitting, mesh_axis_sizes
from llama_jax.planning.workload import Weight, Workload, cache_bytes, itemsize, local_tokens, splits_sequence, weights

ARGUMENTS = ("parameters", "optimizer", "batch")
BATCH_ARRAYS, BATCH_ITEMSIZE = 5, 4  # tokens, targets, weights, segment ids and positions
# Of the inputs and outputs of a layer's products, how many times over they are alive at once in its backward pass.
WORKING_SET = {"none": 1.1, "dots": 1.75, "attention": 2.0, "full": 2.0}
GATHERED_LAYERS = 1.5  # whole weights and gradients of weights alive at once, in layers
CHUNK_COPIES = 3  # of a chunk of float32 logits: themselves, their softmax, their gradient
SCORE_COPIES = 4  # of a block of float32 scores in blockwise attention's backward pass


def memory(workload: Workload, platform: str) -> dict[str, int]:
    """Bytes by kind on a device of the current (abstract) mesh, at the place where their sum is largest."""
    temporary = max(_phases(workload, platform), key=lambda phase: sum(phase.values()))
    return argument_bytes(workload) | {kind: math.ceil(size) for kind, size in temporary.items() if size}


def argument_bytes(workload: Workload) -> dict[str, int]:
    """Exactly what a device holds of the parameters, the optimizer's moments and the batch."""
    sizes = mesh_axis_sizes()
    stored = sum(weight.stored() for weight in weights(workload.model).values())
    rows = workload.global_batch_size // (sizes["data"] * sizes["fsdp"])
    batch = rows * (workload.sequence_length // sizes["context"]) * BATCH_ARRAYS * BATCH_ITEMSIZE
    counters = 2 * 4  # the step, and Adam's count of updates
    return {"parameters": 4 * stored, "optimizer": 8 * stored + counters, "batch": batch}


@dataclasses.dataclass(frozen=True)
class Widths:
    """Elements per token on one device, summed over layers.

    residual: between the layers.
    inputs: what products take; once where several take the same.
    outputs: what products make that does not return to the residual stream.
    mixed: what attention's last product takes.
    inner: what a feed-forward's last product takes.
    """

    residual: int
    inputs: int
    outputs: int
    mixed: int
    inner: int


def widths(workload: Workload) -> Widths:
    """Of the layers of a model on the current mesh."""
    model = workload.model
    inputs: dict[tuple[str, int], int] = {}
    outputs = mixed = inner = 0
    for name, weight in layer_products(workload):
        module, width = name.rsplit(".", 2)[0], weight.layers * weight.width("in")
        inputs[module, width] = width
        if weight.width("out") != model.hidden_size or weight.axes[-1] != "embed":
            outputs += weight.layers * weight.width("out")
        elif module.startswith("layers.feed_forward"):
            inner += width
        else:
            mixed += width
    return Widths(model.num_layers * model.hidden_size, sum(inputs.values()), outputs, mixed, inner)


def layer_products(workload: Workload) -> list[tuple[str, Weight]]:
    """The weights of the layers that take part in products, by name."""
    return [(name, w) for name, w in weights(workload.model).items() if w.layers and w.in_dims]


def saved_bytes(workload: Workload) -> int:
    """What the forward pass of all layers keeps for the backward pass, by remat policy."""
    of, size, policy = widths(workload), itemsize(workload), workload.compute.remat
    if policy == "full":
        return of.residual * size * local_tokens(workload)
    if policy == "attention":
        return 2 * of.residual * size * local_tokens(workload)
    if policy == "dots":  # what only a sum consumes is not needed again, so a feed-forward's result is not kept
        return (2 * of.residual + of.outputs) * size * local_tokens(workload)
    # All of it: two norms in float32 and rounded, attention's result before it is reshaped, three steps of a gated
    # nonlinearity; and the weights as they were gathered.
    per_token = 2 * of.residual * (4 + size) + size * (of.inputs + of.outputs + of.mixed + 3 * of.inner)
    gathered = sum(w.layers * w.used() * size for _, w in layer_products(workload) if w.is_gathered())
    return per_token * local_tokens(workload) + gathered


def _phases(workload: Workload, platform: str) -> list[dict[str, float]]:
    """What is alive at each place where memory can peak, arguments aside."""
    model, tokens, size = workload.model, local_tokens(workload), itemsize(workload)
    found = weights(model)
    stored = sum(w.stored() for w in found.values())
    of_layers = sum(w.stored() for w in found.values() if w.layers)
    head = found["embedding.weight" if model.tie_embeddings else "lm_head.weight"]
    embedding = found["embedding.weight"]

    saved = saved_bytes(workload)
    cast = of_layers * size if size < 4 else 0  # all layers at once: the casts are moved out of the loop over layers
    running = 4 * stored if workload.optimizer.accumulation_steps > 1 else 0  # the sum over the parts so far
    chunks = math.ceil(workload.sequence_length / workload.compute.loss_chunk)
    logits = tokens / chunks * head.width_of("vocab") * 4
    d_head = 4 * head.used()  # summed over the chunks in float32; reduced over devices when all else is done
    hidden = tokens * model.hidden_size * size
    layer = sum(w.used() * size for _, w in layer_products(workload)) / len(set(model.layer_pieces()))
    of = widths(workload)
    working = WORKING_SET[workload.compute.remat] * (of.inputs + of.outputs + 2 * of.residual) / model.num_layers
    return [
        {
            "gradients": running,
            "activations": saved,
            "weights": cast,
            "logits": size * head.used() + d_head + CHUNK_COPIES * logits + 2 * hidden,
        },
        {
            "gradients": 4 * of_layers + running,
            "activations": saved,
            "weights": cast + GATHERED_LAYERS * layer,
            "logits": d_head,
            "layer": working * tokens * size + hidden + _attention_workspace(workload, platform),
        },
        {
            "gradients": 4 * of_layers + running,
            "logits": d_head,
            "embedding": (4 + size) * embedding.used() + (4 + size) * tokens * model.hidden_size,
        },
    ]


def _attention_workspace(workload: Workload, platform: str) -> float:
    """What attention's backward pass makes of scores and float32 gradients."""
    length, tokens = workload.sequence_length // mesh_axis_sizes()["context"], local_tokens(workload)
    mixer = workload.model.layer_pieces()[0][0]
    num_heads = getattr(mixer, "num_heads", 0)
    heads = num_heads // (mesh_axis_sizes()["tensor"] if fitting("heads", num_heads) else 1)
    kernel = attention_kernel(workload, platform)
    if kernel == "reference":
        return 3 * 4 * heads * tokens * workload.sequence_length
    if kernel == "cudnn":
        return tokens * workload.sequence_length  # documents are kept apart by a dense mask
    if kernel == "splash":
        return 0
    block = max(128, math.ceil(length / 16))
    rows = tokens // length
    keys = 2 * 4 * cache_bytes(workload.model, 1, 1, workload.dtype) / itemsize(workload) / workload.model.num_layers
    return SCORE_COPIES * 4 * rows * heads * block * min(512, length) + 2 * keys * tokens


def attention_kernel(workload: Workload, platform: str) -> str:
    """The kernel that a run takes there."""
    name = workload.compute.attention_kernel
    if name != "auto":
        return name
    if splits_sequence(workload):
        return "blockwise"
    if platform == "tpu":
        return "splash" if workload.sequence_length % 128 == 0 else "blockwise"
    return "cudnn"


def sampling_memory(workload: Workload, batch: int, length: int) -> dict[str, int]:
    """Bytes by kind on a device when `batch` rows of up to `length` positions are sampled, in the compute type."""
    size, found = itemsize(workload), weights(workload.model)
    layer = max(w.used() * size for _, w in layer_products(workload))
    head = found["embedding.weight" if workload.model.tie_embeddings else "lm_head.weight"]
    rows = batch // math.gcd(batch, mesh_axis_sizes()["data"] * mesh_axis_sizes()["fsdp"])
    return {
        "parameters": size * sum(w.stored() for w in found.values()),
        "cache": cache_bytes(workload.model, batch, length, workload.dtype),
        "weights": layer if any(w.is_gathered() for w in found.values()) else 0,
        "logits": 4 * rows * head.width_of("vocab"),
    }
