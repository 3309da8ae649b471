"""`Sweep`: the result of an ablation, read from its directory, as a table, records and a plot."""

import functools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.ablation.records import SweepRecord, TrialRecord, VariantRecord, read_sweep
from llama_jax.ablation.statistics import POWER, holm, paired_p, seeds_needed, simultaneous, t_interval
from llama_jax.ablation.tables import as_markdown, as_text, columns_of
from llama_jax.config import UserError
from llama_jax.figures import as_html
from llama_jax.files import replacing
from llama_jax.remote import local_path
from llama_jax.run import HIGHER, choose_metric, compare_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

NOT_SAVED = ("checkpoints", ".*", "*.lock")


def open_sweep(run_dir: str | Path, *, metric: str | None = None, level: float = 0.95) -> "Sweep":
    """Return the sweep in a directory that `ablate` or `Sweep.save` wrote, also one that goes on or was killed.

    `metric` is what variants are compared by, by default `val_loss`, and `val_bits_per_byte` where their tokenizers
    differ; `level` is that of all intervals and tests. Raises UserError where there is no sweep or no such metric.
    """
    return Sweep(run_dir, metric=metric, level=level)


class Sweep:
    """The runs of an ablation: variants, each with several seeds, compared with a baseline.

    A notebook shows it as a table. Its numbers are those that the files had when it was made: measured (the metric and
    tokens/s), exact counts (parameters, FLOPs, cache bytes) or the compiler's figure (peak memory).
    """

    def __init__(self, run_dir: str | Path, *, metric: str | None = None, level: float = 0.95):
        if not 0 < level < 1:
            raise UserError(f"level={level} must be between 0 and 1, such as 0.95")
        self.record: SweepRecord = read_sweep(run_dir)
        self.directory, self.level = self.record.directory, level
        begun = [trial.directory for trial in self.record.trials if trial.config]
        asked = metric or (None if self.record.metric == "val_loss" else self.record.metric)
        self._runs = dict(zip(begun, compare_runs(begun) if begun else [], strict=True))
        if any(trial.metrics for trial in self.record.trials):
            self.metric, self.warnings = choose_metric(list(self._runs.values()), asked)
        else:
            self.metric, self.warnings = asked or self.record.metric, []

    def by(self, metric: str | None = None, *, level: float | None = None) -> "Sweep":
        """Return the sweep compared by another metric, or at another level: `sweep.by("val_bits_per_byte")`."""
        return Sweep(self.directory, metric=metric or self.metric, level=self.level if level is None else level)

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better, as of an accuracy."""
        return self.metric.endswith(HIGHER)

    def trials(self) -> list[dict[str, Any]]:
        """Return a dict per run: variant, seed, state (done, failed, running, waiting), step, the final metric."""
        return [
            {
                "variant": trial.variant,
                "seed": trial.seed,
                "state": trial.state,
                "step": trial.step,
                self.metric: trial.final(self.metric),
                "tokens_per_second": _speed([trial])["tokens_per_second"],
                "failure": trial.failure,
                "directory": str(trial.directory),
            }
            for trial in self.record.trials
        ]

    def records(self) -> list[dict[str, Any]]:
        """Return a dict per variant; None is not measured, or not defined for so few seeds.

        n, failed: runs that are done, and that have failed.
        mean, low, high: of the final metric, with the t interval over seeds.
        difference, difference_low, difference_high: mean of variant minus baseline of the same seed, with its interval;
          pairs is the number of seeds that both have.
        simultaneous_low, simultaneous_high: the wider interval of the difference; those of all variants together cover
          at the level (Bonferroni).
        p, p_holm: of the paired t test, and corrected for the number of comparisons (Holm).
        seeds_needed: for a power of 0.8 in the corrected comparison, were the measured difference and spread the true
          ones; a rough figure with few seeds.
        num_parameters, train_flops_per_token, cache_bytes_per_token: exact; train_flops is of the whole run.
        tokens_per_second, tokens_per_second_low, tokens_per_second_high: median and quartiles of all logged steps,
          padding included; runs in lock step share one clock, so that more seeds do not make them surer.
        state_bytes, peak_bytes: the compiler's.
        """
        return [dict(record) for record in self._records]

    @functools.cached_property
    def _records(self) -> list[dict[str, Any]]:
        finals = {variant.name: self._finals(variant.name) for variant in self.record.variants}
        base = finals.get(self.record.baseline, {})
        differences: list[np.ndarray] = []
        for name, values in finals.items():
            pairs = (
                [] if name == self.record.baseline else [values[seed] - base[seed] for seed in values if seed in base]
            )
            differences.append(np.array(pairs, dtype=float))
        p = np.array([float(paired_p(pairs)) if len(pairs) > 1 else math.nan for pairs in differences])
        corrected, comparisons = holm(p), int(np.sum(~np.isnan(p)))
        return [
            _plain(
                self._of_variant(variant, np.array(list(finals[variant.name].values())))
                | _of_difference(pairs, self.level, comparisons)
                | {"p": one, "p_holm": both}
                | self._costs(variant)
            )
            for variant, pairs, one, both in zip(self.record.variants, differences, p, corrected, strict=True)
        ]

    def _finals(self, variant: str) -> dict[int, float]:
        finals = {trial.seed: trial.final(self.metric) for trial in self.record.trials_of(variant)}
        return {seed: value for seed, value in finals.items() if value is not None}

    def _of_variant(self, variant: VariantRecord, values: np.ndarray) -> dict[str, Any]:
        states = [trial.state for trial in self.record.trials_of(variant.name)]
        interval = t_interval(values, self.level) if len(values) else (None, None, None)
        found = {
            "variant": variant.name,
            "changes": variant.changes,
            "matched": variant.matched,
            "tuned": variant.tuned,
        }
        counts = {"n": len(values), "failed": states.count("failed"), "runs": len(states)}
        return found | counts | dict(zip(("mean", "low", "high"), interval, strict=True))

    def _costs(self, variant: VariantRecord) -> dict[str, Any]:
        trials = self.record.trials_of(variant.name)
        run = next((self._runs[trial.directory] for trial in trials if trial.config), None)
        flops = variant.train_flops_per_token
        return {
            "num_parameters": variant.num_parameters,
            "train_flops_per_token": flops,
            "train_flops": flops * run.tokens([run.config["num_steps"]])[0] if flops and run else None,
            "cache_bytes_per_token": variant.cache_bytes_per_token,
            "state_bytes": variant.state_bytes,
            "peak_bytes": variant.peak_bytes,
        } | _speed(trials)

    def notes(self) -> list[str]:
        """Return sentences on what has to be known to read the table."""
        record, records = self.record, self._records
        states = [trial.state for trial in record.trials]
        notes = [f"{states.count('done')} of {len(states)} runs are done"] * (set(states) != {"done"})
        notes += [f"{t.variant}, seed {t.seed} has failed: {t.failure}" for t in record.trials if t.failure]
        if record.baseline not in {variant.name for variant in record.variants}:
            notes.append(f"the baseline '{record.baseline}' is not among the variants: nothing is compared")
        if records and max(entry["n"] for entry in records) == 1:
            notes.append("one seed: no interval and no test")
        most = max((entry["pairs"] for entry in records), default=0)
        notes += [
            f"{entry['variant']}: compared on the {entry['pairs']} of {most} seeds that both have"
            for entry in records
            if 0 < entry["pairs"] < most
        ]
        for variant in record.variants:
            if found := variant.matched:
                what = f"{found['quantity']} {found['got']:,.12g}, to match {found['target']:,.12g}"
                notes.append(f"{variant.name}: {found['key']}={found['value']} for {what}")
            if found := variant.tuned:
                values = found["value"] if isinstance(found["value"], list) else [found["value"]]
                what = ", ".join(f"{k}={v:.3g}" for k, v in zip(found["key"].split(","), values, strict=True))
                cost = f"{found['tokens']:,} tokens and {found['seconds']:.3g} s"
                notes.append(f"{variant.name}: {what} was found with {cost}")
        return notes + self.warnings

    def legend(self) -> str:
        """Return what the table's columns mean."""
        better, percent = "more" if self.higher_is_better else "less", f"{100 * self.level:g} %"
        return (
            f"{self.metric}: mean at the last step ± {percent} t interval over seeds, {better} is better; "
            f"difference: to {self.record.baseline}, paired by seed, ± {percent} simultaneous interval (Bonferroni); "
            f"p: paired t test, corrected (Holm); seeds needed: for power {POWER}, were the measured difference and "
            "spread the true ones; memory: the compiler's figure for the train step; "
            "tokens/s: median (and quartiles) of the logged steps, measured"
        )

    def to_pandas(self) -> "DataFrame":
        """Return a data frame with a row per variant; the changed keys are columns, too."""
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None

        nested = ("changes", "matched", "tuned")
        rows = [
            {key: value for key, value in row.items() if key not in nested} | row["changes"] for row in self._records
        ]
        return pd.DataFrame(rows).set_index("variant")

    def to_markdown(self) -> str:
        """Return the table and its notes as Markdown."""
        return as_markdown(*self._table())

    def to_html(self) -> str:
        """Return the table and its notes as HTML, in the colours of the page around."""
        return as_html(*self._table())

    def __repr__(self) -> str:
        return as_text(*self._table())

    def _repr_html_(self) -> str:
        return self.to_html()

    def _table(self) -> tuple[dict[str, list[str]], list[str]]:
        columns, same = columns_of(self._records, self.metric, self.record.baseline)
        return columns, [*same, self.legend(), *(f"note: {note}" for note in self.notes())]

    def plot(self) -> "Figure":
        """Return a figure: curves with bands, the final metric against each cost that differs, and the differences.

        Bands and bars are t intervals over seeds; of the differences the wide ones are simultaneous.
        """
        from llama_jax.ablation.plotting import plot_sweep

        return plot_sweep(self)

    def save(self, directory: str | Path) -> Path:
        """Copy the sweep without its checkpoints, so that `open_sweep` reads it there, and return the directory.

        Its runs can be compared and reported, and not be loaded. Raises UserError where something is there already.
        """
        place = local_path(directory, "directory")
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise UserError(f"'{directory}' is not empty: give a new directory")
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as partial:
            shutil.copytree(self.directory, partial, ignore=shutil.ignore_patterns(*NOT_SAVED))
        return place


def _of_difference(pairs: np.ndarray, level: float, comparisons: int) -> dict[str, Any]:
    """Return the mean of differences [S], its intervals, and the seeds that would be needed to see it."""
    found: dict[str, Any] = {"pairs": len(pairs), "difference": None, "seeds_needed": None}
    if not len(pairs):
        return found
    together = simultaneous(level, comparisons)
    found["difference"], found["difference_low"], found["difference_high"] = t_interval(pairs, level)
    _, found["simultaneous_low"], found["simultaneous_high"] = t_interval(pairs, together)
    spread = pairs.std(ddof=1) if len(pairs) > 1 else 0
    if spread > 0:
        found["seeds_needed"] = seeds_needed(float(pairs.mean() / spread), 1 - together)
    return found


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with Python's numbers, and None for NaN."""
    plain = {
        key: value.item() if isinstance(value, np.generic | np.ndarray) else value for key, value in record.items()
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}


def _speed(trials: Sequence[TrialRecord]) -> dict[str, float | None]:
    """Return the median and the quartiles of the logged tokens/s of runs; None where no step was timed."""
    speeds = [line["tokens_per_second"] for t in trials for line in t.metrics if line.get("tokens_per_second")]
    found = np.percentile(speeds, (50, 25, 75)).tolist() if speeds else (None, None, None)
    return dict(zip(("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"), found, strict=True))
