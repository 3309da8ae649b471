"""Weights and training state on disk.

In: parameters by name, or weight files of another project. Out: the same in the other form. A new file format is one
module in `formats/`.
"""

from llama_jax.checkpoint.exporting import export_hf as export_hf
from llama_jax.checkpoint.flat_state import from_disk as from_disk, not_finite as not_finite, to_disk as to_disk
from llama_jax.checkpoint.generation import (
    GenerationSettings as GenerationSettings,
    default_stops as default_stops,
    read_generation as read_generation,
    write_generation as write_generation,
)
from llama_jax.checkpoint.importing import (
    WeightSource as WeightSource,
    load_params as load_params,
    open_source as open_source,
)
from llama_jax.checkpoint.loading import (
    CONFIG_FILE as CONFIG_FILE,
    TOKENIZER_DIRECTORY as TOKENIZER_DIRECTORY,
    LanguageModel as LanguageModel,
    MeshLike as MeshLike,
    config_of as config_of,
    kept_tokenizer as kept_tokenizer,
    load as load,
    locate as locate,
)
from llama_jax.checkpoint.manifest import (
    MANIFEST_FILE as MANIFEST_FILE,
    check_manifest as check_manifest,
    write_manifest as write_manifest,
)
from llama_jax.checkpoint.peft_writing import save_adapters as save_adapters
from llama_jax.checkpoint.saving import convert as convert, merge as merge, save as save
from llama_jax.checkpoint.steps import (
    CHECKPOINTS_DIRECTORY as CHECKPOINTS_DIRECTORY,
    COMMIT_FILE as COMMIT_FILE,
    committed_steps as committed_steps,
    damage as damage,
    model_files as model_files,
    newest_good as newest_good,
    run_files as run_files,
    step_of as step_of,
    whole_steps as whole_steps,
)
from llama_jax.checkpoint.store import (
    CheckpointConfig as CheckpointConfig,
    CheckpointStore as CheckpointStore,
    SaveFailed as SaveFailed,
)
from llama_jax.checkpoint.verifying import (
    ConversionError as ConversionError,
    check_conversion as check_conversion,
    params_logits as params_logits,
)
