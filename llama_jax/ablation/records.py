"""The files of a sweep: `sweep.json`, and an ordinary run directory for each variant and seed. Read without JAX."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import UserError, read_json
from llama_jax.remote import local_path
from llama_jax.run import METRICS_FILE, read_metrics

SWEEP_FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class VariantRecord:
    """A variant as `sweep.json` describes it.

    name: unique among the variants.
    changes: value of each dotted key that it changes, as JSON.
    matched: `key`, `value`, `quantity`, `target` and `got` of a width that was adjusted; None where none was.
    tuned: `key`, `value`, `trials` of (value, steps, loss), `tokens` and `seconds`; None where nothing was tuned.
    num_parameters: exact number.
    train_flops_per_token: FLOPs of the matrix products of a token's forward and backward pass.
    cache_bytes_per_token: bytes of its KV cache that a token takes; None for a model without a cache.
    state_bytes: the compiler's figure for parameters and optimizer state; None before it is known.
    peak_bytes: the compiler's figure for the train step, arguments and temporary arrays; None before it is known.
    failures: the sentence of each seed's run that has failed, by seed.
    """

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    matched: dict[str, Any] | None = None
    tuned: dict[str, Any] | None = None
    num_parameters: int | None = None
    train_flops_per_token: float | None = None
    cache_bytes_per_token: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def directory(self) -> str:
        """Name of the directory of its runs: the variant's name, made safe for a file system and unique."""
        safe = re.sub(r"[^\w.=,+-]+", "_", self.name, flags=re.ASCII).strip("._")[:80]
        return (
            safe if safe == self.name else f"{safe or 'variant'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "VariantRecord":
        """Return the record of an entry of `sweep.json`; keys that this version does not know are left out."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """A run of a variant with one seed, whether it has begun, ended or failed.

    variant: the variant's name.
    seed: the run's seed.
    directory: the run's directory, which may be missing yet.
    metrics: a dict per logged step.
    failure: sentence that ended it; None where it has not failed.
    """

    variant: str
    seed: int
    directory: Path
    metrics: list[dict[str, Any]]
    failure: str | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The run's config as JSON; empty before the run has begun."""
        file = self.directory / "config.json"
        return read_json(file) if file.is_file() else {}

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def state(self) -> str:
        """One of `done`, `failed`, `running` (or killed) and `waiting`."""
        if self.failure is not None or any(line.get("loss", 0.0) is None for line in self.metrics):
            return "failed"
        if not self.metrics:
            return "waiting"
        return "done" if self.step >= self.config.get("num_steps", 0) else "running"

    def final(self, metric: str) -> float | None:
        """Return the last value of a metric of a run that is done; None where it was not measured."""
        values = [line[metric] for line in self.metrics if isinstance(line.get(metric), int | float)]
        return float(values[-1]) if values and self.state == "done" else None


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """A sweep as its files describe it, whether it has ended or not.

    directory: directory of the sweep.
    metric: name of the metric that variants are compared by.
    baseline: name of the variant that others are compared with.
    seeds: of each variant.
    variants: in their order.
    trials: one for each variant and seed, in the order of variants, then of seeds.
    """

    directory: Path
    metric: str
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[VariantRecord, ...]
    trials: tuple[TrialRecord, ...]

    def trials_of(self, variant: str) -> list[TrialRecord]:
        """Return the runs of a variant, in the order of seeds."""
        return [trial for trial in self.trials if trial.variant == variant]


def trial_directory(run_dir: Path, variant: VariantRecord, seed: int) -> Path:
    """Return the run directory of a variant and a seed in the directory of a sweep."""
    return run_dir / variant.directory / f"seed-{seed}"


def sweep_json(metric: str, baseline: str, seeds: Sequence[int], variants: Sequence[VariantRecord]) -> dict[str, Any]:
    """Return the contents of `sweep.json`."""
    entries = [variant.to_json() for variant in variants]
    return {"metric": metric, "baseline": baseline, "seeds": list(seeds), "variants": entries}


def read_sweep(run_dir: str | Path) -> SweepRecord:
    """Return the sweep in the directory `run_dir`. Raises UserError where there is none."""
    directory = local_path(run_dir, "run_dir")
    directory = directory.parent if directory.name == SWEEP_FILE else directory
    if not (directory / SWEEP_FILE).is_file():
        raise UserError(f"'{run_dir}' is not the directory of a sweep: it has no {SWEEP_FILE}")
    data = read_json(directory / SWEEP_FILE)
    if not isinstance(data, dict) or not {"metric", "baseline", "seeds", "variants"} <= data.keys():
        raise UserError(f"'{directory / SWEEP_FILE}' is not of a sweep: it has no metric, baseline, seeds and variants")
    variants = tuple(map(VariantRecord.from_json, data["variants"]))
    trials: list[TrialRecord] = []
    for variant in variants:
        for seed in data["seeds"]:
            place = trial_directory(directory, variant, seed)
            failure = variant.failures.get(str(seed))
            trials.append(TrialRecord(variant.name, seed, place, read_metrics(place / METRICS_FILE)[0], failure))
    return SweepRecord(directory, data["metric"], data["baseline"], tuple(data["seeds"]), variants, tuple(trials))
