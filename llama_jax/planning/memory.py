"""Bytes on one device: exact for the arguments of a train step, estimated for its temporaries.

The estimate follows the programs that XLA makes for TPUs, read from its buffer assignments: which arrays are alive
together at the three places where memory can peak, the loss, the backward pass of a layer, and the gradient of the
embedding.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from llama_jax.chips import Chip, chip_of
from llama_jax.config import UserError
from llama_jax.models import loss_chunks
from llama_jax.nn import FASTEST, KEY_BLOCK, LANES, MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from llama_jax.parallel import batch_parts
from llama_jax.planning.local import Local, abstract_mesh, cache_bytes, compute_dtype, optimizer_bytes
from llama_jax.run_config import RunConfig

BATCH_ITEMSIZE = 4
# Of the inputs and outputs of a layer's products and of its residual stream: how many times over they are alive at once
# in its backward pass.
WORKING_SET = {"none": 1.15, "dots": 1.8, "projections": 2.0, "attention": 2.0, "full": 2.0, "offload": 2.0}
ON_CHIP = 0.9  # of a TPU's on-chip memory, which XLA fills with a layer's arrays
# Whole weights and gradients of weights alive at once, in layers: less where a weight fits into on-chip memory.
GATHERED_LAYERS, GATHERED_ON_CHIP = 1.5, 0.8
CHUNK_COPIES = 2.25  # of a chunk of float32 logits: themselves, their softmax, their gradient
SCORE_COPIES = 4  # of a block of float32 scores in blockwise attention's backward pass


def memory(local: Local, chip: Chip) -> dict[str, int]:
    """Return the bytes by kind on a device, at the place where their sum is largest."""
    temporary = max(_places(local, chip), key=lambda place: sum(place.values()))
    return argument_bytes(local) | {kind: math.ceil(size) for kind, size in temporary.items() if size}


def device_memory(config: RunConfig, devices: Sequence[Any]) -> int | None:
    """Return an estimate of the bytes on each of these JAX devices; None where there is none: an encoder-decoder."""
    if config.model.has_source:
        return None
    here = Chip("", (), 0.0, 0.0, 0.0, 0.0, 0.0, (1,))  # of a device that is not planned for no more is needed
    compute = dataclasses.replace(config.compute, dtype=config.compute.jax_dtype.name)
    local = Local.of(dataclasses.replace(config, compute=compute), len(devices))
    return sum(memory(local, chip_of(devices[0].device_kind) or here).values())


def argument_bytes(local: Local) -> dict[str, int]:
    """Return the exact bytes that a device holds of the parameters, the optimizer's state and the batch.

    With pairs of answers, also those of the frozen copy of the first parameters.
    """
    stored, objective = sum(weight.stored for weight in local.model.weights), local.config.data.objective
    arrays = len(objective.fields()) + 1  # and the segment ids
    batch = local.tokens * local.micro_batches * arrays * BATCH_ITEMSIZE
    copies = local.pairs and local.config.model.adapters is None  # adapters leave the base as it is
    optimizer = dataclasses.replace(local.config.optimizer, accumulation_steps=1)  # does not change the state
    splits = (local.sizes[axis] for axis in ("pipeline", "fsdp", "tensor", "expert"))
    state = 4 + optimizer_bytes(optimizer, local.config.model, *splits)  # with the step's number
    reference = {"reference": 4 * stored} if copies else {}
    return {"parameters": 4 * stored, **reference, "optimizer": state, "batch": batch}


@dataclasses.dataclass(frozen=True)
class Widths:
    """Elements per token on one device, summed over layers.

    residual: between the layers.
    inputs: inputs of products; once where several take the same.
    outputs: results of products that do not return to the residual stream.
    projected: results of the products before attention.
    mixed: input of attention's last product.
    """

    residual: int
    inputs: int
    outputs: int
    projected: int
    mixed: int


def widths(local: Local) -> Widths:
    """Return the widths of a model's layers."""
    inputs = {(w.module, w.layers * w.inputs) for w in local.model.products}
    last = [w for w in local.model.products if w.returns]
    return Widths(
        residual=local.config.model.num_layers * local.config.model.hidden_size,
        inputs=sum(width for _, width in inputs),
        outputs=sum(w.layers * w.outputs for w in local.model.products if not w.returns),
        projected=sum(w.layers * w.outputs for w in local.model.products if not (w.returns or w.of_feed_forward)),
        mixed=sum(w.layers * w.inputs for w in last if not w.of_feed_forward),
    )


def saved_bytes(local: Local) -> int:
    """Return the bytes that the forward pass of all layers keeps for the backward pass, by remat policy."""
    of, size, policy, schedule = widths(local), local.itemsize, local.config.compute.remat, local.schedule
    tokens = math.ceil(local.tokens * schedule.work)  # the bubble's are kept, too
    if policy == "full":
        return of.residual * size * tokens
    if policy == "attention":
        return 2 * of.residual * size * tokens
    if policy == "projections":
        return (2 * of.residual + of.projected) * size * tokens
    if policy == "offload":  # of a layer, while it is written or read
        return host_bytes(local) // local.config.model.num_layers
    if policy == "dots":  # only a sum consumes a feed-forward's result, so it is not kept
        return (2 * of.residual + of.outputs) * size * tokens
    # All of it: two norms in float32 and rounded, inputs and results of products (a nonlinearity is computed again),
    # attention's result before it is reshaped; and the weights as they were gathered.
    per_token = 2 * of.residual * (4 + size) + size * (of.inputs + of.outputs + of.mixed)
    gathered = sum(w.layers * w.used * size for w in local.model.products if w.is_gathered)
    return per_token * tokens + gathered // schedule.stages


def host_bytes(local: Local) -> int:
    """Return the bytes that the forward pass of all layers keeps in the host's memory."""
    if local.config.compute.remat != "offload":
        return 0
    of, up = widths(local), sum(w.layers * w.outputs for w in local.model.products if w.is_up)
    return (2 * of.residual + of.projected + up) * local.itemsize * math.ceil(local.tokens * local.schedule.work)


def _tile_padding(local: Local, platform: str) -> int:
    """Return the padding of queries, keys, values and results on TPUs, whose tiles have 128 columns."""
    if platform != "tpu" or local.config.compute.remat != "none":
        return 0
    of, columns = widths(local), 128
    head_dim = max(1, of.mixed // (local.model.heads * local.config.model.num_layers))
    return (2 * of.mixed + local.model.keys) * local.itemsize * local.tokens * (-head_dim % columns) // head_dim


def _places(local: Local, chip: Chip) -> list[dict[str, float]]:
    """Return the bytes by kind, without arguments, at each place where memory can peak: loss, layer, embedding."""
    model, tokens, size = local.config.model, local.tokens, local.itemsize
    stored = sum(w.stored for w in local.model.weights)
    of_layers = sum(w.stored for w in local.model.weights if w.layers)
    embedding = local.model["embedding.weight"]
    head = embedding if model.tie_embeddings else local.model["lm_head.weight"]

    saved = saved_bytes(local) + _tile_padding(local, chip.platform)
    cast = of_layers * size if size < 4 else 0  # all layers at once: the casts are moved out of the loop over layers
    running = 4 * stored if local.micro_batches > 1 else 0  # the sum over the parts so far
    length = local.config.row_length // local.sizes["context"]
    rows = math.ceil(tokens / length)
    chunk = 4 * local.model.vocab * tokens / loss_chunks(local.config.compute.loss_chunk, rows, length, chip.platform)
    d_head = 4 * head.used  # summed over the chunks in float32; reduced over the devices when all else is done
    hidden = tokens * model.hidden_size * size
    # A stage works on one of its microbatches at a time, and has them all, with their gradients, to pass them on.
    schedule, at_once = local.schedule, tokens / local.schedule.of_stage
    passed = 2 * hidden + 4 * at_once * model.hidden_size * size if schedule.stages > 1 else 0
    if schedule.stages > 1:  # the gradients of a tick are added to those before; repeats have copies in their order
        running += 4 * of_layers
        cast += 2 * 4 * of_layers if schedule.repeats > 1 else 0
    largest = size * max((w.used for w in local.model.products), default=0)
    layer = size * sum(w.used for w in local.model.products) / len(set(model.layer_pieces()))
    gathered = layer * (GATHERED_ON_CHIP if largest <= chip.on_chip else GATHERED_LAYERS)
    of = widths(local)
    working = WORKING_SET[local.config.compute.remat] * (of.inputs + of.outputs + of.residual) / model.num_layers
    attention = _attention_workspace(local, chip.platform)
    return [
        # While the reference computes the same batch, whose activations no backward pass needs.
        *(
            [{"gradients": running, "activations": saved, "weights": 2 * cast + gathered, "layer": hidden}]
            * local.pairs
        ),
        {
            "gradients": running,
            "activations": saved,
            "weights": cast,
            "logits": size * head.used + d_head + CHUNK_COPIES * chunk + 2 * hidden,
        },
        {
            "gradients": 4 * of_layers + running,
            "activations": saved,
            "weights": cast + gathered,
            "logits": d_head,
            "layer": max(0.0, working * at_once * size - ON_CHIP * chip.on_chip) + hidden + passed + attention,
        },
        {
            "gradients": 4 * of_layers + running,
            "weights": cast,
            "logits": d_head,
            "embedding": (4 + size) * (embedding.used + tokens * model.hidden_size),
        },
    ]


def _attention_workspace(local: Local, platform: str) -> float:
    """Return the bytes of scores and float32 gradients in attention's backward pass."""
    length = local.config.row_length // local.sizes["context"]
    tokens = local.tokens / local.schedule.of_stage
    kernel = attention_kernel(local, platform)
    keys = local.model.keys / local.config.model.num_layers * tokens
    gathered = local.sizes["context"] if local.config.compute.context == "all_gather" else 0
    if kernel == "splash":  # keys and values of all parts of the sequence, and their gradients
        return 2 * local.itemsize * gathered * keys if local.sizes["context"] > 1 else 0
    if kernel == "cudnn":
        return tokens * length  # documents are kept apart by a dense mask
    if kernel == "reference":
        return 3 * 4 * local.model.heads * tokens * local.config.row_length
    block = max(MIN_QUERY_BLOCK, math.ceil(length / MAX_QUERY_BLOCKS))
    scores = SCORE_COPIES * 4 * local.model.heads * block * min(KEY_BLOCK, length) * tokens / length
    # Gradients of keys and values in float32, twice; gathered, those of all parts of the sequence.
    return scores + 2 * 4 * keys + gathered * (4 + local.itemsize) * keys


def attention_kernel(local: Local, platform: str) -> str:
    """The kernel that a run takes there (`nn.choose`)."""
    name = local.config.compute.attention_kernel
    if name != "auto":
        return name
    fastest, parts = FASTEST[platform], local.sizes["context"]
    if fastest == "cudnn":  # it has no soft caps, for which the reference is left, and no sinks
        mixers = [mixer for mixer, _ in local.config.model.layer_pieces()]
        if any(getattr(mixer, "softcap", None) for mixer in mixers):
            return "reference"
        fastest = "blockwise" if any(getattr(mixer, "sinks", False) for mixer in mixers) else fastest
    if parts > 1 and (fastest != "splash" or local.config.compute.context != "all_gather"):
        return "blockwise"
    return "blockwise" if fastest == "splash" and local.config.row_length % (LANES * parts) else fastest


def sampling_memory(config: RunConfig, num_chips: int, batch: int, length: int) -> dict[str, int]:
    """Return the bytes by kind on a device for sampling `batch` rows of up to `length` positions in the compute type.

    Raises UserError for a mesh of another size.
    """
    if batch < 1 or length < 1:
        key, value = ("sample_batch", batch) if batch < 1 else ("sample_length", length)
        raise UserError(f"{key}={value} must be at least 1")
    # The batch of the train step is of no concern here: a mesh takes any number of rows.
    sizes = config.mesh.sizes(num_chips)
    rows = batch_parts(sizes)
    local = Local.of(
        dataclasses.replace(config, global_batch_size=rows * config.optimizer.accumulation_steps), num_chips
    )
    with abstract_mesh(sizes):
        cache = cache_bytes(config.model, batch, length, compute_dtype(config))
    return {
        # A pipeline's stages split the batch here, and all have all layers.
        "parameters": local.itemsize
        * sum(w.stored * (sizes["pipeline"] if w.layers else 1) for w in local.model.weights),
        "cache": cache,
        "weights": local.itemsize * max(w.used for w in local.model.weights if w.is_gathered)
        if any(w.is_gathered for w in local.model.weights)
        else 0,
        "logits": 4 * local.model.vocab * (batch // rows if batch % rows == 0 else batch),
    }
