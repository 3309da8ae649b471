"""Assignments that are sent to the devices of their experts, without a capacity, so that each device gets its own rows.

A device sorts its assignments by expert, and `ragged_all_to_all` sends the rows of each expert to its slots. Only the
number of all rows bounds what one device may receive, and each would need a buffer for them. So rows go in rounds of
`ROOM` times the mean, as many rounds as the device with the most rows needs: one where the load is even. The loop over
rounds has a gradient of its own, which sends the rows again instead of keeping those of every round.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.nn.experts.groups import Body, Groups, alike, zeros_like
from llama_jax.parallel import platform

AXIS = "expert"
# Rows that a device takes in a round: over the mean of all devices, and at the least, so that few tokens are one round.
ROOM, LEAST = 1.25, 256

type Matrices = dict[str, jax.Array]


def sends_assignments(choices: int, devices: int) -> bool:
    """Return whether sorted assignments go to the devices of their experts, or each token to all devices.

    `choices` is the number of experts of a token. What sends fewer bytes is taken, or, of equal ones, less memory.
    """
    return 1 < devices >= choices


def taken_rows(choices: int, devices: int) -> float:
    """Return the rows for which a device has room at a time where nothing is dropped, for each of its own tokens."""
    return ROOM * choices if sends_assignments(choices, devices) else devices * choices


class _Slices(NamedTuple):
    """Slices of rows [S] that a device sends, S / devices to each in turn, as `ragged_all_to_all` takes them.

    starts: their first rows. sizes: their numbers of rows. targets: their first rows where they are received.
    received: sizes of the slices that this device receives, from each device in turn.
    """

    starts: jax.Array
    sizes: jax.Array
    targets: jax.Array
    received: jax.Array


class _Round(NamedTuple):
    """A round of an exchange: the slices to the experts, those back, and the rows of each of the device's experts."""

    there: _Slices
    back: _Slices
    counts: jax.Array


class _Plan:
    """Which assignments of this device are sent where, from the expert of each [A]; `num_experts` for none.

    order: [A], the assignments sorted by expert. place: [A], the place of each in this order.
    num_rounds: the same on all devices of the mesh, so that they run the same collectives.
    """

    def __init__(self, experts: Int[Array, " a"], num_experts: int):
        self.devices = jax.lax.axis_size(AXIS)
        self.here = num_experts // self.devices
        self.order = jnp.argsort(experts, stable=True)
        self.place = jnp.argsort(self.order)
        first = jnp.searchsorted(experts[self.order], jnp.arange(num_experts + 1))
        self.counts = jax.lax.all_gather(jnp.diff(first), AXIS)  # [devices, E]
        self.room = min(max(math.ceil(ROOM * experts.size), LEAST), self.devices * experts.size)
        self.groups = Groups.of(self.room, self.here)
        most = self.counts.sum(0).reshape(self.devices, self.here).sum(1).max()
        varying = tuple(jax.typeof(most).manual_axis_type.varying)
        self.num_rounds = jax.lax.pmax((most + self.room - 1) // self.room, varying)

    def round(self, number: jax.Array) -> _Round:
        """Return a round. A device takes its rows in the order of experts, of each expert in the order of senders."""
        # All [E, devices]: of every expert, the rows from each device.
        rows = self.counts.T
        ends = jnp.cumsum(rows.reshape(self.devices, -1), 1).reshape(rows.shape)
        first, last = (jnp.clip(n * self.room - (ends - rows), 0, rows) for n in (number, number + 1))
        sizes, starts = last - first, (jnp.cumsum(self.counts, 1) - self.counts).T + first
        of_expert = sizes.sum(1).reshape(self.devices, self.here)
        targets = self.groups.first(of_expert).reshape(-1, 1) + jnp.cumsum(sizes, 1) - sizes
        device = jax.lax.axis_index(AXIS)

        def sent(table: jax.Array) -> jax.Array:
            return table[:, device]

        def received(table: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(table, device * self.here, self.here).T.reshape(-1)

        return _Round(
            _Slices(sent(starts), sent(sizes), sent(targets), received(sizes)),
            _Slices(received(targets), received(sizes), received(starts), sent(sizes)),
            of_expert[device],
        )


def exchange(rows: Float[Array, "n d"], into: Float[Array, "m d"], slices: _Slices) -> Float[Array, "m d"]:
    """Return `into` with the slices of `rows` that the devices send one another."""
    if platform() != "cpu":
        return jax.lax.ragged_all_to_all(rows, into, *slices, axis_name=AXIS)
    # XLA has none for CPUs: every device takes its slices of the rows of all.
    per_device = slices.starts.size // jax.lax.axis_size(AXIS)
    turn = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    sender = jnp.arange(slices.starts.size) // per_device
    place = jnp.arange(into.shape[0])[:, None] - turn(slices.targets)
    inside = (place >= 0) & (place < slices.received)  # [M, S], one slice at most for each row
    source = jnp.where(inside, sender * rows.shape[0] + turn(slices.starts) + place, 0).sum(1)
    everyone = jax.lax.all_gather(rows, AXIS, axis=0, tiled=True)
    return jnp.where(inside.any(1)[:, None], everyone[source], into)


def apply_exchanged(
    body: Body,
    x: Float[Array, "n d"],
    experts: Int[Array, "n k"],
    gates: Float[Array, "n k"],
    matrices: Mapping[str, jax.Array],
    num_experts: int,
) -> Float[Array, "n d"]:
    """Return the sum over a token's choices of gate times expert(x), in a `shard_map` over the axis `expert`.

    `experts` are those of the whole axis, `num_experts` for a choice that is not kept; `matrices` those of this device.
    """
    names = tuple(matrices)
    x, gates, experts, *values = alike(x, gates, experts, *matrices.values())
    return _exchanged(body, num_experts, x, gates, dict(zip(names, values, strict=True)), experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(
    body: Body, num_experts: int, x: jax.Array, gates: jax.Array, matrices: Matrices, experts: jax.Array
) -> jax.Array:
    plan = _Plan(experts.reshape(-1), num_experts)
    rows = _sorted_rows(x, plan, experts.shape[1])

    def add(number: jax.Array, returned: jax.Array) -> jax.Array:
        there, back, counts = plan.round(number)
        taken = exchange(rows, zeros_like((plan.groups.num_slots, rows.shape[1]), rows), there)
        return exchange(body(taken, matrices, plan.groups.product(counts)), returned, back)

    returned = jax.lax.fori_loop(0, plan.num_rounds, add, zeros_like(rows.shape, rows))
    picked = returned[plan.place].reshape(*experts.shape, -1).astype(jnp.float32)
    return (picked * gates[..., None]).sum(1).astype(x.dtype)


def _exchanged_forward(body, num_experts, x, gates, matrices, experts):
    return _exchanged(body, num_experts, x, gates, matrices, experts), (x, gates, matrices, experts)


def _exchanged_backward(body: Body, num_experts: int, residuals, d_y: jax.Array):
    x, gates, matrices, experts = residuals
    plan = _Plan(experts.reshape(-1), num_experts)
    rows, d_rows = (_sorted_rows(a, plan, experts.shape[1]) for a in (x, d_y))
    gate = gates.reshape(-1, 1)[plan.order]

    def add(number: jax.Array, totals: tuple[jax.Array, jax.Array, Matrices]):
        there, back, counts = plan.round(number)

        def take(sent: jax.Array) -> jax.Array:
            return exchange(sent, zeros_like((plan.groups.num_slots, sent.shape[1]), sent), there)

        # Gates stay with the results' gradients: to send the results back once more would take as long as the rows.
        out, pull = jax.vjp(lambda r, m: body(r, m, plan.groups.product(counts)), take(rows), matrices)
        d_out = take(d_rows).astype(jnp.float32)
        d_gate = (out.astype(jnp.float32) * d_out).sum(1, keepdims=True)
        d_taken, d_matrices = pull((d_out * take(gate)).astype(out.dtype))
        d_x, d_gates, total = totals
        return exchange(d_taken, d_x, back), exchange(d_gate, d_gates, back), jax.tree.map(jnp.add, total, d_matrices)

    zeros = jax.tree.map(lambda a: zeros_like(a.shape, a), (rows, gate, matrices))
    d_x, d_gates, d_matrices = jax.lax.fori_loop(0, plan.num_rounds, add, zeros)
    d_x = d_x[plan.place].reshape(*experts.shape, -1).sum(1)
    return d_x, d_gates[plan.place].reshape(gates.shape), d_matrices, None


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _sorted_rows(x: jax.Array, plan: _Plan, choices: int) -> jax.Array:
    """Return the rows of the assignments [A, D], in the plan's order, of tokens [N, D]."""
    return x[plan.order // choices]
