"""The command `evaluate`: numbers of a model as a table, and as JSON."""

import argparse
import json
import sys

from rich.console import Console

from llama_jax.evaluation import evaluate
from llama_jax.parser import mesh_of

PLAIN_COLUMNS = 160  # of a table that goes into a file


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluate a model and print the numbers, remarks on stderr."""
    scores = evaluate(
        args.path,
        [name for names in args.tasks for name in names.split(",") if name],
        texts=args.text,
        pairs=args.pairs,
        source=args.source,
        reference=args.reference,
        fields=args.fields and args.fields.split(","),
        task_files=args.task_files,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        chat=args.chat_template or args.chat,
        system=args.system,
        window=args.window,
        stride=args.stride,
        output=args.output,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        mesh=mesh_of(args),
        step=args.step,
        quiet=args.quiet,
    )
    if args.json:
        print(json.dumps({"results": scores.results, **scores.details}, indent=2, default=str))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = PLAIN_COLUMNS
        console.print(scores.table())
        settings = scores.details["settings"]
        if "window" in settings:
            shown = f"texts by windows of {settings['window']} tokens, {settings['stride']} apart"
            print(f"{shown}: at least {settings['window'] - settings['stride']} tokens before each but the first")
    for remark in scores.details["remarks"]:
        print(remark, file=sys.stderr)
    if scores.path is not None:
        print(f"written to {scores.path}", file=sys.stderr)
    return 0
