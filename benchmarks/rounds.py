"""Peers take turns: each a warm process in an environment of its own, one running while the others wait on a pipe.

Turn order A, B, C, A, B, C...: what the machine does to one it soon does to the others, so ratios are taken within a
round and their median over the rounds. Every turn notes how much of the processors something else was using.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from works import tokens_per_step

sys.path.append(str(Path(__file__).resolve().parents[1]))
from llama_jax.__main__ import TUNABLES

OURS = "llama_jax"
PLAIN = "plain"
SCRIPTS = {
    OURS: "ours.py",
    PLAIN: "plain.py",
    "torch": "torch_transformers.py",
    "tunix": "google_tunix.py",
    "llamacpp": "llamacpp.py",
}
PAUSE = 0.5  # seconds between turns: the last one's threads stop spinning


@dataclass(frozen=True)
class Turn:
    """One peer's part of a round."""

    tokens_per_second: float
    seconds: float
    cpu_seconds: float
    others: float | None  # share of the processors that other processes used meanwhile; None where unknown
    result: list
    peak_bytes: int | None  # largest resident memory of its process so far; None where unknown
    first_seconds: float | None = None  # of decoding: prompts and one token


class Worker:
    """A peer's process, spoken to in JSON lines (peers/worker.py says which)."""

    def __init__(self, name: str, python: str):
        """Start a peer; `name` is that of its script, with a variant after a hyphen."""
        package = name.split("-")[0]
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment |= TUNABLES if package in (OURS, PLAIN) else {}
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "peers" / SCRIPTS[package])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def ask(self, **request) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.log.seek(0)
            raise SystemExit(f"the process of {self.name} ended:\n{self.log.read()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def busy_seconds() -> float | None:
    """Processor seconds used on the machine, or taken from it by its host, where the system tells."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def take_turn(worker: Worker, work: dict, steps: int) -> Turn:
    time.sleep(PAUSE)
    start, busy = time.perf_counter(), busy_seconds()
    answer = worker.ask(cmd="run", steps=steps)
    wall, busy_after = time.perf_counter() - start, busy_seconds()
    others = None
    if busy is not None and busy_after is not None:
        others = max(0.0, busy_after - busy - answer["cpu_seconds"]) / (wall * (os.cpu_count() or 1))
    first = worker.ask(cmd="run", steps=1, new_tokens=1)["seconds"] if work["task"] == "decode" else None
    speed = steps * tokens_per_step(work) / answer["seconds"]
    return Turn(speed, answer["seconds"], answer["cpu_seconds"], others, answer["result"], answer["peak_bytes"], first)


def same_work(work: dict, exact: list[str], setups: dict[str, dict], rounds: list[dict[str, Turn]]) -> str | None:
    """Return the differences in parameter counts, losses or tokens of `exact` peers; None where they are the same."""
    counts = {name: setup["parameters"] for name, setup in setups.items() if name in exact}
    if len(set(counts.values())) > 1:
        return f"parameter counts differ: {counts}"
    for i, turns in enumerate(rounds):
        results = {name: np.array(turn.result) for name, turn in turns.items() if name in exact}
        first = next(iter(results.values()))
        # Greedy tokens may part where two logits nearly tie, so the beginning has to agree.
        compared = (slice(None), slice(16)) if work["task"] == "decode" else slice(None)
        for name, result in results.items():
            if result.shape != first.shape or not np.allclose(result[compared], first[compared], rtol=1e-3):
                return f"in round {i + 1} {name} computed {result}, {next(iter(results))} {first}"
    return None


def machine() -> dict:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": len(cores()), "system": platform.platform(terse=True)}


def cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def compare(
    work: dict, pythons: dict[str, str], variants: dict[str, dict], rounds: int, steps: int, console: Console
) -> dict:
    """Run one work on every peer, alternately; returns what --json writes of it.

    `variants` are peers that change the work: `llama_jax-int8` is llama_jax with other weights, and computes other
    tokens.
    """
    names = [*pythons, *(name for name in variants if name.split("-")[0] in pythons)]
    workers = {name: Worker(name, pythons[name.split("-")[0]]) for name in names}
    setups = {name: worker.ask(cmd="setup", work=work | variants.get(name, {})) for name, worker in workers.items()}
    exact = [name for name in workers if not variants.get(name)]
    warm_up: dict[str, Turn] = {}
    done: list[dict[str, Turn]] = []
    for i in range(rounds + 1):
        with console.status(f"round {i} of {rounds}" if i else "compiling and warming up"):
            turns = {name: take_turn(worker, work, steps) for name, worker in workers.items()}
        if i:
            done.append(turns)
        else:
            warm_up = turns
    for worker in workers.values():
        worker.close()
    difference = same_work(work, exact, setups, done)
    peers = {}
    for name in workers:
        speeds = [turns[name].tokens_per_second for turns in done]
        others = [turns[name].others for turns in done if turns[name].others is not None]
        peers[name] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "others_median": statistics.median(others) if others else None,
            "versions": setups[name]["versions"],
            "parameters": setups[name]["parameters"],
        }
        peers[name]["compile_seconds"] = warm_up[name].seconds - statistics.median(t[name].seconds for t in done)
        peers[name]["peak_bytes"] = done[-1][name].peak_bytes
        if work["task"] == "decode":
            peers[name]["first_token_seconds"] = statistics.median(turns[name].first_seconds or 0 for turns in done)
        ours = f"{OURS}-bf16" if name.endswith("-bf16") and f"{OURS}-bf16" in workers else OURS
        if ours in workers:
            ratios = [turns[ours].tokens_per_second / turns[name].tokens_per_second for turns in done]
            peers[name]["ours_over_this"] = statistics.median(ratios)
    details = [{name: asdict(turn) for name, turn in turns.items()} for turns in done]
    return {"work": work, "steps": steps, "same_work": difference is None, "difference": difference} | {
        "peers": peers,
        "rounds": details,
    }


def show(title: str, outcome: dict, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    costs = ("first token (ms)", "compile (s)", "peak (MiB)")
    for column in ("peer", "tokens/s", "slowest to fastest", "llama_jax / peer", *costs, "used by others", "versions"):
        table.add_column(column, justify="left" if column in ("peer", "versions") else "right")
    for name, peer in outcome["peers"].items():
        ratio, others = peer.get("ours_over_this"), peer["others_median"]
        table.add_row(
            name,
            f"{peer['tokens_per_second']:.0f}",
            f"{peer['slowest']:.0f} to {peer['fastest']:.0f}",
            "" if ratio is None or (name.split("-")[0] == OURS and ratio == 1) else f"{ratio:.2f}",
            f"{peer['first_token_seconds'] * 1e3:.1f}" if "first_token_seconds" in peer else "",
            f"{peer['compile_seconds']:.1f}",
            "" if peer["peak_bytes"] is None else f"{peer['peak_bytes'] / 2**20:,.0f}",
            "" if others is None else f"{others:.0%}",
            ", ".join(f"{package} {version}" for package, version in peer["versions"].items()),
        )
    console.print(table)
    if outcome["same_work"]:
        same = "losses agree" if outcome["work"]["task"] in ("train", "evaluate") else "tokens agree"
        console.print(f"The same work: parameter counts and {same} in every round (of all but the variants).")
    else:
        console.print(f"NOT the same work: {outcome['difference']}")


def slower(outcomes: dict[str, dict], before: dict[str, dict]) -> list[str]:
    """Return a line for each ratio to `plain` that is more than a tenth below the one of the file, where it has one."""
    lines = []
    for work in outcomes.keys() & before.keys():
        outcome = outcomes[work]
        for name in [name for name in outcome["peers"] if name.split("-")[0] == PLAIN]:
            now, then = (found[work]["peers"][name]["ours_over_this"] for found in (outcomes, before))
            if now < 0.9 * then:
                lines.append(f"{work}: {now:.2f} times {name}, and {then:.2f} times when the file was written")
    return lines


def main(
    description: str,
    works: dict[str, dict],
    steps: int,
    peers: list[str],
    variants: dict[str, dict] | None = None,
    *,
    plain: bool = False,
) -> None:
    """Run the command line of a benchmark; exits with 1 where the peers computed different things.

    `plain` adds the reference of peers/plain.py, and the options that compare the ratio to it with a file's.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog="A peer whose interpreter is not given is left out. See benchmarks/README.md."
    )
    parser.add_argument("--work", choices=list(works), action="append", help="one of the works (default: all)")
    for name in peers:
        variable = f"{name.upper()}_PYTHON"
        parser.add_argument(
            f"--{name}-python",
            default=os.environ.get(variable),
            help=f"its interpreter (default: ${variable})",
        )
    if variants:
        help = f"also these, or none: {', '.join(variants)} (default: all whose interpreter is given)"
        parser.add_argument("--variants", nargs="*", choices=list(variants), default=list(variants), help=help)
    parser.add_argument("--without-ours", action="store_true", help="only the peers")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first, uncounted one (default: 5)")
    parser.add_argument("--steps", type=int, default=steps, help=f"steps in a turn (default: {steps})")
    parser.add_argument("--num-cores", type=int, default=2, help="processors to run on (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    if plain:
        help = "fail where the ratio to the plain reference is more than a tenth below the one in FILE"
        parser.add_argument("--guard", type=Path, metavar="FILE", help=help)
    args = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 140)
    if hasattr(os, "sched_setaffinity"):  # inherited by the peers
        os.sched_setaffinity(0, sorted(cores())[: args.num_cores])
    pythons = {} if args.without_ours else {OURS: sys.executable} | ({PLAIN: sys.executable} if plain else {})
    for name in peers:
        if python := getattr(args, f"{name}_python"):
            pythons[name] = python
        else:
            console.print(f"{name}: left out, no --{name}-python given.")
    if plain and args.guard and args.without_ours:
        parser.error("--guard compares ours with the plain reference: leave --without-ours away")
    if not pythons:
        parser.error("nothing to run: give the interpreter of a peer, or leave --without-ours away")
    about = machine()
    console.print(f"{about['processor']}, {about['cores']} cores, {about['system']}; {args.rounds} rounds")
    outcomes, chosen = {}, {name: (variants or {})[name] for name in getattr(args, "variants", ())}
    for name in args.work or works:
        outcomes[name] = compare(works[name], pythons, chosen, args.rounds, args.steps, console)
        show(name, outcomes[name], console)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "outcomes": outcomes}, indent=1) + "\n")
    lines = slower(outcomes, json.loads(args.guard.read_text())["outcomes"]) if plain and args.guard else []
    console.print(*lines, sep="\n", end="\n" if lines else "")
    if lines or not all(outcome["same_work"] for outcome in outcomes.values()):
        raise SystemExit(1)
