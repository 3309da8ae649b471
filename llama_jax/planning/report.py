"""`plan`, and its report as tables for people and as JSON for programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llama_jax.chips import GIB
from llama_jax.config import UserError, to_json
from llama_jax.planning.estimate import Plan, SamplingPlan, estimate, estimate_sampling
from llama_jax.planning.search import Candidate, search, suggestion
from llama_jax.planning.topology import Topology
from llama_jax.planning.xla.compiled import CompiledStep, DoesNotFit, compile_step
from llama_jax.run_config import RunConfig

SHOWN_CANDIDATES = 10


@dataclasses.dataclass(frozen=True)
class Report:
    """The plan of a run on a machine, with everything else that `plan` was asked for.

    plan: the estimate.
    suggestion: the smallest change that helps where it does not fit or waits for its network; None where it need not.
    sampling: the plan of sampling.
    candidates: all options that fit, the fastest first.
    compiled: XLA's figures of the compiled step.
    compile_failure: XLA's message where the machine's memory is too small for it.
    """

    plan: Plan
    suggestion: Candidate | None = None
    sampling: SamplingPlan | None = None
    candidates: tuple[Candidate, ...] | None = None
    compiled: CompiledStep | None = None
    compile_failure: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether step and sampling fit, by XLA's figure where the step was compiled, else by the estimate."""
        if self.compile_failure is not None or (self.sampling is not None and not self.sampling.fits):
            return False
        return self.plan.fits if self.compiled is None else self.compiled.memory.total <= self.plan.capacity

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""

        def of(candidate: Candidate) -> dict[str, Any]:
            return {"changes": candidate.changes, "topology": candidate.topology, "plan": candidate.plan.to_json()}

        found: dict[str, Any] = {"fits": self.fits, "plan": self.plan.to_json()}
        found["remedy"] = of(self.suggestion) if self.suggestion else None
        if self.sampling is not None:
            found["sampling"] = dataclasses.asdict(self.sampling) | {"fits": self.sampling.fits}
        if self.candidates is not None:
            found["candidates"] = [of(candidate) for candidate in self.candidates]
        if self.compiled is not None:
            found["compiled"] = to_json(self.compiled)
        if self.compile_failure is not None:
            found["compile_failure"] = self.compile_failure
        return found

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_heading(self.plan), Text()]
        columns = Table.grid(padding=(0, 4))
        columns.add_row(_memory_table(self), _time_table(self.plan))
        parts += [columns, Text(), _summary(self.plan)]
        if self.compiled is not None:
            parts += [Text(), _collectives_table(self.compiled), *_cycles(self.compiled)]
        if self.compile_failure is not None:
            parts += [Text(), Text(f"does not fit by XLA: {self.compile_failure}")]
        if self.sampling is not None:
            parts += [Text(), _sampling(self.sampling)]
        if self.candidates is not None:
            parts += [Text(), _candidates_table(self.candidates)]
        parts += [Text(), _verdict(self)]
        return Group(*parts)


def plan(
    config: RunConfig,
    topology: str,
    *,
    compile: bool = False,
    search_all: bool = False,
    sample_batch: int | None = None,
    sample_length: int | None = None,
) -> Report:
    """Plan a run on a machine such as `v5e:8x8`, which need not be here: memory, speed, and a change that helps.

    With `compile`, the report has XLA's figures of the real step (extra `plan`), with `search_all` all options that
    fit, with both `sample_` arguments the plan of sampling. Raises UserError for an unknown topology, for an
    encoder-decoder, and a mesh that fits neither its chips nor the batch.
    """
    if config.model.has_source:
        raise UserError("an encoder-decoder cannot be planned: the planner is for models of one sequence")
    machine = Topology.parse(topology)
    if (sample_batch is None) != (sample_length is None):
        given, missing = ("sample_batch", "sample_length")[:: 1 if sample_length is None else -1]
        raise UserError(f"{given} needs {missing} too")
    found = estimate(config, machine)
    sampling = compiled = failure = None
    if sample_batch is not None and sample_length is not None:
        sampling = estimate_sampling(config, machine, sample_batch, sample_length)
    if compile:
        try:
            compiled = compile_step(config, str(machine))
        except DoesNotFit as error:
            failure = str(error)
    return Report(
        plan=found,
        suggestion=suggestion(config, machine, found),
        sampling=sampling,
        candidates=tuple(search(config, machine)) if search_all else None,
        compiled=compiled,
        compile_failure=failure,
    )


def gib(size: float) -> str:
    """Return bytes as text in GiB."""
    return f"{size / GIB:.2f}"


def duration(seconds: float) -> str:
    """Return seconds as text, in seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def mesh_text(mesh: dict[str, int]) -> str:
    """Return the axes larger than 1 as text."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"


def _heading(plan: Plan) -> Text:
    parts = f" in {plan.accumulation_steps} parts" if plan.accumulation_steps > 1 else ""
    chips = "" if plan.num_chips == 1 else f"{plan.num_chips} chips as "
    return Text(
        f"{plan.topology}: {chips}{mesh_text(plan.mesh)}; batch {plan.global_batch_size} x "
        f"{plan.sequence_length}{parts}, remat {plan.remat}"
    )


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _memory_table(report: Report) -> Table:
    plan, memory = report.plan, report.compiled.memory if report.compiled is not None else None
    table = _table("kind", "estimate", *(["XLA"] if memory else []), title="memory of a device, GiB")
    taken = ("parameters", "optimizer", "batch")
    for kind, size in plan.memory.items():
        table.add_row(kind, gib(size))
        if kind == taken[-1]:
            table.add_row("= arguments", gib(plan.argument_bytes), *([gib(memory.arguments)] if memory else []))
    total = sum(size for kind, size in plan.memory.items() if kind not in taken)
    rest = memory.total - memory.arguments if memory else 0
    table.add_row("= beyond them", gib(total), *([gib(rest)] if memory else []))
    table.add_row("total", gib(plan.total_bytes), *([gib(memory.total)] if memory else []), style="bold")
    table.add_row("device", gib(plan.capacity))
    if plan.host_bytes:
        table.add_row("in its host", gib(plan.host_bytes))
        table.add_row("host", gib(plan.host_capacity))
    return table


def _time_table(plan: Plan) -> Table:
    table = _table("resource", "busy", "of the step", title="time of a step")
    for name, seconds in sorted(plan.seconds.items(), key=lambda item: -item[1]):
        style = "bold" if name == plan.bound else ""
        table.add_row(name, duration(seconds), f"{seconds / plan.step_seconds:.0%}", style=style)
    table.add_row("step", duration(plan.step_seconds), "", style="bold")
    return table


def _summary(plan: Plan) -> Text:
    bubble = (
        f"\npipeline: {plan.microbatches} microbatches"
        + (f", {plan.repeats} times around" if plan.repeats > 1 else "")
        + f"; {plan.bubble:.1%} of the ticks are its bubble"
    )
    return Text(
        f"{plan.parameters:,} parameters, {plan.flops:.3g} FLOPs a step, bound by {plan.bound}\n"
        f"MFU {plan.mfu:.1%}, {plan.tokens_per_second:,.0f} tokens/s, {plan.days:,.1f} days"
        + (bubble if plan.bubble else "")
    )


def _collectives_table(compiled: CompiledStep) -> Table:
    table = _table(
        "collective", "axes", "MiB", "times", "with products", title="traffic of the compiled step, for each device"
    )
    rows: dict[tuple[str, str, bool], list[float]] = {}
    for c in compiled.collectives:
        row = rows.setdefault((c.kind, ", ".join(c.axes) or "-", c.overlapped), [0.0, 0])
        row[0] += c.bytes * c.count
        row[1] += c.count
    for (kind, axes, overlapped), (size, count) in sorted(rows.items(), key=lambda item: -item[1][0]):
        table.add_row(kind, axes, f"{size / 2**20:,.1f}", f"{count:,.0f}", "yes" if overlapped else "no")
    return table


def _cycles(compiled: CompiledStep) -> list[Text]:
    cycles = dataclasses.asdict(compiled.cycles)
    total = sum(cycles.values())
    kinds = ", ".join(f"{kind} {n / total:.1%}" for kind, n in cycles.items() if n)
    return [Text(f"{total:,} cycles without Pallas kernels and waits, by the compiler: {kinds}")] if total else []


def _sampling(plan: SamplingPlan) -> Text:
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.memory.items() if size)
    need = f"{gib(sum(plan.memory.values()))} of {gib(plan.capacity)} GiB ({kinds})"
    return Text(
        f"sampling {plan.batch} x {plan.length}: {need}; {duration(plan.token_seconds)} a token by HBM alone, "
        f"{plan.tokens_per_second:,.0f} tokens/s"
    )


def _candidates_table(candidates: Sequence[Candidate]) -> RenderableType:
    if not candidates:
        return Text("no mesh, accumulation and remat policy fits")
    table = _table(
        "mesh", "parts", "remat", "GiB", "step", "MFU", "bound by", title=f"options that fit, {len(candidates)} in all"
    )
    for candidate in candidates[:SHOWN_CANDIDATES]:
        plan = candidate.plan
        table.add_row(
            mesh_text(plan.mesh),
            str(plan.accumulation_steps),
            plan.remat,
            gib(plan.total_bytes),
            duration(plan.step_seconds),
            f"{plan.mfu:.1%}",
            plan.bound,
        )
    return table


def _verdict(report: Report) -> Text:
    plan = report.plan
    if report.fits and not plan.communication_bound:
        return Text("fits", style="bold green")
    head = "fits, and waits for its network" if report.fits else "does not fit"
    found = report.suggestion
    if found is None:
        return Text(
            f"{head}; no single change of mesh, accumulation or remat helps",
            style="bold red" if not report.fits else "bold",
        )
    where = f" on {found.topology}" if found.topology != plan.topology else ""
    change = f"with {found.command()}" if found.changes else "with nothing else changed"
    result = f"{gib(found.plan.total_bytes)} GiB, {duration(found.plan.step_seconds)} a step"
    return Text(
        f"{head}; the smallest change that helps: {change}{where}: {result}",
        style="bold red" if not report.fits else "bold",
    )
