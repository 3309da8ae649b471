"""The command `serve`: a model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from pathlib import PurePath

from llama_jax.config import UserError
from llama_jax.parser import CHAT_TEMPLATE, LOADING, RUN_PATH, Command, flag, loading

SERVE = Command(
    "Serve a model by HTTP, as OpenAI's interface has it, with a page to try it (extra `serve`).",
    (
        flag("path", "PATH", RUN_PATH),
        flag("--host", "ADDRESS", "address to listen at; default: %(default)s, this machine alone",
             default="127.0.0.1"),
        flag("--port", "N", "0: any that is free; default: %(default)s", type=int, default=8000),
        flag("--name", "NAME", "of the model in requests; default: the path's last part"),
        flag("--api-key", "KEY", "key that requests must have; default: $LLAMA_JAX_API_KEY, or none"),
        flag("--rows", "N", "texts that are continued together; default: %(default)s", type=int, default=8),
        flag("--max-queue", "N", "prompts that wait for a row, more get status 429; default: %(default)s", type=int,
             default=64),
        flag("--max-model-len", "N", "tokens of a prompt and its text; default: the model's positions", type=int),
        flag("--max-tokens", "N", "new tokens of a text; default: as many as there is room for", type=int),
        CHAT_TEMPLATE,
        *LOADING,
    ),
    "SIGTERM or Ctrl-C finishes what runs and exits with 0; again ends at once.",
)  # fmt: skip


def serve_command(args: argparse.Namespace) -> int:
    """Serve a model until it is stopped."""
    from llama_jax.checkpoint import load
    from llama_jax.sampling import built_in

    try:
        from llama_jax.serving import LOCAL, ServingConfig, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'llama_jax[serve]'") from None
    config = ServingConfig(
        name=args.name or PurePath(args.path).name or args.path,
        rows=args.rows,
        max_queue=args.max_queue,
        max_model_len=args.max_model_len,
        max_tokens=args.max_tokens,
        api_key=args.api_key or os.environ.get("LLAMA_JAX_API_KEY") or None,
        local=args.host in LOCAL,
    )
    lm = load(args.path, **loading(args))
    if not config.local and config.api_key is None:
        print(f"note: {args.host} is open to other machines, and no --api-key is set", file=sys.stderr)
    template = built_in(args.chat_template, lm.tokenizer)
    serve(lm, config, template, host=args.host, port=args.port, say=lambda line: print(line, flush=True))
    return 0
