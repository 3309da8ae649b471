"""Steps that are skipped because their loss or gradient is not finite, and losses that jump: what ends a run."""

import collections
import math
import shlex
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from llama_jax.checkpoint import CheckpointStore, not_finite
from llama_jax.run.directory import Run
from llama_jax.run.programs import RunFailed
from llama_jax.training import TrainState

WINDOW, LEAST = 128, 32  # losses that a new one is compared with: at most, and at least


class BadBatches(RunFailed):
    """Bad numbers: `what` was found at a step, and the numbers of the `batches` that may be the reason, ascending."""

    def __init__(self, what: str, advice: str, batches: Iterable[int]):
        super().__init__(f"{what}: {advice}")
        self.what, self.batches = what, sorted(batches)


class SkippedSteps:
    """Counts of the steps without an update: those `in_a_row`, and those `since_line`.

    `number` gives the number of the batch that a step takes. `saved` is the step of the latest checkpoint that this
    start of the run has saved.
    """

    def __init__(self, run: Run, number: Callable[[int], int]):
        self._run, self._config, self._number = run, run.config, number
        self._losses = collections.deque[float](maxlen=WINDOW)
        self.in_a_row, self.since_line, self.saved = 0, 0, 0

    def count(self, metrics: dict[str, Any]) -> str | None:
        """Return the line for the log where the step of these metrics was skipped, and count it."""
        loss, norm = (float(metrics[name]) for name in ("loss", "grad_norm"))
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return None
        self.in_a_row, self.since_line = self.in_a_row + 1, self.since_line + 1
        step = metrics["step"]
        return (
            f"step {step}/{self._config.num_steps} is skipped, nothing is updated: batch {self._number(step - 1)} has "
            f"loss {loss:.4g} and a gradient of norm {norm:.4g}"
        )

    def check(self, metrics: dict[str, Any]) -> None:
        """Raise BadBatches where too many steps in a row were skipped, or all but the first of a short run, and for a
        spike of the loss.
        """
        if not self.in_a_row:
            self._check_spike(metrics["step"], float(metrics["loss"]))
        if self.in_a_row < min(self._config.checks.max_skipped_steps, max(self._config.num_steps - 1, 1)):
            return
        step, good = metrics["step"], metrics["step"] - self.in_a_row
        name, what = ("grad_norm", "norm of the gradient") if math.isfinite(metrics["loss"]) else ("loss", "loss")
        # Those from the latest checkpoint on: of the ones before it, none can be left out any more.
        batches = [self._number(past) for past in range(max(good, self.saved), step)]
        raise BadBatches(
            f"the {what} at step {step} is {float(metrics[name])}, the last update was that of step {good}",
            "lower optimizer.learning_rate, raise optimizer.warmup_steps or add "
            f"{','.join(map(str, batches))} to data.skip_batches, and continue from the latest checkpoint with "
            "--resume.allow and the key",
            batches,
        )

    def _check_spike(self, step: int, loss: float) -> None:
        """Raise BadBatches for a loss far above the median of those before, in their median absolute deviations."""
        limit, before = self._config.checks.spike_zscore, [*self._losses]
        self._losses.append(loss)
        if limit is None or len(before) < LEAST:
            return
        median = statistics.median(before)
        # 1.4826 of them are a standard deviation of normal numbers.
        zscore = (loss - median) / max(1.4826 * statistics.median(abs(value - median) for value in before), 1e-6)
        if zscore > limit:
            # This batch, or the update by the one before it.
            batches = {self._number(past) for past in range(max(step - 2, self.saved), step)}
            skipped = ",".join(map(str, sorted({*self._config.data.skip_batches, *batches})))
            command = f"python -m llama_jax train {shlex.quote(str(self._run.directory))} --data.skip-batches {skipped}"
            raise BadBatches(
                f"the loss at step {step} is {loss:.4f}, {zscore:.0f} deviations above the median {median:.4f} of the "
                "others before",
                "go back to the latest checkpoint and leave batches out with "
                f"`{command} --resume.allow data.skip_batches`",
                batches,
            )


def check_finite(state: TrainState, step: int, store: CheckpointStore) -> None:
    """Raise RunFailed for a state with a number that is not finite: it is not saved."""
    if (name := not_finite(state)) is not None:
        store.check(wait=True)
        good = max(store.steps(), default=None)
        raise RunFailed(
            f"the checkpoint of step {step} is not saved, because '{name}' is not finite: lower "
            "optimizer.learning_rate and continue with --resume.allow optimizer.learning_rate from "
            + ("the beginning" if good is None else f"the last good step, {good}")
        )
