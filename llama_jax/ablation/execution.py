"""The runs of a sweep: prepared once, trained one after another, each recorded as it ends."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.ablation.records import SWEEP_FILE, VariantRecord, sweep_json, trial_directory
from llama_jax.ablation.tuning import SEED, Tune, Tuning
from llama_jax.ablation.variants import Variant, code_digest
from llama_jax.config import UserError, override
from llama_jax.files import write_text
from llama_jax.run import Closing, Lane, Preempted, Prepared, Run, RunFailed, prepare_runs, termination
from llama_jax.screen import Bar

METRIC = "val_loss"


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

    def prepare(self, made: Sequence[Variant]) -> None:
        """Prepare and check all variants, each distinct tokenizer and corpus once; then write the sweep's files.

        Raises UserError for the first variant that cannot run.
        """
        shared: dict[Any, tuple[Path, Prepared]] = {}
        for variant in made:
            config = variant.config
            texts = config.tokenizer, config.data, config.model.has_source
            own = self.place if not shared else self.place / self.records[variant.name].directory
            place, other = shared.get(texts, (own, None))
            try:
                found = prepare_runs(
                    config, place, variant.components, tokenizer=other and other.tokenizer, quiet=self.quiet
                )
                if other is not None and other.config.sequence_length == config.sequence_length:
                    found = dataclasses.replace(found, datasets=other.datasets)
                found.check(self.seeds[0])
            except (UserError, RunFailed) as error:
                raise UserError(f"variant '{variant.name}': {error}") from error
            shared.setdefault(texts, (place, found))
            self._prepared[variant.name] = found
        self.place.mkdir(parents=True, exist_ok=True)
        codes = self._asked.get("code", {}) | {v.name: code_digest(v.components) for v in made}
        self._asked["code"] = codes
        self.write()
        for place, found in shared.values():
            found.save(place)

    def write(self) -> None:
        """Write sweep.json."""
        data = sweep_json(METRIC, self.baseline, self.seeds, list(self.records.values())) | {"arguments": self._asked}
        write_text(self.place / SWEEP_FILE, json.dumps(data, indent=2) + "\n")

    def train(self, made: Sequence[Variant], tune: Tune) -> None:
        """Tune each variant where `tune` has keys, then train it with every seed, as far as this is not done.

        Raises Preempted after a termination signal, with a checkpoint saved.
        """
        tunings = {v.name: Tuning(self.place / "tune" / self.records[v.name].directory, v.config, tune) for v in made}
        untuned = [v.name for v in made if tune and self.records[v.name].tuned is None]
        total = sum(len(self.seeds) * v.config.num_steps for v in made) + sum(tunings[n].total_steps for n in untuned)
        with (
            Bar("sweep", 0, total, quiet=self.quiet, slow=True) as bar,
            termination() as stopping,
            Closing() as closing,
        ):
            self._bar, self._stopping, self._closing, self._done = bar, stopping, closing, 0
            said: set[str] = set()
            for variant in made:
                prepared = self._prepared[variant.name]
                if variant.name in untuned:
                    self._tune(variant, tunings[variant.name])
                tuned = self.records[variant.name].tuned
                if tuned is not None:
                    config = override(
                        prepared.config, tunings[variant.name].changes(tuned["value"]), variant.components
                    )
                    prepared = dataclasses.replace(prepared, config=config)
                for seed in self.seeds:
                    self._trial(variant.name, prepared, seed, said)

    def _tune(self, variant: Variant, tuning: Tuning) -> None:
        """Find the variant's values and record them with their cost."""
        prepared, before = self._prepared[variant.name], self._done

        def trial(changes: Mapping[str, Any], directory: Path, until: int) -> float | None:
            """Return the validation loss at the step `until` of a run with these changes."""
            config = override(prepared.config, changes, variant.components)
            run = dataclasses.replace(prepared, config=config).run(directory, SEED)
            text = ", ".join(f"{key.rpartition('.')[2]}={value:.3g}" for key, value in changes.items())
            try:
                lane = self._run(f"{variant.name}, {text}", prepared, run, until)
            except RunFailed:
                return None
            return lane.val_loss

        found = tuning.search(trial)
        if found["value"] is None:
            raise UserError(f"variant '{variant.name}': every run of tune fails: give other ranges than {tuning.tune}")
        if warning := tuning.warning(found):
            self._bar.say(f"{variant.name}: {warning}", always=True)
        self._record(variant.name, tuned=found)
        self._done = before + tuning.total_steps

    def _trial(self, name: str, prepared: Prepared, seed: int, said: set[str]) -> None:
        """Train a variant with a seed, where this is not done."""
        record = self.records[name]
        run = prepared.run(trial_directory(self.place, record, seed), seed)
        steps = run.config.num_steps
        before = self._done
        if str(seed) not in record.failures and max(run.committed_steps(), default=0) < steps:
            try:
                lane = self._run(f"{name}, seed {seed}", prepared, run, measured=record.peak_bytes is None)
            except RunFailed as error:
                failures = record.failures | {str(seed): str(error)}
                self._record(name, failures=failures)
                self._bar.say(f"{name}, seed {seed} failed: {error}", always=True)
            else:
                lines = [line for line in (*prepared.lines, *lane.lines) if f"{name}: {line}" not in said]
                said |= {f"{name}: {line}" for line in lines}
                self._bar.say(*(f"{name}: {line}" for line in lines), always=True)
                if lane.memory is not None:
                    self._record(name, state_bytes=lane.memory[0], peak_bytes=lane.memory[1])
        self._done = before + steps

    def _run(self, text: str, prepared: Prepared, run: Run, until: int | None = None, measured: bool = False) -> Lane:
        """Train a run that the bar calls `text`."""
        self._bar.description = text
        before, start = self._done, max(run.committed_steps(), default=0)

        def advance(step: int) -> None:
            self._bar.advance(before + step)

        if self._stopping(0):
            raise Preempted("stopped between two runs: call it again to continue")
        with jax.set_mesh(prepared.mesh):
            lane = Lane(run, prepared.dataset(run), advance, until)
            lane.train(self._closing, self._stopping, measured=measured)
        self._done = before + lane.until - start
        return lane

    def _record(self, name: str, **values: Any) -> None:
        """Change a variant's record, and the file."""
        self.records[name] = dataclasses.replace(self.records[name], **values)
        self.write()
