"""The work of the command `report`: a table in the terminal, a page in a file, or a page that is served."""

import argparse
from typing import Any

from rich.console import Console

from llama_jax.compare_command import print_lines, print_tables, printable
from llama_jax.config import UserError
from llama_jax.reports import Report, collect, watch


def report_command(args: argparse.Namespace) -> int:
    """Write or serve a report of runs, or print its tables."""
    if args.watch and args.html is not None:
        raise UserError("--watch serves the page and --html writes it: give one of them")
    if args.watch:
        watch(args.runs, args.metric, args.port)
        return 0
    data = collect(args.runs, args.metric)
    if args.html is None:
        print_report(data)
    else:
        file = Report(data).save(args.html)
        print(f"report: {printable(str(file))} ({file.stat().st_size / 1e6:.1f} MB, opens without a network)")
    return 0


def print_report(data: dict[str, Any]) -> None:
    """Print the tables of a report as `compare` does, and what its runs were continued with."""
    console = Console()
    for sweep in data["sweeps"]:
        print_lines(console, [f"sweep {sweep['name']}: {sweep['state']}"])
        if table := dict(sweep["table"]):
            first = next(iter(table))
            print_tables(console, {first: table.pop(first)}, {}, table)
        print_lines(console, sweep["lines"])
    if columns := dict(data["columns"]):
        print_tables(console, {"run": columns.pop("run")}, data["settings"], columns)
    if averages := dict(data["averages"]):
        print_tables(console, {"run": averages.pop("run")}, {}, averages)
    if cells := dict(data["evaluations"]):
        print_tables(console, {"task": cells.pop("task")}, {}, cells)
    changes = [
        f"{run['name']}: continued at step {entry['step']} with "
        + ", ".join(f"{key}={old} -> {new}" for key, (old, new) in entry["changes"].items())
        for run in data["runs"]
        for entry in run["history"]
    ]
    print_lines(console, ["; ".join(data["about"]), *(f"note: {note}" for note in data["notes"]), *changes])
