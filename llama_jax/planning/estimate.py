"""The plan of a train step: memory, and time by the roofline.

Time: in the forward pass, the backward pass and the update, matrix units, HBM and networks work at the same time, so
that a pass takes as long as its slowest resource ("How to scale your model", chapters 1 and 5). Not hidden is what XLA
compiles as operations that everything else waits for: the sums that TPUs exchange over ICI, and on chips without
`overlaps` gathers and hops, too. Latency is left out.
Matrix units reach a fixed part of their peak, `EFFICIENCY`.
"""

import dataclasses
import functools
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.planning.communication import Traffic, traffic
from llama_jax.planning.local import Local
from llama_jax.planning.memory import argument_bytes, attention_kernel, host_bytes, memory, sampling_memory, widths
from llama_jax.planning.topology import Topology
from llama_jax.run_config import RunConfig
from llama_jax.training import train_flops_per_token

# Of the peak of the matrix units, in products and attention together: the geometric mean over MaxText's published runs
# of the share that their times leave for it (docs/tables.py computes it).
EFFICIENCY = 0.62
# The same of the runs on one chip alone.
EFFICIENCY_OF = {"v4": 0.671, "v5e": 0.729, "v5p": 0.763, "v6e": 0.534}
# Bytes to and from HBM for each score, in the forward and the backward pass, where attention is XLA's: float32 scores
# are written, read for their maximum and read for their exponential; backward, weights and gradients are rounded,
# written once and read by their products. A kernel (splash, cuDNN) keeps all of it on the chip.
SCORE_BYTES = {"blockwise": (12, 14), "reference": (12, 14)}
MATRIX_UNITS, HBM, HOST, DCN, NETWORK = "matrix units", "HBM", "host", "DCN", "network"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory and speed of a train step on a machine.

    topology: of the machine.
    num_chips: of it.
    mesh: sizes of the mesh axes.
    remat: policy of recomputation.
    accumulation_steps: micro-batches of an update.
    global_batch_size: sequences of one update.
    sequence_length: tokens of a sequence.
    parameters: of the model.
    flops: of one update of the whole model, nothing recomputed counted, causal attention at half.
    memory: bytes on each device, by kind.
    argument_bytes: the part of it that the step takes as arguments; exact.
    capacity: bytes that each device has.
    host_bytes: bytes in the host's memory for each device.
    host_capacity: bytes that the host has for each device; 0 where that is not known.
    seconds: time of one update that each resource is busy.
    step_seconds: of one update.
    bound: the resource that the step waits for.
    mfu: share of the chips' peak that `flops` take.
    tokens_per_second: of all chips.
    days: for all updates.
    bubble: share of the layers' ticks in which a stage of a pipeline has nothing to work on.
    microbatches: that go through the pipeline one after another.
    repeats: times that each goes around its stages.
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
    host_bytes: int
    host_capacity: int
    seconds: dict[str, float]
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    days: float
    bubble: float
    microbatches: int
    repeats: int

    @property
    def total_bytes(self) -> int:
        """Bytes needed on each device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Return whether the memory of a device, and the host's, is enough."""
        return self.total_bytes <= self.capacity and self.host_bytes <= self.host_capacity

    @property
    def communication_bound(self) -> bool:
        """Return whether the step waits for a network."""
        return self.bound not in (MATRIX_UNITS, HBM, HOST)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}


@functools.lru_cache(maxsize=32)
def _model_flops(model: Any, sequence_length: int) -> tuple[int, float]:
    return num_parameters(model), train_flops_per_token(model, sequence_length)


def estimate(config: RunConfig, topology: Topology, *, efficiency: float | None = None) -> Plan:
    """Return the plan of a run's step on a machine. Raises UserError for a mesh that fits neither chips nor batch.

    `efficiency`: the part of their peak that matrix units reach; None for what was fitted for this chip.
    """
    local = Local.of(config, topology.num_chips)
    networks = topology.networks(local.sizes)
    chip, kept = topology.chip, host_bytes(local)
    if kept and not (chip.host and chip.host_memory):
        raise UserError(
            f"compute.remat={config.compute.remat!r}: the host of {chip.name} is not known: take another policy, or "
            "give host and host_memory with --chip"
        )
    efficiency = EFFICIENCY_OF.get(chip.name, EFFICIENCY) if efficiency is None else efficiency
    seconds: dict[str, float] = {}
    waited: dict[str, float] = {}

    def add(times: dict[str, float], name: str, value: float) -> None:
        if value:
            times[name] = times.get(name, 0.0) + value

    kernel = attention_kernel(local, chip.platform)
    for one in _passes(local, traffic(local, kernel), kernel):
        busy = {MATRIX_UNITS: one.flops / (chip.peak_flops * efficiency), HBM: one.bytes / chip.bandwidth}
        if kept and one.flops:  # written in the forward pass, read in the backward pass
            busy[HOST] = local.micro_batches * kept / chip.host
        for sent in one.traffic:
            inside, between = sent.seconds(networks[sent.axis])
            name = f"{'ICI' if chip.platform == 'tpu' else 'NVLink'} {sent.axis}"
            exposed = chip.platform == "tpu" and not (chip.overlaps and sent.hidden)
            add(waited if exposed else busy, name, inside)
            add(seconds, name, inside if exposed else 0.0)
            waits = sent.axis == "pipeline"
            add(waited if waits else busy, DCN if chip.platform == "tpu" else NETWORK, between)
            add(seconds, DCN if chip.platform == "tpu" else NETWORK, between if waits else 0.0)
        longest = max(busy, key=lambda name: busy[name])
        add(waited, longest, busy[longest])
        for name, value in busy.items():
            add(seconds, name, value)
    step_seconds = sum(waited.values())
    tokens = config.global_batch_size * config.row_length
    parameters, flops_per_token = _model_flops(config.model, config.row_length)
    flops = flops_per_token * tokens
    return Plan(
        topology=str(topology),
        num_chips=topology.num_chips,
        mesh=local.sizes,
        remat=config.compute.remat,
        accumulation_steps=config.optimizer.accumulation_steps,
        global_batch_size=config.global_batch_size,
        sequence_length=config.row_length,
        parameters=parameters,
        flops=flops,
        memory=memory(local, chip),
        argument_bytes=sum(argument_bytes(local).values()),
        capacity=int(chip.memory),
        host_bytes=kept,
        host_capacity=int(chip.host_memory),
        seconds=seconds,
        step_seconds=step_seconds,
        bound=max(waited, key=lambda name: waited[name]),
        mfu=flops / (step_seconds * topology.num_chips * chip.peak_flops),
        tokens_per_second=tokens / step_seconds,
        days=config.num_steps * step_seconds / 86400,
        bubble=local.schedule.bubble,
        microbatches=local.schedule.microbatches,
        repeats=local.schedule.repeats,
    )


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The work of one device in one pass: FLOPs of matrix products, bytes to and from HBM, and its traffic."""

    flops: float
    bytes: float
    traffic: list[Traffic]


def _passes(local: Local, sent: list[Traffic], kernel: str) -> list[_Pass]:
    """Return the forward pass, the backward pass and the update of one step."""
    model, size, policy, parts = local.model, local.itemsize, local.config.compute.remat, local.micro_batches
    tokens = local.tokens * parts
    head = model["embedding.weight" if local.config.model.tie_embeddings else "lm_head.weight"]
    computed = tokens * local.schedule.work  # in the layers
    layers = 2 * computed * sum(w.layers * w.met for w in model.products)
    logits = 2 * tokens * head.used
    scores = computed * model.scores * local.config.row_length / 2
    # A product whose result only a sum consumes is not computed again: the feed-forward's last, or one that is saved.
    last = [w for w in model.products if w.returns and (policy == "attention" or w.of_feed_forward)]
    of_attention = [w for w in model.products if policy in ("projections", "offload") and not w.of_feed_forward]
    skipped = [*last, *of_attention, *(w for w in model.products if policy == "offload" and w.is_up)]
    repeated = layers - 2 * computed * sum(w.layers * w.met for w in skipped)
    again = {"none": 0.0, "dots": scores}.get(policy, repeated + scores)
    of = widths(local)
    gathered = parts * local.schedule.gathers * size * sum(w.layers * w.used for w in model.products)
    # Reads and writes of each product, and the few passes over the residual stream between them.
    flow = computed * size * (of.inputs + of.outputs + 6 * of.residual)
    stored = 4 * sum(w.stored for w in model.weights)
    recomputed = 0 if policy == "none" else 1
    # Blocks leave out the keys that come later in the text.
    seen = local.config.row_length // (1 if kernel == "reference" else 2)
    in_forward, in_backward = (
        n * computed * seen * model.heads * local.config.model.num_layers for n in SCORE_BYTES.get(kernel, (0, 0))
    )
    runs = 1 + local.pairs  # the model, and the reference of pairs of answers
    forward = _Pass(
        # The loss takes its gradient in the forward pass; before that of pairs, both models' are summed.
        runs * (layers + scores) + (5 if local.pairs else 3) * logits,
        runs * (flow + 2 * gathered + in_forward) + (4 + 2 * local.pairs) * 4 * tokens * model.vocab,
        [t for t in sent if not t.backward] * runs,
    )
    backward = _Pass(
        2 * layers + 2.5 * scores + again,  # flash attention: five products to the forward pass's two
        (2 + recomputed) * flow + (4 + recomputed) * gathered + in_backward + recomputed * in_forward,
        [t for t in sent if t.backward],
    )
    # Read: gradients twice (their norm comes first), parameters, the optimizer's state; written: the latter two.
    state = argument_bytes(local)["optimizer"] - 8  # without two counters
    update = 4 * stored + 2 * state + (2 * parts * stored if parts > 1 else 0)
    return [forward, backward, _Pass(0.0, update, [])]


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Memory of sampling a batch of texts, and the time that reading it takes for every token.

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
        """Return whether the memory of a device is enough."""
        return sum(self.memory.values()) <= self.capacity


def estimate_sampling(config: RunConfig, topology: Topology, batch: int, length: int) -> SamplingPlan:
    """Return the plan of sampling `batch` rows of up to `length` positions with the run's mesh."""
    need = sampling_memory(config, topology.num_chips, batch, length)
    # Every device reads its part of the weights and, where fsdp splits them, writes and reads the gathered weights.
    read = need["parameters"] * (1 + 2 * (config.mesh.sizes(topology.num_chips)["fsdp"] > 1)) + need["cache"]
    seconds = read / topology.chip.bandwidth
    return SamplingPlan(batch, length, need, int(topology.chip.memory), seconds, batch / seconds)
