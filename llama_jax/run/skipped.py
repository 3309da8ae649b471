"""Steps that are skipped because their loss or gradient is not finite: their count, and the limit that ends a run."""

import math
from collections.abc import Callable
from typing import Any

from llama_jax.run.programs import RunFailed
from llama_jax.run_config import RunConfig


class SkippedSteps:
    """Counts of the steps without an update: those `in_a_row`, and those `since_line`.

    `number` gives the number of the batch that a step takes. `saved` is the step of the latest checkpoint that this
    start of the run has saved.
    """

    def __init__(self, config: RunConfig, number: Callable[[int], int]):
        self._config, self._number = config, number
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
        """Raise RunFailed where too many steps in a row were skipped, or all but the first of a short run."""
        if self.in_a_row < min(self._config.checks.max_skipped_steps, max(self._config.num_steps - 1, 1)):
            return
        step, good = metrics["step"], metrics["step"] - self.in_a_row
        name, what = ("grad_norm", "norm of the gradient") if math.isfinite(metrics["loss"]) else ("loss", "loss")
        # Those from the latest checkpoint on: of the ones before it, none can be left out any more.
        batches = ",".join(str(self._number(past)) for past in range(max(good, self.saved), step))
        raise RunFailed(
            f"the {what} at step {step} is {float(metrics[name])}, the last update was that of step {good}: lower "
            f"optimizer.learning_rate, raise optimizer.warmup_steps or add {batches} to data.skip_batches, and "
            "continue from the latest checkpoint with --resume.allow and the key"
        )
