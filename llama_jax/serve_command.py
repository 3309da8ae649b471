"""The command `serve`: a model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from pathlib import PurePath

from llama_jax.config import UserError
from llama_jax.parser import BASE, IGNORED_KEYS, MESH, RUN_PATH, TOKENIZER, Command, flag

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
        flag("--chat-template", "NAME", "another chat template: one that the model's files name, or Llama2Chat, "
             "Llama3Chat, ChatML, ChatGLM2Chat"),
        TOKENIZER,
        flag("--step", "N", "checkpoint of a run; default: the latest", type=int),
        flag("--dtype", "{float32,bfloat16}", "default: bfloat16 on TPU and GPU", choices=("float32", "bfloat16")),
        flag("--quantize", "{int8,int4}", "weights in fewer bits", choices=("int8", "int4")),
        *MESH,
        BASE,
        IGNORED_KEYS,
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
    mesh = {key.removeprefix("mesh."): size for key, size in vars(args).items() if key.startswith("mesh.") and size}
    config = ServingConfig(
        name=args.name or PurePath(args.path).name or args.path,
        rows=args.rows,
        max_queue=args.max_queue,
        max_model_len=args.max_model_len,
        max_tokens=args.max_tokens,
        api_key=args.api_key or os.environ.get("LLAMA_JAX_API_KEY") or None,
        local=args.host in LOCAL,
    )
    lm = load(
        args.path,
        mesh=mesh or None,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        step=args.step,
        base=args.base,
        ignore_config_keys=args.ignore_config_keys,
        quantize=args.quantize,
    )
    if not config.local and config.api_key is None:
        print(f"note: {args.host} is open to other machines, and no --api-key is set", file=sys.stderr)
    template = built_in(args.chat_template, lm.tokenizer)
    serve(lm, config, template, host=args.host, port=args.port, say=lambda line: print(line, flush=True))
    return 0
