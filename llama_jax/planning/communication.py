"""What the devices of a train step have to send one another: the least that a layout needs, and how long it takes.

Formulas: "How to scale your model" (jax-ml.github.io/scaling-book), chapters 3 and 5. What is sent follows from how this
package computes: weights are split over `fsdp` in storage only and gathered in the compute type for their product;
`tensor` sums the outputs of products over split dimensions; `context` passes keys and values around a ring.
"""

import dataclasses

from llama_jax.parallel import mesh_axis_sizes
from llama_jax.planning.hardware import Network
from llama_jax.planning.workload import Workload, cache_bytes, itemsize, local_tokens, weights


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over one mesh axis, for the same purpose.

    what: parameters, gradients, activations or keys and values.
    kind: all-gather, reduce-scatter, all-reduce or collective-permute.
    axis: of the mesh.
    backward: whether in the backward pass.
    bytes: per device and step: what a gather makes, what the others take.
    """

    what: str
    kind: str
    axis: str
    backward: bool
    bytes: int

    def seconds(self, network: Network) -> tuple[float, float]:
        """(over links within a slice or node, between them): bandwidth alone, no latency."""
        if self.kind == "collective-permute":
            return (0.0, self.bytes / network.dcn) if not network.ici else (self.bytes / network.hop, 0.0)
        twice = 2 if self.kind == "all-reduce" else 1

        def share(size: int, bandwidth: float) -> float:
            return twice * self.bytes * (size - 1) / size / bandwidth if size > 1 else 0.0

        return share(network.inner, network.ici), share(network.outer, network.dcn)


def traffic(workload: Workload) -> list[Traffic]:
    """What one step sends, on the current (abstract) mesh."""
    found = _of_weights(workload)
    if mesh_axis_sizes()["tensor"] > 1:
        found += _of_activations(workload)
    if mesh_axis_sizes()["context"] > 1:
        found += _of_keys(workload)
    total: dict[tuple[str, str, str, bool], int] = {}
    for t in found:
        key = (t.what, t.kind, t.axis, t.backward)
        total[key] = total.get(key, 0) + t.bytes
    return [Traffic(*key, size) for key, size in total.items() if size]


def _of_weights(workload: Workload) -> list[Traffic]:
    sizes, parts = mesh_axis_sizes(), workload.optimizer.accumulation_steps
    size = itemsize(workload)
    found = []
    for name, weight in weights(workload.model).items():
        used = parts * weight.copies * weight.used() * size
        kept = used
        if weight.is_gathered():
            again = weight.layers and workload.compute.remat != "none"  # else the backward pass finds them saved
            tied = name == "embedding.weight" and workload.model.tie_embeddings  # gathered for its rows, then as head
            found += [Traffic("parameters", "all-gather", "fsdp", False, used * (2 if tied else 1))]
            found += [Traffic("parameters", "all-gather", "fsdp", True, used)] if again else []
            found += [Traffic("gradients", "reduce-scatter", "fsdp", True, used)]
            kept //= sizes["fsdp"]
        elif sizes["fsdp"] > 1:
            found += [Traffic("gradients", "all-reduce", "fsdp", True, used)]
        for axis in ("data", "context"):
            if sizes[axis] > 1:
                found += [Traffic("gradients", "all-reduce", axis, True, kept)]
    return found


def _of_activations(workload: Workload) -> list[Traffic]:
    tokens = local_tokens(workload) * workload.optimizer.accumulation_steps * itemsize(workload)
    found, inputs = [], {}
    for name, weight in weights(workload.model).items():
        module = name.rpartition(".")[0].rpartition(".")[0]
        size = tokens * weight.copies
        if weight.in_dims and weight.splits("in"):  # its product is a sum over devices
            found += [Traffic("activations", "all-reduce", "tensor", False, size * weight.width("out"))]
            if weight.layers and workload.compute.remat == "full" and not module.endswith("feed_forward"):
                found += [Traffic("activations", "all-reduce", "tensor", True, size * weight.width("out"))]
        if weight.in_dims and weight.splits("out"):  # so is the gradient of its input; of all that share it, once
            inputs[module] = size * weight.width("in")
        if name == "embedding.weight" and weight.used() < weight.shape[0] * weight.shape[1]:
            found += [Traffic("activations", "all-reduce", "tensor", False, size * weight.shape[1])]
            if workload.model.tie_embeddings:
                inputs["head"] = size * weight.shape[1]
    return found + [Traffic("activations", "all-reduce", "tensor", True, size) for size in inputs.values()]


def _of_keys(workload: Workload) -> list[Traffic]:
    """Around the ring: keys and values, and in the backward pass their float32 gradients beside them."""
    context, parts = mesh_axis_sizes()["context"], workload.optimizer.accumulation_steps
    dtype = workload.dtype
    keys = cache_bytes(workload.model, 1, 1, dtype) * local_tokens(workload) * parts
    again = 0 if workload.compute.remat == "none" else 1
    hops = context - 1
    forward = Traffic("keys and values", "collective-permute", "context", False, hops * keys)
    gradients = context * keys * 4 // dtype.itemsize
    backward = Traffic("keys and values", "collective-permute", "context", True, (1 + again) * hops * keys + gradients)
    return [forward, backward]
