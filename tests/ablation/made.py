"""Sweeps written by hand: `sweep.json`, configs and metrics, without a training step."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.ablation.records import VariantRecord, sweep_json, trial_directory
from llama_jax.config import override, to_json
from tests.tiny_run import get_config

STEPS = 40
Losses = Callable[[int, int], float]  # of (variant's place, seed): the final validation loss


def write_sweep(
    folder: Path,
    variants: Sequence[VariantRecord],
    losses: Losses,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    metric: str = "val_loss",
    baseline: str | None = None,
    **changes: Any,
) -> Path:
    """A sweep whose runs are all done; curves fall to their final losses. `changes` are of all configs."""
    folder.mkdir(parents=True, exist_ok=True)
    data = sweep_json(metric, baseline or variants[0].name, seeds, variants)
    (folder / "sweep.json").write_text(json.dumps(data))
    for place, variant in enumerate(variants):
        for seed in seeds:
            run = trial_directory(folder, variant, seed)
            config = override(get_config(), {"num_steps": STEPS, "seed": seed, **changes, **variant.changes})
            write_run(run, config, curve(losses(place, seed), place))
    return folder


def write_run(run: Path, config: Any, lines: Sequence[dict[str, Any]]) -> None:
    """A run's directory of a config and metrics."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_json(config)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(final: float, place: int = 0) -> list[dict[str, Any]]:
    """Metrics of a run that ends at the validation loss `final`."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = final + 4 * 2 ** (-step / 5) + 0.02 * ((step * 7919) % 11 - 5) / 5
        lines.append({"step": step, "loss": loss, "learning_rate": 0.01, "grad_norm": 1.0})
        if step > 1:
            lines[-1]["tokens_per_second"] = 1000.0 * (place + 1) + step % 3
        if step % 5 == 0:
            lines[-1] |= {"val_loss": final + 4 * 2 ** (-step / 5) - 4 * 2 ** (-STEPS / 5)}
            lines[-1]["val_bits_per_byte"] = lines[-1]["val_loss"] / 3
    return lines
