"""`ablate`: variants of a run with several seeds each, all on disk, so that a sweep that was stopped goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.ablation.execution import Sweeper
from llama_jax.ablation.matching import QUANTITIES, Match, asked_match, matched
from llama_jax.ablation.records import SWEEP_FILE, VariantRecord, read_sweep
from llama_jax.ablation.result import Sweep
from llama_jax.ablation.tuning import Tune, check_tune
from llama_jax.ablation.variants import Variant, Variants, code_digest, config_of_base, make_variants
from llama_jax.config import UserError, read_json, to_json
from llama_jax.models import num_parameters
from llama_jax.parallel import distributed
from llama_jax.remote import local_path
from llama_jax.run import CHANGEABLE
from llama_jax.run_config import RunConfig

Json = dict[str, Any]


def ablate(
    base: RunConfig | str,
    variants: Variants,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    baseline: str | None = None,
    match: Match = None,
    tune: Tune = None,
    run_dir: str | Path | None = None,
    components: Sequence[type] = (),
    quiet: bool = False,
) -> Sweep:
    """Train `variants` of `base` with several seeds each, or continue with what is in `run_dir`; return the results.

    `base` is a config, or the name or path of one; `steps` replaces its `num_steps`. `variants` are a grid
    (`{"model.attention.num_kv_heads": [1, 2, 4]}`), named changes (`{"MQA": {"model.attention.num_kv_heads": 1}}`), or
    a list of changes, of (name, changes), of pieces or of configs; values may be classes, also of a notebook's cell.
    `seeds` are numbers, or how many from 0 on. All variants of a seed have one order of the data and the same first
    values of parameters that they share. `baseline` is the name of the variant that others are compared with: by
    default the one that equals the base, else the first.

    `match`: "parameters", "flops" or "cache_bytes", or a pair of it and a key: a width of every variant is adjusted
    until this quantity is the baseline's within 1 %. `tune`: `{"optimizer.learning_rate": (low, high)}` finds each
    variant's best value first, by successive halving with a seed of no other run (`llama_jax.ablation.tuning`).

    `run_dir` has all of it as it comes; None is a directory under `runs/` for these arguments, so that the same call
    continues where it was stopped. More seeds and more variants are added to those that are there. A run that fails
    does not end the sweep. Raises UserError for wrong arguments, and where `run_dir` has a sweep with others.
    """
    if distributed.several():
        raise UserError("ablate works in one process: start it without others")
    config = config_of_base(base, steps)
    made = make_variants(config, variants, components)
    numbers = _numbers(seeds)
    of_match = asked_match(match)
    check_tune(config, tune)
    chosen = _baseline(config, made, baseline)
    asked: Json = {"base": to_json(config), "match": match and list(of_match or ()), "tune": tune and _plain(tune)}
    place = _default(asked, made) if run_dir is None else local_path(run_dir, "run_dir")
    before = _before(place, asked, made, baseline)
    if of_match is not None:
        made, fitted = _match(made, chosen, *of_match)
    else:
        fitted = [None] * len(made)
    records = [_record(v, fit, before) for v, fit in zip(made, fitted, strict=True)]
    given = {record.name for record in records}
    records += [record for name, record in before.records.items() if name not in given]
    all_seeds = list(dict.fromkeys([*before.seeds, *numbers]))
    asked["code"] = before.codes | {variant.name: code_digest(variant.components) for variant in made}
    sweeper = Sweeper(place, asked, before.baseline or chosen.name, all_seeds, records, quiet)
    if any(sweeper.unfinished(variant) for variant in made):
        sweeper.prepare(config, made)
        sweeper.train(made, tune)
    else:
        sweeper.write()
    return Sweep(place)


@dataclasses.dataclass(frozen=True)
class _Before:
    """What an earlier call left in the directory: its records and digests of code by variant, seeds and baseline."""

    records: dict[str, VariantRecord] = dataclasses.field(default_factory=dict[str, VariantRecord])
    codes: Json = dataclasses.field(default_factory=dict[str, Any])
    seeds: tuple[int, ...] = ()
    baseline: str | None = None


def _numbers(seeds: Any) -> list[int]:
    """Return the seeds. Raises UserError where there are none, or where one comes twice."""
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise UserError(f"seeds={seeds!r} must be at least 1, or different whole numbers from 0 on")
    return numbers


def _baseline(base: RunConfig, made: Sequence[Variant], asked: str | None) -> Variant:
    """Return the variant that others are compared with."""
    if asked is not None:
        found = next((variant for variant in made if variant.name == asked), None)
        if found is None:
            raise UserError(f"baseline='{asked}' is none of the variants: {', '.join(v.name for v in made)}")
        return found
    return next((variant for variant in made if variant.config == base), made[0])


def _plain(value: Any) -> Any:
    """Return an argument as JSON data."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _default(asked: Json, made: Sequence[Variant]) -> Path:
    """Return the directory of a sweep whose `run_dir` was not given: all but its seeds decides its name."""
    text = json.dumps([asked, [[v.name, to_json(v.config), code_digest(v.components)] for v in made]], sort_keys=True)
    return Path("runs") / f"ablation-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _before(place: Path, asked: Json, made: Sequence[Variant], baseline: str | None) -> _Before:
    """Return what is in the directory of a sweep. Raises UserError where it has another sweep, or other files."""
    if not (place / SWEEP_FILE).is_file():
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"'{place}' is not empty and has no {SWEEP_FILE}: give another run_dir")
        return _Before()
    record, data = read_sweep(place), read_json(place / SWEEP_FILE)
    there: Json = data.get("arguments", {})
    old, new = _leaves(there.get("base")), _leaves(asked["base"])
    free = CHANGEABLE[1:]  # how a run is computed and reported; not num_steps, where a decay ends
    differing = [
        f"{k}={old.get(k)!r}, not {new.get(k)!r}"
        for k in {**old, **new}
        if old.get(k) != new.get(k) and not k.startswith(free)
    ]
    pairs = [(name, there.get(name), asked[name]) for name in ("match", "tune")]
    pairs += [] if baseline is None else [("baseline", record.baseline, baseline)]
    known, codes = {variant.name: variant for variant in record.variants}, there.get("code", {})
    for variant in made:
        if variant.name in known:
            pairs.append((f"variant '{variant.name}'", known[variant.name].changes, variant.changes))
            pairs.append(
                (f"the code of variant '{variant.name}'", codes.get(variant.name), code_digest(variant.components))
            )
    differing += [
        f"another version of {name}" if "code" in name else f"{name}={old!r}, not {new!r}"
        for name, old, new in pairs
        if old != new
    ]
    if differing:
        raise UserError(f"'{place}' holds a sweep with {'; '.join(differing)}: give another run_dir, or remove it")
    return _Before(known, codes, record.seeds, record.baseline)


def _leaves(data: Any, prefix: str = "") -> Json:
    """Return the leaves of JSON data by dotted key."""
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data}
    found: Json = {}
    for name, value in data.items():
        found |= _leaves(value, f"{prefix}{name}.")
    return found


def _match(made: Sequence[Variant], chosen: Variant, quantity: str, key: str | None) -> tuple[list[Variant], list[Any]]:
    """Return the variants with the baseline's quantity, and what was adjusted in each (None: nothing)."""
    target = QUANTITIES[quantity](chosen.config)
    if target is None:
        raise UserError(f"match='{quantity}' needs a model that continues texts: take parameters or flops")
    pairs = [(v, None) if v.name == chosen.name else matched(v, target, quantity, key) for v in made]
    fits = [None if new == old else fit for old, (new, fit) in zip(made, pairs, strict=True)]
    return [variant for variant, _ in pairs], fits


def _record(variant: Variant, fit: Json | None, before: _Before) -> VariantRecord:
    """Return a variant's record with its exact counts; what was measured before is kept."""
    old = before.records.get(variant.name) or VariantRecord(variant.name)
    return dataclasses.replace(
        old,
        changes=variant.changes,
        matched=fit,
        num_parameters=num_parameters(variant.config.model),
        train_flops_per_token=variant.config.flops_per_token,
        cache_bytes_per_token=QUANTITIES["cache_bytes"](variant.config),
    )
