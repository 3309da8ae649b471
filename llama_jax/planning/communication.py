"""Traffic between the devices of a train step: what a layout needs, and how long it takes.

Formulas: "How to scale your model" (jax-ml.github.io/scaling-book), chapters 3 and 5. The traffic follows from how
this package computes: weights are split over `fsdp` in storage only and gathered in the compute type for their product;
`tensor` sums the outputs of products over split dimensions; `context` passes keys and values around a ring; `expert`
brings tokens to their experts and back; `pipeline` sends microbatches on to the next stage, and those that wait for the
first one, or have left the last, to the one before.
"""

import dataclasses

from llama_jax.planning.local import Local
from llama_jax.planning.topology import Network

SENT = "ragged-all-to-all"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over one mesh axis, for the same purpose.

    purpose: parameters, gradients, activations, tokens of experts, keys and values, or their gradients.
    kind: all-gather, reduce-scatter, all-reduce, collective-permute or ragged-all-to-all.
    axis: of the mesh.
    backward: True in the backward pass.
    bytes: per device and step: the result of a gather, the input of the others.
    """

    purpose: str
    kind: str
    axis: str
    backward: bool
    bytes: int

    @property
    def hidden(self) -> bool:
        """Return whether a TPU that overlaps computes meanwhile: in gathers and hops; all else waits for sums.

        A stage of a pipeline waits for what it computes next.
        """
        return self.kind in ("all-gather", "collective-permute") and self.axis != "pipeline"

    def rounds(self, network: Network) -> int:
        """Return how often a ring passes the bytes on: twice for sums, and for what XLA compiles as sums."""
        as_sums = {"all-gather": network.gathers_by_sums, "reduce-scatter": network.scatters_by_sums}
        return 2 if as_sums.get(self.kind, self.kind == "all-reduce") else 1

    def seconds(self, network: Network) -> tuple[float, float]:
        """Return the times (over links within a slice or node, between these), by bandwidth alone."""
        if self.kind == "collective-permute":
            if self.axis == "pipeline" and network.outer > 1:  # all stages wait for the slowest hop
                return 0.0, self.bytes / network.dcn
            return (self.bytes / network.hop, 0.0) if network.ici else (0.0, self.bytes / network.dcn)
        rounds = self.rounds(network)
        links = network.distance if self.kind == SENT else 1  # others send to their neighbours alone

        def share(size: int, bandwidth: float) -> float:
            return rounds * self.bytes * (size - 1) / size / bandwidth if size > 1 else 0.0

        return links * share(network.inner, network.ici), share(network.outer, network.dcn)


def traffic(local: Local, kernel: str = "blockwise") -> list[Traffic]:
    """Return all traffic of one step, whose attention is computed by `kernel`."""
    found = _of_weights(local)
    if local.sizes["tensor"] > 1:
        found += _of_activations(local)
    if local.sizes["context"] > 1:
        found += _of_keys(local, kernel)
    if local.sizes["expert"] > 1:
        found += _of_tokens(local)
    if local.sizes["pipeline"] > 1:
        found += _of_microbatches(local)
    total: dict[tuple[str, str, str, bool], int] = {}
    for t in found:
        key = (t.purpose, t.kind, t.axis, t.backward)
        total[key] = total.get(key, 0) + t.bytes
    return [Traffic(*key, size) for key, size in total.items() if size]


def _of_weights(local: Local) -> list[Traffic]:
    found = []
    # With nothing computed again, the backward pass finds the gathered weights of the layers saved.
    again = local.config.compute.remat != "none"
    for weight in local.model.weights:
        # A pipeline gathers its layers, and sums their gradients, at every tick.
        times = local.schedule.gathers if weight.layers else 1
        size = round(local.micro_batches * weight.copies * weight.used * local.itemsize * times)
        kept = size
        if weight.is_gathered:
            tied = weight.name == "embedding.weight" and local.config.model.tie_embeddings
            # If tied, for its rows, and then as the head.
            # With nothing computed again a stage gathers its layers once for all ticks.
            once = size if again or not weight.layers else round(size / times / local.schedule.stages)
            found += [Traffic("parameters", "all-gather", "fsdp", False, (2 if tied else 1) * once)]
            found += [Traffic("parameters", "all-gather", "fsdp", True, size)] if weight.layers and again else []
            found += [Traffic("gradients", "reduce-scatter", "fsdp", True, size)]
            kept //= local.sizes["fsdp"]
        elif local.sizes["fsdp"] > 1:
            found += [Traffic("gradients", "all-reduce", "fsdp", True, size)]
        for axis in ("pipeline", "data", "context", "expert"):
            split = weight.experts if axis == "expert" else weight.layers and axis == "pipeline"
            if local.sizes[axis] > 1 and not split:
                found += [Traffic("gradients", "all-reduce", axis, True, kept)]
    return found


def _of_activations(local: Local) -> list[Traffic]:
    outside = local.tokens * local.micro_batches * local.itemsize
    tokens, width = round(outside * local.schedule.work), local.config.model.hidden_size
    found: list[tuple[bool, int]] = []
    inputs: dict[str, int] = {}
    for weight in local.model.weights:
        if weight.sums:
            found.append((False, tokens * weight.copies * weight.outputs))
            # Attention's sum is computed again, because the layer goes on from it; nothing follows the feed-forward's.
            if local.config.compute.remat == "full" and not weight.of_feed_forward:
                found.append((True, tokens * weight.copies * weight.outputs))
        if weight.splits and weight.layers:  # the gradient of its input is a sum too; for all that share it, one
            inputs[weight.module] = tokens * weight.copies * weight.inputs
    if local.model.vocab_splits:
        found += [(False, outside * width), (True, outside * width)]  # embedded tokens; the loss's gradient
    found += [(True, size) for size in inputs.values()]
    return [Traffic("activations", "all-reduce", "tensor", backward, size) for backward, size in found]


def _of_tokens(local: Local) -> list[Traffic]:
    """Return the tokens sent to the devices of all experts and back, as many as where nothing is dropped."""
    found, devices = [], local.sizes["expert"]
    for weight in local.model.weights:
        if not (weight.experts and weight.returns):
            continue
        size = weight.layers * local.tokens * local.micro_batches * local.itemsize * local.config.model.hidden_size
        if weight.exchanged:
            # There and back; backward the tokens once more, the results' gradients, and the tokens' gradients back.
            times = ((False, 2), (True, 3))
            found += [Traffic("tokens", SENT, "expert", back, n * weight.choices * size) for back, n in times]
        else:
            kinds = ("all-gather", "reduce-scatter")
            found += [Traffic("tokens", k, "expert", back, devices * size) for k in kinds for back in (False, True)]
    return found


def _of_keys(local: Local, kernel: str) -> list[Traffic]:
    """Return keys and values, and in the backward pass also their float32 gradients."""
    context = local.sizes["context"]
    keys = round(local.model.keys * local.tokens * local.micro_batches * local.schedule.work)
    # In the backward pass what is computed again travels again, and once more where attention keeps no gathered keys.
    again = (local.config.compute.remat != "none") + (kernel != "splash")
    ring = local.config.compute.context == "ring"
    # Around the ring a device passes on the parts of others; gradients go one hop further, back to their owner.
    forward = (context - 1 if ring else context) * keys * local.itemsize
    kinds = ("collective-permute", "collective-permute") if ring else ("all-gather", "reduce-scatter")
    return [
        Traffic("keys and values", kinds[0], "context", False, forward),
        Traffic("keys and values", kinds[0], "context", True, again * forward),
        Traffic("gradients of keys and values", kinds[1], "context", True, context * keys * 4),
    ]


def _of_microbatches(local: Local) -> list[Traffic]:
    """Return what stages send: each tick's result, those that wait or are done, and the layers of repeated rounds."""
    schedule = local.schedule
    size = local.micro_batches * local.tokens // schedule.of_stage * local.itemsize * local.config.model.hidden_size
    size *= schedule.ticks + schedule.microbatches + schedule.stages
    found = [Traffic("activations", "collective-permute", "pipeline", backward, size) for backward in (False, True)]
    if schedule.repeats > 1:
        layers = 4 * local.micro_batches * sum(w.stored for w in local.model.weights if w.layers)
        found += [
            Traffic("parameters", "collective-permute", "pipeline", backward, layers) for backward in (False, True)
        ]
    return found
