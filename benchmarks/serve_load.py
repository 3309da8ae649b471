"""Load on a server: streams that must be right, clients that leave, malformed and oversized bodies, slow readers.

Start `python -m llama_jax serve PATH`, then `python benchmarks/serve_load.py --minutes 10 --pid PID`. Each of the
`--streams` workers sends one kind of request after another. Every finished text is compared with the one that the
same request (same seed) got before there was load. Prints one JSON object; exit code 1 where anything was wrong.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

PROMPTS = ["Once upon a time", "The little dog", "Lily and Tom went", "One day, a big"]


def body_of(i: int) -> dict:
    return {"prompt": PROMPTS[i % 4], "max_tokens": 8 + 8 * (i % 5), "seed": i, "temperature": 0.8, "stream": True}


class Load:
    def __init__(self, client: httpx.AsyncClient, bodies: int):
        self.client, self.bodies = client, bodies
        self.expected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []

    async def stream(self, i: int, *, leaves: bool = False, slow: bool = False) -> str | None:
        start = last = time.monotonic()
        text, ended = "", False
        async with self.client.stream("POST", "/v1/completions", json=body_of(i)) as answer:
            if answer.status_code != 200:
                self.counts[f"status {answer.status_code}"] += 1
                return None
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                choice = json.loads(line[6:])["choices"][0]
                now = time.monotonic()
                if not text:
                    self.first.append(now - start)
                elif not slow:
                    self.between.append(now - last)
                last, text = now, text + choice["text"]
                ended = choice["finish_reason"] is not None
                if leaves:
                    self.counts["left"] += 1
                    return None
                if slow:
                    await asyncio.sleep(0.2)
        self.counts["finished" if ended else "cut off"] += 1
        return text

    async def refused(self, content: bytes, status: int) -> None:
        answer = await self.client.post("/v1/completions", content=content)
        right = answer.status_code == status and "message" in answer.json()["error"]
        self.counts[f"refused with {status}" if right else f"wrong status {answer.status_code}"] += 1

    async def worker(self, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            kind, i = rng.random(), rng.randrange(self.bodies)
            if kind < 0.1:
                await self.refused(b'{"prompt": ', 400)
            elif kind < 0.12:
                await self.refused(b" " * (9 << 20), 413)
            elif (text := await self.stream(i, leaves=kind < 0.3, slow=kind > 0.85)) is not None:
                self.counts["wrong text"] += text != self.expected[i]


def memory(pid: int | None) -> float | None:
    """Return the resident MiB of a process of this machine."""
    if pid is None:
        return None
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


async def run(args: argparse.Namespace) -> dict:
    limits = httpx.Limits(max_connections=2 * args.streams)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    async with httpx.AsyncClient(base_url=args.url, headers=headers, limits=limits, timeout=300) as client:
        load = Load(client, args.bodies)
        load.expected = [await load.stream(i) or "" for i in range(args.bodies)]
        quiet = [load.first, load.between]
        load.first, load.between, load.counts = [], [], Counter()
        warm, before = time.monotonic() + args.warm_seconds, None
        await asyncio.gather(*(load.worker(n, warm) for n in range(args.streams)))
        before = memory(args.pid)
        end = time.monotonic() + 60 * args.minutes
        await asyncio.gather(*(load.worker(n, end) for n in range(args.streams)))
        await asyncio.sleep(2)
        lines = (await client.get("/metrics")).text.splitlines()
        gauges = dict(
            line.split() for line in lines if line.startswith(("llama_jax_rows_running", "llama_jax_requests_w"))
        )
    quantiles = {
        f"{name}, {when}": {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 99)}
        for when, pair in (("alone", quiet), ("under load", (load.first, load.between)))
        for name, values in zip(("seconds to first event", "seconds between events"), pair, strict=True)
    }
    return {"counts": dict(load.counts), **quantiles, "MiB": [before, memory(args.pid)], "left in the server": gauges}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--bodies", type=int, default=20, help="different requests")
    parser.add_argument("--warm-seconds", type=float, default=20, help="of load before the memory is read first")
    parser.add_argument("--pid", type=int, help="of the server on this machine, for its memory")
    found = asyncio.run(run(parser.parse_args()))
    print(json.dumps(found, indent=2))
    wrong = sum(n for what, n in found["counts"].items() if what.startswith(("wrong", "cut off", "status")))
    return int(wrong > 0 or any(float(value) for value in found["left in the server"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
