"""The command `serve`: a model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from pathlib import PurePath

from llama_jax.checkpoint import load
from llama_jax.config import UserError
from llama_jax.sampling import built_in

KEY = "LLAMA_JAX_API_KEY"


def serve_command(args: argparse.Namespace) -> int:
    """Serve a model until it is stopped."""
    try:
        from llama_jax.serving import LOCAL, ServingConfig, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'llama_jax[serve]'") from None
    mesh = {key.removeprefix("mesh."): size for key, size in vars(args).items() if key.startswith("mesh.") and size}
    local = args.host in LOCAL
    key = args.api_key or os.environ.get(KEY) or None
    lm = load(
        args.path,
        mesh=mesh or None,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        step=args.step,
        base=args.base,
        ignore_config_keys=args.ignore_config_keys,
    )
    config = ServingConfig(
        name=args.name or PurePath(args.path.rstrip("/")).name or args.path,
        rows=args.rows,
        max_queue=args.max_queue,
        max_model_len=args.max_model_len,
        max_tokens=args.max_tokens,
        api_key=key,
        local=local,
        chat_template=built_in(args.chat_template, lm.tokenizer),
    )
    if not local and key is None:
        print(f"note: {args.host} is open to other machines, and no --api-key is set", file=sys.stderr)
    serve(lm, config, host=args.host, port=args.port, say=lambda line: print(line, flush=True))
    return 0
