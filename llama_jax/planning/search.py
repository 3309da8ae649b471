"""The smallest change that makes a plan fit or frees it from its network, and all options that fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.config import UserError, override
from llama_jax.nn import Experts
from llama_jax.parallel import MESH_AXES, MeshConfig, batch_parts
from llama_jax.planning.estimate import Plan, estimate
from llama_jax.planning.topology import Topology
from llama_jax.run_config import RunConfig

# From the one that keeps most on the device to the one that keeps least; `offload` keeps less, and computes less again.
REMAT_ORDER = ("none", "dots", "projections", "attention", "full")
REMATS = (*REMAT_ORDER, "offload")
WORTH = 0.95  # a change that is to save time has to bring it below this part
MAX_DOUBLINGS = 12  # of the chips, before there is no advice


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A change of a plan.

    changes: of the config, by dotted key.
    topology: to run on.
    plan: the estimate of it.
    """

    changes: dict[str, Any]
    topology: str
    plan: Plan

    def command(self) -> str:
        """Return the change as it is written on the command line."""
        return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in self.changes.items())


def suggestion(config: RunConfig, topology: Topology, plan: Plan) -> Candidate | None:
    """Return the smallest change that makes the plan fit, or saves time where it fits and waits for its network.

    Smallest: of the fewest options (accumulation, remat, mesh), then the fastest; more chips only where none helps.
    None where nothing is wrong, or nothing helps.
    """
    if plan.fits and not plan.communication_bound:
        return None
    options = (
        list(_accumulations(config)),
        [{"compute.remat": name} for name in _stronger(config)] if not plan.fits else [],
        [
            _mesh_change(config, plan, sizes)
            for sizes in meshes(topology.num_chips, num_slices=topology.num_slices)
            if sizes != plan.mesh
        ],
    )
    for count in range(1, len(options) + 1):
        found = [
            candidate
            for chosen in itertools.combinations(options, count)
            for changes in itertools.product(*chosen)
            if (candidate := _try(config, topology, dict(itertools.chain(*(c.items() for c in changes)))))
            and candidate.plan.fits
            and (not plan.fits or candidate.plan.step_seconds < WORTH * plan.step_seconds)
        ]
        if found:
            return min(found, key=lambda c: (c.plan.step_seconds, len(c.changes), c.plan.total_bytes))
    if plan.fits:
        return None
    follow = {} if -1 in dataclasses.asdict(config.mesh).values() else {"mesh.fsdp": -1}
    for _ in range(MAX_DOUBLINGS):
        topology = topology.larger()
        weaker = ({}, *_accumulations(config), {"compute.remat": "full"})
        for changes in weaker:
            candidate = _try(config, topology, follow | changes)
            if candidate and candidate.plan.fits:
                return candidate
    return None


def search(config: RunConfig, topology: Topology) -> list[Candidate]:
    """Return all meshes, accumulation steps and remat policies that fit, the fastest first.

    Of equally fast ones the simpler layout, then the one that needs less memory.
    """
    found = []
    for sizes in meshes(topology.num_chips, _num_experts(config), topology.num_slices):
        mesh = {f"mesh.{axis}": size for axis, size in sizes.items()}
        for parts, remat in itertools.product(_parts(config, sizes), REMATS):
            changes = mesh | {"optimizer.accumulation_steps": parts, "compute.remat": remat}
            candidate = _try(config, topology, changes)
            if candidate and candidate.plan.fits:
                found.append(candidate)
    return sorted(found, key=_rank)


def mesh_of(config: RunConfig, devices: Sequence[Any]) -> MeshConfig:
    """Return the mesh of a run on these JAX devices: the config's; where it has the defaults, the fastest that fits."""
    if config.mesh != MeshConfig() or config.model.has_source or (machine := Topology.of(devices)) is None:
        return config.mesh
    return best_mesh(config, machine) or config.mesh


def best_mesh(config: RunConfig, topology: Topology) -> MeshConfig | None:
    """Return the mesh of the fastest plan that leaves all other options as they are, or None where none fits."""
    found = []
    for sizes in meshes(topology.num_chips):
        candidate = _try(config, topology, {f"mesh.{axis}": size for axis, size in sizes.items()})
        if candidate and candidate.plan.fits:
            found.append(candidate)
    return MeshConfig(**min(found, key=_rank).plan.mesh) if found else None


def _rank(candidate: Candidate) -> tuple[float, int, int]:
    plan = candidate.plan
    # To a thousandth: closer plans count as equal, and then fewer split axes are better.
    return float(f"{plan.step_seconds:.3g}"), sum(size > 1 for size in plan.mesh.values()), plan.total_bytes


def meshes(num_chips: int, num_experts: int = 1, num_slices: int = 1) -> Iterator[dict[str, int]]:
    """Yield all ways to split chips over the axes; the expert axis, by default 1, divides the number of experts.

    The stages of a pipeline are slices, or several slices each.
    """

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    for pipeline in divisors(num_slices):
        chips = num_chips // pipeline
        for expert, tensor in itertools.product(divisors(math.gcd(chips, num_experts)), divisors(chips)):
            for context in divisors(chips // expert // tensor) if chips % (expert * tensor) == 0 else ():
                for data in divisors(chips // expert // tensor // context):
                    fsdp = chips // expert // tensor // context // data
                    yield dict(zip(MESH_AXES, (pipeline, data, fsdp, tensor, context, expert), strict=True))


def _num_experts(config: RunConfig) -> int:
    """Return the greatest common divisor of the layers' numbers of experts, 1 where there are none."""
    numbers = [piece.num_experts for _, piece in config.model.layer_pieces() if isinstance(piece, Experts)]
    return math.gcd(*numbers) if numbers else 1


def _try(config: RunConfig, topology: Topology, changes: dict[str, Any]) -> Candidate | None:
    """Return the plan with these changes, or None where they are impossible or split what cannot be split."""
    try:
        changed = override(config, changes)
        if not _sensible(changed, changed.mesh.sizes(topology.num_chips)):
            return None
        return Candidate(changes, str(topology), estimate(changed, topology))
    except UserError:
        return None


def _sensible(config: RunConfig, sizes: dict[str, int]) -> bool:
    """Return whether tensor divides the heads, and context the sequence in zigzag order."""
    heads = [getattr(mixer, "num_heads", sizes["tensor"]) for mixer, _ in config.model.layer_pieces()]
    if any(n % sizes["tensor"] for n in heads):
        return False
    return sizes["context"] == 1 or config.row_length % (2 * sizes["context"]) == 0


def _stronger(config: RunConfig) -> tuple[str, ...]:
    return REMATS[REMATS.index(config.compute.remat) + 1 :]


def _accumulations(config: RunConfig) -> Iterator[dict[str, Any]]:
    now = config.optimizer.accumulation_steps
    for parts in range(2 * now, config.global_batch_size + 1, now):
        if config.global_batch_size % parts == 0:
            yield {"optimizer.accumulation_steps": parts}


def _parts(config: RunConfig, sizes: dict[str, int]) -> list[int]:
    rows = config.global_batch_size // batch_parts(sizes)
    return [2**i for i in range(int(math.log2(rows)) + 1) if rows % 2**i == 0] if rows else []


def _mesh_change(config: RunConfig, plan: Plan, sizes: dict[str, int]) -> dict[str, Any]:
    """Return the keys that change the present mesh into these sizes; an axis of -1 is left to follow."""
    now = dataclasses.asdict(config.mesh)
    return {f"mesh.{axis}": size for axis, size in sizes.items() if size != plan.mesh[axis] and now[axis] != -1}
