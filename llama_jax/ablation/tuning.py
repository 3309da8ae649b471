"""Each variant's own hyper-parameters: successive halving (Jamieson and Talwalkar 2016) over log-spaced values.

Of n candidates all run for a short part of the steps, the better half go on to twice as many, and so on; the last two
are compared at the end of all steps. With 8 candidates that is S/8, S/4 and S of S steps: the cost of three runs.
The candidates of several keys are the product of each one's values.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY
from llama_jax.config import UserError, leaves, override, read_json
from llama_jax.files import write_text
from llama_jax.run_config import RunConfig

TUNE_FILE = "tune.json"
SEED = 1_000_003  # of the runs that are compared: of none of the sweep's, whose losses would else be chosen by
CANDIDATES = {1: 8, 2: 4}  # values of each key, by the number of keys; 3 for more keys

type Tune = Mapping[str, tuple[float, float] | list[float]] | None
type Values = tuple[float | int, ...]  # one for each key


def check_tune(config: RunConfig, tune: Any) -> None:
    """Raise UserError for tuning what is no number, and for an impossible range."""
    if tune is None:
        return
    numbers = {key for key, annotation, _ in leaves(config) if annotation in (int, float)}
    if not isinstance(tune, Mapping) or not tune:
        raise UserError(
            f"tune={tune!r} must be {{key: (low, high)}}, such as {{'optimizer.learning_rate': (1e-4, 1e-2)}}"
        )
    for key, values in tune.items():
        if key not in numbers:
            override(config, {key: 1})  # names what is wrong with the key
            raise UserError(f"tune has {key}, which is no number: give a key such as optimizer.learning_rate")
        wide = isinstance(values, tuple) and len(values) == 2 and 0 < values[0] < values[1]
        if not wide and not (isinstance(values, list) and values):
            raise UserError(f"tune has {key}={values!r}: give (low, high) with 0 < low < high, or a list of values")


class Tuning:
    """The search for the values of a variant, in a directory that keeps what is done."""

    def __init__(self, directory: Path, config: RunConfig, tune: Tune):
        self.directory, self.config, self.tune = directory, config, dict(tune or {})
        whole = {key for key, annotation, _ in leaves(config) if annotation is int}
        axes: list[list[float | int]] = []
        for key, given in self.tune.items():
            values = list(given) if isinstance(given, list) else _spaced(*given, CANDIDATES.get(len(self.tune), 3))
            axes.append(list(dict.fromkeys(round(value) if key in whole else float(value) for value in values)))
        self.candidates: list[Values] = list(itertools.product(*axes)) if axes else []
        rungs = max(math.ceil(math.log2(max(len(self.candidates), 1))), 1)
        steps = config.num_steps
        self.rungs = [*(max(steps >> (rungs - i), 1) for i in range(rungs - 1)), steps]

    @property
    def total_steps(self) -> int:
        """Steps of all runs together."""
        total, left, before = 0, len(self.candidates), 0
        for until in self.rungs:
            total, left, before = total + left * (until - before), -(-left // 2), until
        return total

    def changes(self, value: Any) -> dict[str, Any]:
        """Return the changes of a candidate as `search` returns it: one value, or a list for several keys."""
        return dict(zip(self.tune, value if len(self.tune) > 1 else [value], strict=True))

    def search(self, trials: Callable[[Mapping[Path, Mapping[str, Any]], int], list[float | None]]) -> dict[str, Any]:
        """Return the record of the search, its `value` None where all candidates fail.

        `trials({directory: changes}, until)` trains to the step `until` and returns the losses, None of failures.
        """
        file = self.directory / TUNE_FILE
        done: dict[str, Any] = read_json(file) if file.is_file() else {"trials": [], "seconds": 0.0}
        known = {(json.dumps(value), steps): loss for value, steps, loss in done["trials"]}
        alive, losses = self.candidates, dict[Values, float]()
        for until in self.rungs:
            asked = [values for values in alive if (json.dumps(_shown(values)), until) not in known]
            if asked:
                began = time.monotonic()
                self.directory.mkdir(parents=True, exist_ok=True)
                places = [self.directory / ",".join(f"{value:.6g}" for value in values) for values in asked]
                changes = [dict(zip(self.tune, values, strict=True)) for values in asked]
                for values, loss in zip(asked, trials(dict(zip(places, changes, strict=True)), until), strict=True):
                    known[json.dumps(_shown(values)), until] = loss
                    done["trials"].append([_shown(values), until, loss])
                done["seconds"] += time.monotonic() - began
                write_text(file, json.dumps(done) + "\n")
            found = {values: known[json.dumps(_shown(values)), until] for values in alive}
            losses = {values: math.inf if loss is None else loss for values, loss in found.items()}
            alive = sorted(alive, key=lambda values: losses[values])[: -(-len(alive) // 2)]
        best = alive[0]
        for folder in self.directory.glob(f"*/{CHECKPOINTS_DIRECTORY}"):  # their metrics stay
            shutil.rmtree(folder)
        value = None if math.isinf(losses[best]) else _shown(best)
        steps = {json.dumps(shown): until for shown, until, _ in done["trials"]}  # the last of each
        tokens = sum(steps.values()) * self.config.global_batch_size * self.config.row_length
        return {"key": ",".join(self.tune), "value": value, "tokens": tokens, **done}

    def warning(self, found: Mapping[str, Any]) -> str | None:
        """Return a sentence where the best value is at an end of its range."""
        for key, value in self.changes(found["value"]).items():
            given = self.tune[key]
            if isinstance(given, tuple) and any(math.isclose(value, end, rel_tol=1e-9) for end in given):
                return f"the best {key}={value:.3g} is at an end of its range {given}: a wider one may have a better"
        return None


def _shown(values: Values) -> Any:
    """Return the value of a single key, or a list of several."""
    first, *more = values
    return [first, *more] if more else first


def _spaced(low: float, high: float, count: int) -> list[float]:
    """Return values from `low` to `high`, each the same factor above the one before, to four digits."""
    return [float(f"{low * (high / low) ** (i / (count - 1)):.4g}") for i in range(count)]
