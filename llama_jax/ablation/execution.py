"""The runs of a sweep: prepared once, trained one after another, each recorded as it ends."""

import dataclasses
import functools
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.ablation.records import SWEEP_FILE, VariantRecord, sweep_json, trial_directory
from llama_jax.ablation.tuning import SEED, Tune, Tuning
from llama_jax.ablation.variants import Variant, code_digest
from llama_jax.checkpoint import SaveFailed
from llama_jax.config import UserError, override
from llama_jax.files import write_text
from llama_jax.run import (
    Preempted,
    Prepared,
    Run,
    RunFailed,
    lane_mesh,
    lanes_at_once,
    prepare_runs,
    termination,
    train_together,
)
from llama_jax.run_config import RunConfig
from llama_jax.screen import Bar

METRIC = "val_loss"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to train.

    variant: name of its variant.
    what: short text that tells it from the variant's others.
    prepared: what it shares with others.
    run: the run.
    until: its last step.
    failed: True for one that has failed in an earlier call.
    """

    variant: str
    what: str
    prepared: Prepared
    run: Run
    until: int
    failed: bool = False

    @functools.cached_property
    def start(self) -> int:
        """Step of its latest checkpoint."""
        return max(self.run.committed_steps(), default=0)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.failed or self.start >= self.until

    def program(self) -> Hashable:
        """Return a value that is equal for runs of one compiled program."""
        config = self.run.config
        shape = config.global_batch_size, config.sequence_length, config.data.objective, config.data.packing
        kind = config.optimizer.hyper(config.num_steps).kind
        return config.model, config.compute, config.mesh, shape, kind, code_digest(self.prepared.components)


class Sweeper:
    """The execution of a sweep in the directory `place`, which `sweep.json` describes at every moment.

    `asked` are the arguments that decide what is learned; `records` are of all variants, earlier calls'
    too.
    """

    def __init__(
        self,
        place: Path,
        asked: Mapping[str, Any],
        baseline: str,
        seeds: Sequence[int],
        records: Sequence[VariantRecord],
        quiet: bool,
    ):
        self.place, self.baseline, self.seeds, self.quiet = place, baseline, list(seeds), quiet
        self.records = {record.name: record for record in records}
        self._asked, self._prepared = dict(asked), dict[str, Prepared]()
        self._said, self._done = set[str](), 0

    def unfinished(self, variant: Variant) -> bool:
        """Return whether runs of a variant are left to train."""
        record, steps = self.records[variant.name], variant.config.num_steps
        seeds = [seed for seed in self.seeds if str(seed) not in record.failures]
        runs = [Run(trial_directory(self.place, record, seed), variant.config) for seed in seeds]
        return any(max(run.committed_steps(), default=0) < steps for run in runs)

    def prepare(self, base: RunConfig, made: Sequence[Variant]) -> None:
        """Prepare and check all variants, each distinct tokenizer and corpus once; then write the sweep's files.

        Raises UserError for the first variant that cannot run.
        """
        shared: dict[Any, tuple[Path, Prepared]] = {}

        def texts_of(config: RunConfig) -> Any:
            """Return a value that is equal for configs with one tokenizer and corpus."""
            return config.tokenizer, config.data, config.model.has_source

        for variant in made:
            config, texts = variant.config, texts_of(variant.config)
            own = self.place / ("" if texts == texts_of(base) else self.records[variant.name].directory)
            place, other = shared.get(texts, (own, None))
            try:
                found = prepare_runs(config, place, variant.components, quiet=self.quiet)
                if other is not None and other.config.sequence_length == config.sequence_length:
                    found = dataclasses.replace(found, datasets=other.datasets)
                if self.unfinished(variant):
                    found.check(self.seeds[0])
            except (UserError, RunFailed) as error:
                raise UserError(f"variant '{variant.name}': {error}") from error
            shared.setdefault(texts, (place, found))
            self._prepared[variant.name] = found
        self.place.mkdir(parents=True, exist_ok=True)
        self.write()
        for place, found in shared.values():
            found.save(place)

    def write(self) -> None:
        """Write sweep.json."""
        data = sweep_json(METRIC, self.baseline, self.seeds, list(self.records.values())) | {"arguments": self._asked}
        write_text(self.place / SWEEP_FILE, json.dumps(data, indent=2) + "\n")

    def train(self, made: Sequence[Variant], tune: Tune) -> None:
        """Tune each variant where `tune` has keys, then train all with every seed, as far as this is not done.

        Raises Preempted after a termination signal, with a checkpoint saved.
        """
        tunings = {v.name: Tuning(self.place / "tune" / self.records[v.name].directory, v.config, tune) for v in made}
        untuned = [v for v in made if tune and self.records[v.name].tuned is None]
        total = sum(len(self.seeds) * v.config.num_steps for v in made)
        total += sum(tunings[v.name].total_steps for v in untuned)
        with (
            Bar("sweep", 0, total, quiet=self.quiet, slow=True) as bar,
            termination() as stopping,
        ):
            self._bar, self._stopping = bar, stopping
            for variant in untuned:
                self._tune(variant, tunings[variant.name])
            jobs: list[Job] = []
            for variant in made:
                record, prepared = self.records[variant.name], self._prepared[variant.name]
                if record.tuned is not None:
                    changes = tunings[variant.name].changes(record.tuned["value"])
                    prepared = prepared.changed(override(prepared.config, changes, variant.components))
                for seed in self.seeds:
                    run = prepared.run(trial_directory(self.place, record, seed), seed)
                    failed = str(seed) in record.failures
                    jobs.append(Job(variant.name, f"seed {seed}", prepared, run, run.config.num_steps, failed))
            try:
                self._run(jobs)
            except SaveFailed as error:
                raise RunFailed(f"{error}: make room there, then call it again to continue") from error

    def _tune(self, variant: Variant, tuning: Tuning) -> None:
        """Find the variant's values and record them with their cost."""
        prepared = self._prepared[variant.name]

        def trials(candidates: Mapping[Path, Mapping[str, Any]], until: int) -> list[float | None]:
            """Return the validation losses at the step `until` of runs with these changes."""
            jobs: list[Job] = []
            for directory, changes in candidates.items():
                own = prepared.changed(override(prepared.config, changes, variant.components))
                jobs.append(Job(variant.name, directory.name, own, own.run(directory, SEED), until))
            self._run(jobs)
            found = [{line["step"]: line.get("val_loss") for line in job.run.metrics()} for job in jobs]
            return [losses.get(until) for losses in found]

        found = tuning.search(trials)
        if found["value"] is None:
            raise UserError(f"variant '{variant.name}': every run of tune fails: give other ranges than {tuning.tune}")
        if warning := tuning.warning(found):
            self._bar.say(f"{variant.name}: {warning}", always=True)
        self._record(variant.name, tuned=found)

    def _run(self, jobs: Sequence[Job]) -> None:
        """Train jobs, those of one program together where this is faster."""
        groups: dict[Any, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.program(), []).append(job)
        for group in groups.values():
            size = lanes_at_once(group[0].run.config, len(group))
            for first in range(0, len(group), size):
                part = group[first : first + size]
                for job in part:
                    self._advance(job.until if job.done else job.start)
                if waiting := [job for job in part if not job.done]:
                    self._train(waiting, len(part))

    def _train(self, jobs: Sequence[Job], num_lanes: int) -> None:
        """Train jobs in lock step with the program of `num_lanes`, or a single one."""
        if self._stopping(0):
            raise Preempted("stopped between two runs: call it again to continue")
        names = list(dict.fromkeys(job.variant for job in jobs))
        what = jobs[0].what if len(jobs) == 1 else f"{len(jobs)} runs"
        self._bar.description = ", ".join((*names, what) if len(names) < 3 else (names[0], "...", names[-1], what))
        measured = self.records[names[0]].peak_bytes is None
        with jax.set_mesh(lane_mesh() if num_lanes > 1 else jobs[0].prepared.mesh):
            lanes = [job.prepared.lane(job.run, self._advance, job.until) for job in jobs]
            if num_lanes > 1:
                train_together(lanes, num_lanes, self._stopping, measured=measured)
            else:
                lanes[0].train(self._stopping, measured=measured)
        for job, lane in zip(jobs, lanes, strict=True):
            if lane.failure is not None:
                self._bar.say(f"{job.variant}, {job.what} failed: {lane.failure}", always=True)
                if job.run.config.seed != SEED:
                    failures = self.records[job.variant].failures | {str(job.run.config.seed): lane.failure}
                    self._record(job.variant, failures=failures)
            lines = [line for line in (*job.prepared.lines, *lane.lines) if line not in self._said]
            self._bar.say(*(f"{job.variant}: {line}" for line in dict.fromkeys(lines)), always=True)
            self._said.update(lines)
            if lanes[0].memory is not None and self.records[job.variant].peak_bytes is None:
                self._record(job.variant, state_bytes=lanes[0].memory[0], peak_bytes=lanes[0].memory[1])

    def _advance(self, steps: int = 1) -> None:
        self._done += steps
        self._bar.advance(self._done)

    def _record(self, name: str, **values: Any) -> None:
        """Change a variant's record, and the file."""
        self.records[name] = dataclasses.replace(self.records[name], **values)
        self.write()
