"""Language models in JAX: exact against the original weights, sharded on any mesh, measured.

    import llama_jax
    lm = llama_jax.load("runs/tiny_python")
    logits = lm.model(tokens)

The rooms, in the order of the data: config, remote, parallel, tokenizers, data, nn, models, zoo, training, checkpoint,
sampling, planning, run. docs/architecture.md shows the house.
"""

from llama_jax.checkpoint import LanguageModel, convert, load, save
from llama_jax.config import UserError, override
from llama_jax.models import build, num_parameters
from llama_jax.run import Run, RunConfig, load_config, open_run as open_run, plan, train
from llama_jax.sampling import chat, generate, generate_text
from llama_jax.zoo import presets

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "Run",
    "RunConfig",
    "UserError",
    "build",
    "chat",
    "convert",
    "generate",
    "generate_text",
    "load",
    "load_config",
    "num_parameters",
    "open_run",
    "override",
    "plan",
    "presets",
    "save",
    "train",
]
