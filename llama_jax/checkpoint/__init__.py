"""Weights and training state on disk.

In: parameters by name, or somebody else's weight files. Out: the same, the other way round. A new file format is one
module in `formats/`.
"""

from llama_jax.checkpoint.convert import ConversionError as ConversionError
from llama_jax.checkpoint.generation import GenerationSettings as GenerationSettings, default_stops as default_stops
from llama_jax.checkpoint.language_model import (
    CHECKPOINTS_DIRECTORY as CHECKPOINTS_DIRECTORY,
    CONFIG_FILE as CONFIG_FILE,
    TOKENIZER_DIRECTORY as TOKENIZER_DIRECTORY,
    LanguageModel as LanguageModel,
    MeshLike as MeshLike,
    config_of as config_of,
    convert as convert,
    load as load,
    save as save,
)
from llama_jax.checkpoint.store import (
    CheckpointConfig as CheckpointConfig,
    CheckpointStore as CheckpointStore,
    SaveFailed as SaveFailed,
)
from llama_jax.checkpoint.stored import (
    COMMIT_FILE as COMMIT_FILE,
    run_files as run_files,
    step_of as step_of,
    whole_steps as whole_steps,
)
