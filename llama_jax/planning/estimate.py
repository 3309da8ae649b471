"""The plan of a train step: memory, time by the roofline, and what these mean for a run.

Time: in the forward pass, the backward pass and the update, matrix units, HBM and every network work at the same time,
so that a pass takes as long as its slowest resource ("How to scale your model", chapters 1 and 5). Latency, and
communication that nothing hides, are left out. Matrix units reach `EFFICIENCY` of their peak.
"""

import dataclasses
import functools
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.parallel import fitting, mesh_axis_sizes
from llama_jax.planning.communication import Traffic, traffic
from llama_jax.planning.hardware import Topology
from llama_jax.planning.memory import argument_bytes, layer_products, memory, sampling_memory, widths
from llama_jax.planning.workload import Workload, abstract_mesh, itemsize, local_tokens, weights
from llama_jax.training import train_flops_per_token

# Of the peak of the matrix units, in products and attention together: the geometric mean over MaxText's published runs
# of what their times leave for it (benchmarks/published.py prints it).
EFFICIENCY = 0.7
MATRIX_UNITS, HBM, DCN = "matrix units", "HBM", "DCN"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step needs on a machine, and how fast it can be.

    topology: of the machine.
    num_chips: of it.
    mesh: sizes of the mesh axes.
    remat: what is computed again.
    accumulation_steps: parts that the batch is computed in.
    global_batch_size: sequences of one update.
    sequence_length: tokens of a sequence.
    parameters: of the model.
    flops: of one update of the whole model, nothing recomputed counted, causal attention at half.
    memory: bytes on each device, by kind.
    argument_bytes: those of them that the step takes; exact.
    capacity: bytes that each device has.
    seconds: of one update that each resource is busy.
    step_seconds: of one update.
    bound: the resource that the step waits for.
    mfu: share of the chips' peak that `flops` take.
    tokens_per_second: of all chips.
    days: for all updates.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    remat: str
    accumulation_steps: int
    global_batch_size: int
    sequence_length: int
    parameters: int
    flops: float
    memory: dict[str, int]
    argument_bytes: int
    capacity: int
    seconds: dict[str, float]
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    days: float

    @property
    def total_bytes(self) -> int:
        """Needed on each device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.capacity

    @property
    def communication_bound(self) -> bool:
        return self.bound not in (MATRIX_UNITS, HBM)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}


@functools.lru_cache(maxsize=32)
def _model_flops(model: Any, sequence_length: int) -> tuple[int, float]:
    return num_parameters(model), train_flops_per_token(model, sequence_length)


def estimate(workload: Workload, topology: Topology, *, efficiency: float = EFFICIENCY) -> Plan:
    """The plan of this step on this machine. Raises UserError for a mesh that fits neither chips nor batch."""
    sizes = workload.check(topology.num_chips)
    networks = topology.networks(sizes)
    chip = topology.chip
    with abstract_mesh(sizes):
        need = memory(workload, chip.platform)
        arguments = sum(argument_bytes(workload).values())
        passes = _passes(workload, traffic(workload))
    seconds: dict[str, float] = {}
    step_seconds = 0.0
    slowest: dict[str, float] = {}
    for one in passes:
        busy = {MATRIX_UNITS: one.flops / (chip.peak_flops * efficiency), HBM: one.bytes / chip.bandwidth}
        for sent in one.traffic:
            inside, between = sent.seconds(networks[sent.axis])
            name = f"{'ICI' if chip.platform == 'tpu' else 'NVLink'} {sent.axis}"
            for key, value in ((name, inside), (DCN, between)):
                busy[key] = busy.get(key, 0.0) + value
        longest = max(busy, key=lambda name: busy[name])
        step_seconds += busy[longest]
        slowest[longest] = slowest.get(longest, 0.0) + busy[longest]
        for name, value in busy.items():
            seconds[name] = seconds.get(name, 0.0) + value
    parameters, flops_per_token = _model_flops(workload.model, workload.sequence_length)
    flops = flops_per_token * workload.tokens
    return Plan(
        topology=str(topology),
        num_chips=topology.num_chips,
        mesh=sizes,
        remat=workload.compute.remat,
        accumulation_steps=workload.optimizer.accumulation_steps,
        global_batch_size=workload.global_batch_size,
        sequence_length=workload.sequence_length,
        parameters=parameters,
        flops=flops,
        memory=need,
        argument_bytes=arguments,
        capacity=int(chip.memory),
        seconds={name: value for name, value in seconds.items() if value},
        step_seconds=step_seconds,
        bound=max(slowest, key=lambda name: slowest[name]),
        mfu=flops / (step_seconds * topology.num_chips * chip.peak_flops),
        tokens_per_second=workload.tokens / step_seconds,
        days=workload.num_steps * step_seconds / 86400,
    )


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What one device does in one pass: FLOPs of matrix products, bytes to and from HBM, what it sends."""

    flops: float
    bytes: float
    traffic: list[Traffic]


def _passes(workload: Workload, sent: list[Traffic]) -> list[_Pass]:
    """Forward, backward and update of one step on the current mesh."""
    model, size, policy = workload.model, itemsize(workload), workload.compute.remat
    found = weights(model)
    parts = workload.optimizer.accumulation_steps
    tokens = local_tokens(workload) * parts
    head = found["embedding.weight" if model.tie_embeddings else "lm_head.weight"]
    products = layer_products(workload)
    layers = 2 * tokens * sum(w.layers * w.used() for _, w in products)
    logits = 2 * tokens * head.used()
    scores = tokens * sum(_local_scores(mixer, workload.sequence_length / 2) for mixer, _ in model.layer_pieces())
    # Flash attention's backward pass makes the scores again: five products to the forward pass's two.
    again = {"none": 0.0, "dots": scores, "attention": layers + scores, "full": layers + scores}[policy]

    of = widths(workload)
    gathered = parts * size * sum(w.layers * w.used() for _, w in products)
    # What each product reads and writes, and the few passes over the residual stream between them.
    flow = tokens * size * (of.inputs + of.outputs + 6 * of.residual)
    chunks = tokens * head.width_of("vocab") * 4
    stored = 4 * sum(w.stored() for w in found.values())
    recomputed = 0 if policy == "none" else 1
    forward = _Pass(
        layers + scores + 3 * logits,  # the loss takes its gradient in the forward pass
        flow + 2 * gathered + 4 * chunks,
        [t for t in sent if not t.backward],
    )
    backward = _Pass(
        2 * layers + 2.5 * scores + again,
        (2 + recomputed) * flow + (4 + recomputed) * gathered,
        [t for t in sent if t.backward],
    )
    # Read: gradients twice (their norm comes first), parameters, both moments; written: the latter three.
    return [forward, backward, _Pass(0.0, 8 * stored + (parts > 1) * 2 * parts * stored, [])]


def _local_scores(mixer: Any, context: float) -> float:
    heads = getattr(mixer, "num_heads", 1)
    return mixer.score_flops(context) / (mesh_axis_sizes()["tensor"] if fitting("heads", heads) else 1)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """What it takes to sample a batch of texts: memory, and the time that reading it takes for every token.

    memory: bytes on each device, by kind.
    capacity: bytes that each device has.
    token_seconds: for one more token in every row, by HBM's bandwidth alone.
    tokens_per_second: of all rows.
    """

    batch: int
    length: int
    memory: dict[str, int]
    capacity: int
    token_seconds: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.capacity


def estimate_sampling(workload: Workload, topology: Topology, batch: int, length: int) -> SamplingPlan:
    """The plan of sampling `batch` rows of up to `length` positions with the run's mesh."""
    for key, value in (("sample_batch", batch), ("sample_length", length)):
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    with abstract_mesh(workload.mesh.sizes(topology.num_chips)):
        need = sampling_memory(workload, batch, length)
        weights_read = itemsize(workload) * sum(w.copies * w.used() for w in weights(workload.model).values())
    seconds = (weights_read + need["cache"]) / topology.chip.bandwidth
    return SamplingPlan(batch, length, need, int(topology.chip.memory), seconds, batch / seconds)
