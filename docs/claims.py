"""Measure popular claims with several seeds and write docs/claims.md: `make claims`, or one part of it by name.

python docs/claims.py [PART ...] [--quick] [--out DIRECTORY]

All of it is meant for about an hour on two cores. What was trained is kept in `.cache/claims`: a run that was stopped
goes on.
"""

import argparse
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from claim_parts import PARTS, Part, base
from markdown_table import markdown
from run_notebooks import machine

import llama_jax
from llama_jax.ablation import Sweep
from llama_jax.ablation.statistics import t_interval
from llama_jax.config import to_json
from llama_jax.nn import KERNELS, LayerNorm, Mask, RMSNorm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import notebook_tools as tools  # noqa: E402

LONGER = 4  # times the training length, to which texts of the claims on positions go
EQUAL = 0.02  # nats: a smaller difference is called none

Interval = tuple[float, float, float]  # mean (of times the median), low, high


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim as data: `quantity(sweep, quick)` has an interval, and the claim says that it is in `region`.

    source: where the claim is made.
    part: name of the sweep.
    what: the quantity in words, with its unit.
    needs: variants that it compares with the baseline.
    """

    statement: str
    source: str
    part: str
    what: str
    quantity: Callable[[Any, bool], Interval]
    region: tuple[float, float]
    needs: tuple[str, ...] = ()


def difference(variant: str, baseline: str | None = None) -> Callable[[Any, bool], Interval]:
    """Return the quantity: the variant's loss minus the baseline's, with the simultaneous interval.

    With another `baseline` than the sweep's, it is the paired t interval.
    """

    def of(sweep: Sweep, quick: bool) -> Interval:
        if baseline is None:
            row = next(record for record in sweep.records() if record["variant"] == variant)
            return row["difference"], row["simultaneous_low"], row["simultaneous_high"]
        finals = [
            np.array([trial[sweep.metric] for trial in sweep.trials() if trial["variant"] == name], float)
            for name in (variant, baseline)
        ]
        return _floats(t_interval(finals[0] - finals[1]))

    return of


def minus(quantity: Callable[[Any, bool], Interval]) -> Callable[[Any, bool], Interval]:
    """Return the quantity with the other sign."""

    def of(sweep: Sweep, quick: bool) -> Interval:
        mean, low, high = quantity(sweep, quick)
        return -mean, -high, -low

    return of


def cache_ratio(variant: str) -> Callable[[Any, bool], Interval]:
    """Return the quantity: the baseline's cache bytes per token over the variant's, an exact count."""

    def of(sweep: Sweep, quick: bool) -> Interval:
        sizes = {record["variant"]: record["cache_bytes_per_token"] for record in sweep.records()}
        ratio = sizes[sweep.record.baseline] / sizes[variant]
        return ratio, ratio, ratio

    return of


def norm_speed(sweep: Sweep, quick: bool) -> Interval:
    """Return LayerNorm's time over RMSNorm's for loss and gradient of a model, called by turns."""
    config = base(PARTS["norms"], quick)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (8, config.sequence_length + 1))
    norms = LayerNorm(eps=1e-5, bias=True), RMSNorm(eps=1e-5)
    calls = [tools.gradient_call(llama_jax.override(config.model, {"norm": norm}), tokens) for norm in norms]
    layer, rms = tools.by_turns(calls, 8 if quick else 200)
    return float(np.median(layer / rms)), *tools.median_interval(layer / rms)


def beyond(variant: str) -> Callable[[Any, bool], Interval]:
    """Return the quantity: the loss at 2 to 4 times the training length, minus that in its second half, by seed."""

    def of(sweep: Sweep, quick: bool) -> Interval:
        runs = [llama_jax.open_run(trial.directory) for trial in sweep.record.trials_of(variant)]
        trained = runs[0].config.sequence_length
        text = "".join(runs[0].dataset.texts("validation"))[:2_000_000]
        tokenizer = runs[0].load().tokenizer
        assert tokenizer is not None
        ids = np.array(tokenizer.encode(text))
        length = trained * LONGER + 1
        rows = ids[: len(ids) // length * length].reshape(-1, length)[: 4 if quick else 512]
        losses = np.array([tools.losses_by_position(run.load().model, rows, 8) for run in runs])
        inside, outside = losses[:, trained // 2 : trained].mean(1), losses[:, 2 * trained :].mean(1)
        return _floats(t_interval(outside - inside))

    return of


def attention_memory(sweep: Any, quick: bool) -> Interval:
    """Return the temporary bytes of the blockwise kernel's gradient over those of one T x T float32 matrix a head."""
    heads, size, length = 4, 64, 8192

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return KERNELS["blockwise"].run(q, k, v, Mask(), scale=size**-0.5).sum()

    queries = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, heads, length, size), jnp.float32)
    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(queries, keys, keys).compile().memory_analysis()
    assert memory is not None
    share = memory.temp_size_in_bytes / (4 * heads * length**2)
    return share, share, share


LOSS = "validation loss minus {}'s (nats per token)"
ABOVE, BELOW, NEAR = (0, math.inf), (-math.inf, 0), (-EQUAL, EQUAL)


def quality(statement: str, source: str, part: str, variant: str, region: tuple[float, float]) -> Claim:
    """Return a claim on a variant's loss, compared with that of its part's baseline."""
    what = LOSS.format(next(iter(PARTS[part].variants)))
    return Claim(statement, source, part, what, difference(variant), region, (variant,))


def swiglu_beats(name: str) -> Claim:
    """Return the claim that SwiGLU, the baseline, has a lower loss than this feed-forward."""
    quantity = minus(difference(name))
    return Claim(f"SwiGLU beats {name}", "Shazeer 2020", "feed_forwards", LOSS.format(name), quantity, BELOW, (name,))


def extrapolates(statement: str, source: str, variant: str) -> Claim:
    """Return the claim that the loss stays as it is beyond the training length."""
    what = f"loss at 2 to {LONGER} times the training length minus that of its second half (nats per token)"
    return Claim(statement, source, "positions", what, beyond(variant), (-math.inf, EQUAL), (variant,))


CLAIMS = (
    quality("MQA costs quality", "Ainslie et al. 2023", "attention", "MQA", ABOVE),
    quality("GQA costs hardly any", "Ainslie et al. 2023", "attention", "GQA", NEAR),
    quality("MLA has equal quality", "DeepSeek-V2, 2024", "attention", "MLA", NEAR),
    Claim(
        "MLA shrinks the cache",
        "DeepSeek-V2, 2024",
        "attention",
        "MHA's cache over MLA's (exact)",
        cache_ratio("MLA"),
        (1, math.inf),
        ("MLA",),
    ),
    quality("DSA has equal quality", "DeepSeek-V3.2, 2025", "attention", "DSA", NEAR),
    Claim(
        "RMSNorm is 40 % faster",
        "often said; 7 % to 64 % in Zhang and Sennrich 2019",
        "norms",
        "LayerNorm's time over RMSNorm's, loss and gradient of the model (median)",
        norm_speed,
        (1.4, math.inf),
    ),
    quality("RMSNorm has equal quality", "Zhang and Sennrich 2019", "norms", "RMSNorm", NEAR),
    Claim(
        "Post-norm needs warm-up",
        "Xiong et al. 2020",
        "norms",
        "validation loss without it minus with it (nats per token)",
        difference("LayerNorm, post, no warm-up", "LayerNorm, post"),
        ABOVE,
        ("LayerNorm, post", "LayerNorm, post, no warm-up"),
    ),
    swiglu_beats("ReLU"),
    swiglu_beats("GELU"),
    swiglu_beats("SiLU"),
    extrapolates("RoPE extrapolates to any length", "often said", "RoPE"),
    extrapolates("ALiBi extrapolates", "Press et al. 2022", "ALiBi"),
    extrapolates("Sinusoids extrapolate", "Vaswani et al. 2017", "sinusoids"),
    extrapolates("Causal models without positions extrapolate", "Kazemnejad et al. 2023", "none"),
    Claim(
        "FlashAttention does not store the N² matrix",
        "Dao et al. 2022",
        "memory",
        "temporary bytes of the gradient over one N x N float32 matrix a head, N = 8,192 (the compiler's figure)",
        attention_memory,
        (0, 1),
    ),
)


def measure(name: str, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Train a part's sweep as far as it is not there, and return a record for each of its claims."""
    part, sweep = PARTS[name], None
    variants = dict(list(part.variants.items())[: 2 if quick else None])  # quick: the baseline and one more
    asked = [claim for claim in CLAIMS if claim.part == name and {*claim.needs} <= {*variants}]
    if variants:
        seeds = 2 if quick else 5
        sweep = llama_jax.ablate(base(part, quick), variants, seeds=seeds, match=part.match, run_dir=folder / name)
    found: list[dict[str, Any]] = []
    for claim in asked:
        mean, low, high = claim.quantity(sweep, quick)
        fields = {"statement": claim.statement, "source": claim.source, "part": name, "quantity": claim.what}
        judgement = tools.judge((low, high), claim.region)
        numbers = {"mean": mean, "low": low, "high": high, "region": [_finite(end) for end in claim.region]}
        found.append(fields | numbers | {"judgement": judgement} | cost(sweep))
    return found


def cost(sweep: Sweep | None) -> dict[str, Any]:
    """Return runs and trained tokens of a sweep."""
    configs = [] if sweep is None else [trial.config for trial in sweep.record.trials]
    tokens = sum(c["num_steps"] * c["global_batch_size"] * c["sequence_length"] for c in configs)
    return {"runs": len(configs), "tokens": tokens}


def page(data: dict[str, Any]) -> str:
    """Return the page of measured claims."""
    rows = [
        [
            claim["statement"],
            claim["source"],
            claim["quantity"],
            f"{claim['mean']:.3g} ({claim['low']:.3g} to {claim['high']:.3g})"
            if claim["low"] < claim["high"]
            else f"{claim['mean']:.3g}",
            region_text(claim["region"]),
            f"**{claim['judgement']}**",
            f"{claim['runs']} runs, {claim['tokens'] / 1e6:.3g}M tokens" if claim["runs"] else "-",
            f"`python docs/claims.py {claim['part']}`",
        ]
        for claim in data["claims"]
    ]
    table = markdown("claim|made in|measured|value (95 % interval)|claimed|judgement|cost of its sweep|command", rows)
    missing = [claim.statement for claim in CLAIMS if claim.statement not in {row[0] for row in rows}]
    notes = [f"Not measured: {'; '.join(missing)}."] if missing else []
    return "\n\n".join(["# Popular claims, measured", data["about"], table, *notes]) + "\n"


def region_text(region: Sequence[float | None]) -> str:
    """Return a region as text; None is no end."""
    low, high = region
    return f"above {low:g}" if high is None else f"below {high:g}" if low is None else f"{low:g} to {high:g}"


def about(quick: bool) -> str:
    """Return the sentences above the table: what was measured, how it is judged, and on which machine."""
    config = base(Part(), quick)
    model = config.model
    size = f"{model.num_layers} layers of width {model.hidden_size} ({llama_jax.num_parameters(model):,} parameters)"
    tokens = config.num_steps * config.global_batch_size * config.sequence_length
    today = datetime.datetime.now(datetime.UTC)
    return (
        f"Models of {size}, trained on {tokens:,} tokens of the interpreter's standard library, {2 if quick else 5} "
        "seeds each with the same data order and the same first values of shared parameters. What holds at this size "
        "may not hold at another.\n\n"
        "A claim puts a quantity into a region. It holds where the whole 95 % interval is in the region, does not hold "
        "where no part of it is, and is not decided at this size otherwise. Intervals of a sweep's differences to its "
        "baseline are simultaneous (Bonferroni), others are t intervals over seeds; exact counts and the compiler's "
        f'figures have none. "Hardly any" and "equal" are within {EQUAL} nats.\n\n'
        f"Measured on {today:%Y-%m-%d} on {machine()}, with Python {sys.version.split()[0]}, JAX {version('jax')} and "
        f"llama_jax {version('llama_jax')}. Again, continued where it was stopped: `make claims`."
    )


def _floats(interval: Any) -> Interval:
    mean, low, high = map(float, interval)
    return mean, low, high


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts and write claims.json and claims.md after each; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="hardly any work; for tests")
    parser.add_argument("--out", type=Path, help="directory of the two files (docs, quick: .cache/claims-quick)")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.parts if name not in PARTS]:
        parser.error(f"PART={unknown[0]} is none of {', '.join(PARTS)}")
    cache = ROOT / ".cache" / ("claims-quick" if asked.quick else "claims")
    out = asked.out or (cache if asked.quick else ROOT / "docs")
    folder = out / "sweeps" if asked.quick else cache
    out.mkdir(parents=True, exist_ok=True)
    file = out / "claims.json"
    known = json.loads(file.read_text("utf-8"))["claims"] if file.is_file() else []
    for name in asked.parts or PARTS:
        known = [claim for claim in known if claim["part"] != name] + measure(name, folder, asked.quick)
        order = [claim.statement for claim in CLAIMS]
        known.sort(key=lambda claim: order.index(claim["statement"]))
        config = to_json(base(Part(), asked.quick))
        del config["data"]["path"]  # this machine's
        data = {"about": about(asked.quick), "config": config, "claims": known}
        file.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
        (out / "claims.md").write_text(page(data), "utf-8")
        print(f"{name}: {sum(claim['part'] == name for claim in known)} claims in {out / 'claims.md'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
