"""The table of a sweep: its numbers against scipy's, what is said where they are not defined, and its forms."""

import dataclasses
import html.parser
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import llama_jax
from llama_jax.ablation import Sweep, VariantRecord
from llama_jax.ablation.records import trial_directory
from llama_jax.config import UserError
from tests.ablation.made import STEPS, curve, write_sweep

BASE = VariantRecord(
    "base", {}, num_parameters=1000, train_flops_per_token=6e3, cache_bytes_per_token=64, peak_bytes=5 << 20
)
OTHER = dataclasses.replace(BASE, name="num_kv_heads=1", changes={"model.attention.num_kv_heads": 1})
OTHER = dataclasses.replace(OTHER, cache_bytes_per_token=32, peak_bytes=None)
THIRD = dataclasses.replace(BASE, name="a|b <i>", changes={"optimizer.learning_rate": 0.02})
VARIANTS = (BASE, OTHER, THIRD)


def losses(place: int, seed: int) -> float:
    """Losses whose seeds have much in common."""
    return 2 + 0.1 * place + math.sin(seed) + 0.02 * math.sin(7 * (seed + 1) * (place + 1))


def sweep_of(folder: Path, variants: Sequence[VariantRecord] = VARIANTS, **options: Any) -> Sweep:
    return llama_jax.open_sweep(write_sweep(folder / "sweep", variants, losses, **options))


def stop(folder: Path, variant: VariantRecord, seed: int, lines: list[dict[str, Any]]) -> None:
    """Give a run of the sweep other metrics."""
    file = trial_directory(folder / "sweep", variant, seed) / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_numbers_are_scipys(tmp_path: Path):
    records = sweep_of(tmp_path, seeds=range(5)).records()
    table = np.array([[losses(place, seed) for seed in range(5)] for place in range(3)])
    tests = [stats.ttest_rel(table[i], table[0]) for i in (1, 2)]
    for record, values in zip(records, table, strict=True):
        interval = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
        np.testing.assert_allclose([record["mean"], record["low"], record["high"]], [values.mean(), *interval])
    for record, test, values in zip(records[1:], tests, table[1:], strict=True):
        assert record["difference"] == pytest.approx((values - table[0]).mean())
        for name, level in (("difference", 0.95), ("simultaneous", 0.975)):
            interval = test.confidence_interval(level)
            np.testing.assert_allclose([record[f"{name}_low"], record[f"{name}_high"]], [interval.low, interval.high])
        assert record["p"] == pytest.approx(test.pvalue)
        assert record["p_holm"] == pytest.approx(max(2 * min(t.pvalue for t in tests), test.pvalue))
    assert (records[0]["difference"], records[0]["p"], records[0]["seeds_needed"]) == (None, None, None)
    assert records[1]["high"] - records[1]["low"] > 10 * (records[1]["difference_high"] - records[1]["difference_low"])


def test_costs_are_those_of_the_run(tmp_path: Path):
    record = sweep_of(tmp_path, [dataclasses.replace(OTHER, train_flops_per_token=6000.0)]).records()[0]
    assert record["train_flops"] == 6000 * STEPS * 8 * 32
    assert record["tokens_per_second"] == 1001
    assert (record["cache_bytes_per_token"], record["num_parameters"], record["peak_bytes"]) == (32, 1000, None)


def test_the_speed_has_its_spread(tmp_path: Path):
    sweep = sweep_of(tmp_path)
    speeds = [1000.0 + step % 3 for step in range(2, STEPS + 1)]
    names = ("tokens_per_second_low", "tokens_per_second", "tokens_per_second_high")
    np.testing.assert_allclose([sweep.records()[0][name] for name in names], np.quantile(speeds, (0.25, 0.5, 0.75)))
    assert "| 1,001 (1,000-1,002) |" in sweep.to_markdown()
    assert "(and quartiles)" in sweep.legend()


def test_seeds_without_both_runs_are_not_compared(tmp_path: Path):
    variants = (BASE, dataclasses.replace(OTHER, failures={"1": "the loss at step 3 is nan"}), THIRD)
    sweep = sweep_of(tmp_path, variants, seeds=(0, 1, 2, 3))
    stop(tmp_path, THIRD, 3, curve(2.0)[:20])
    sweep = llama_jax.open_sweep(sweep.directory)
    failed, killed = sweep.records()[1:]
    assert (failed["n"], failed["failed"], failed["pairs"]) == (3, 1, 3)
    assert failed["difference"] == pytest.approx(np.mean([losses(1, s) - losses(0, s) for s in (0, 2, 3)]))
    assert killed["difference"] == pytest.approx(np.mean([losses(2, s) - losses(0, s) for s in (0, 1, 2)]))
    shown = repr(sweep)
    assert "10 of 12 runs are done" in shown
    assert "num_kv_heads=1, seed 1 has failed: the loss at step 3 is nan" in shown
    assert [trial["state"] for trial in sweep.trials()].count("running") == 1


def test_one_seed_has_no_interval(tmp_path: Path):
    sweep = sweep_of(tmp_path, seeds=(7,))
    record = sweep.records()[1]
    assert record["difference"] == pytest.approx(losses(1, 7) - losses(0, 7))
    unknown = ("low", "high", "difference_low", "simultaneous_high", "p", "p_holm", "seeds_needed")
    assert [record[key] for key in unknown] == [None] * len(unknown)
    assert "one seed: no interval and no test" in repr(sweep)
    assert len(sweep.plot().axes) > 2


@pytest.mark.parametrize("gap", [0.0, 0.25])
def test_no_spread_at_all(tmp_path: Path, gap: float):
    folder = write_sweep(tmp_path / "sweep", VARIANTS[:2], lambda place, seed: 2.0 + gap * place)
    record = llama_jax.open_sweep(folder).records()[1]
    assert (record["difference_low"], record["difference"], record["difference_high"]) == (gap, gap, gap)
    assert (record["p"], record["seeds_needed"]) == (0.0 if gap else 1.0, None)


def test_a_sweep_that_has_only_begun(tmp_path: Path):
    folder = write_sweep(tmp_path / "sweep", VARIANTS, losses)
    for variant in VARIANTS:
        for seed in (0, 1, 2):
            stop(tmp_path, variant, seed, [])
    sweep = llama_jax.open_sweep(folder)
    assert "0 of 9 runs are done" in repr(sweep)
    assert [record["mean"] for record in sweep.records()] == [None] * 3
    assert sweep.plot().axes == []
    stop(tmp_path, BASE, 0, curve(2.0)[:9])
    assert len(llama_jax.open_sweep(folder).plot().axes) == 1


def test_a_missing_baseline_is_said(tmp_path: Path):
    sweep = sweep_of(tmp_path, baseline="gone")
    assert "the baseline 'gone' is not among the variants: nothing is compared" in sweep.notes()
    assert {record["difference"] for record in sweep.records()} == {None}


def test_what_was_adjusted_is_said(tmp_path: Path):
    """Matched widths and tuned values, one or several, with what they cost."""
    matched = {"key": "model.feed_forward.intermediate_size", "value": 51, "quantity": "parameters"}
    cost = {"tokens": 12345, "seconds": 3.21, "trials": []}
    one = {"key": "optimizer.learning_rate", "value": 0.0031622} | cost
    both = {"key": "optimizer.learning_rate,optimizer.weight_decay", "value": [0.01, 0.1]} | cost
    variants = (
        dataclasses.replace(BASE, tuned=one),
        dataclasses.replace(OTHER, tuned=both, matched=matched | {"target": 10000, "got": 9990}),
    )
    notes = sweep_of(tmp_path, variants, seeds=(0, 1)).notes()
    assert notes == [
        "base: optimizer.learning_rate=0.00316 was found with 12,345 tokens and 3.21 s",
        "num_kv_heads=1: model.feed_forward.intermediate_size=51 for parameters 9,990, to match 10,000",
        "num_kv_heads=1: optimizer.learning_rate=0.01, optimizer.weight_decay=0.1 was found with 12,345 tokens and "
        "3.21 s",
    ]


def test_other_metrics_and_levels(tmp_path: Path):
    sweep = sweep_of(tmp_path)
    bits = sweep.by("val_bits_per_byte", level=0.5)
    assert bits.records()[0]["mean"] == pytest.approx(sweep.records()[0]["mean"] / 3)
    assert bits.records()[0]["high"] - bits.records()[0]["low"] < (sweep.records()[0]["high"] - 2) / 3
    assert bits.by(level=0.9).metric == "val_bits_per_byte"
    assert "more is better" in sweep.by("tokens_per_second").legend()
    assert not sweep.higher_is_better
    with pytest.raises(UserError, match="did you mean 'val_loss'"):
        sweep.by("val_los")
    with pytest.raises(UserError, match=r"level=95 must be between 0 and 1"):
        sweep.by(level=95)


def test_losses_of_other_tokenizers_are_compared_by_bits_per_byte(tmp_path: Path):
    folder = write_sweep(tmp_path / "sweep", VARIANTS, losses)
    for place, variant in enumerate(VARIANTS):
        for seed in (0, 1, 2):
            tokenizer = trial_directory(folder, variant, seed) / "tokenizer"
            tokenizer.mkdir()
            (tokenizer / "tokenizer.json").write_text(str(place))
    sweep = llama_jax.open_sweep(folder)
    assert sweep.metric == "val_bits_per_byte"
    assert "losses are per token of different vocabularies" in repr(sweep)
    assert sweep.by("val_loss").metric == "val_loss"


def test_a_saved_sweep_is_the_same(tmp_path: Path):
    sweep = sweep_of(tmp_path)
    checkpoints = trial_directory(sweep.directory, BASE, 0) / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "big").write_text("x")
    saved = sweep.save(tmp_path / "new" / "saved")
    assert repr(llama_jax.open_sweep(saved)) == repr(sweep)
    assert llama_jax.open_sweep(saved).records() == sweep.records()
    assert not list(saved.rglob("big"))
    assert (checkpoints / "big").is_file()
    with pytest.raises(UserError, match="is not empty: give a new directory"):
        sweep.save(saved)
    with pytest.raises(UserError, match="directory=s3://bucket/sweep must be a local"):
        sweep.save("s3://bucket/sweep")


class Cells(html.parser.HTMLParser):
    """Collect the cells of a table."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"div", "table", "thead", "tbody", "tr", "th", "td", "p"}, "hostile names are escaped"
        self.inside = tag in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)


def test_its_forms_have_the_same_cells(tmp_path: Path):
    sweep = sweep_of(tmp_path)
    cells = Cells(sweep._repr_html_()).cells
    titles = ["variant", "val_loss", "difference", "p", "seeds needed", "cache B/token", "tokens/s", "memory"]
    assert cells[: len(titles)] == titles  # what is the same in all is a line below
    assert cells[len(titles) * 3] == "a|b <i>"
    rows = sweep.to_markdown().split("\n\n")[0].split("\n")
    table = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in (rows[0], *rows[2:])]
    assert cells[len(titles) + 1 : len(titles) + 4] == ["2.600 ± 1.265", "baseline", "-"]
    assert [cell.replace("\\|", "|") for row in table for cell in row] == cells
    assert table[3][0] == "a\\|b <i>"
    for cell in cells:
        assert cell in repr(sweep)
    assert "the same in all: parameters 1k, FLOPs 6.14e07, seeds 3" in repr(sweep)
    frame = sweep.to_pandas()
    assert frame.loc["num_kv_heads=1", "model.attention.num_kv_heads"] == 1
    assert frame["mean"].tolist() == [record["mean"] for record in sweep.records()]


def test_a_notebook_shows_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The table as text, which a notebook asks for as well, prints nothing there."""
    sweep = sweep_of(tmp_path)
    expected = repr(sweep)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("was shown twice"))
    assert repr(sweep) == expected


def test_the_figure_has_what_differs(tmp_path: Path):
    figure = sweep_of(tmp_path).plot()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[:4] == ["step", "step", "KV cache (bytes per token)", "throughput (tokens/s)"]
    assert labels[4].startswith("validation loss minus that of")
    assert len(labels) == 5  # of parameters, FLOPs and memory nothing differs, or is not known
    assert all(axes.get_ylabel().endswith("(nats per token)") for axes in figure.axes[2:4])
    picture, _ = figure._repr_png_()  # type: ignore[attr-defined]
    assert picture.startswith(b"\x89PNG")


def test_no_loss_is_drawn_below_zero(tmp_path: Path):
    """The interval of small losses may reach there."""
    folder = write_sweep(tmp_path / "sweep", [BASE, OTHER], lambda place, seed: 0.1 + 0.3 * seed + 0.01 * place)
    sweep = llama_jax.open_sweep(folder)
    assert sweep.records()[0]["low"] < 0
    assert all(axes.get_ylim()[0] >= 0 for axes in sweep.plot().axes[:4])


def test_long_names_stay_distinct_in_a_figure(tmp_path: Path):
    names = ("LayerNorm, pre", "LayerNorm, pre, without warm-up", "LayerNorm, post, without warm-up")
    sweep = sweep_of(tmp_path, [dataclasses.replace(BASE, name=name) for name in names])
    shown = [label.get_text() for label in sweep.plot().axes[-1].get_yticklabels()]
    assert len(set(shown)) == 2
    assert all(len(name) < len(names[1]) for name in shown)
