"""Families of released models: presets, the mapping of Hugging Face's config.json, the table of weight names.

In: a `model_type` or a preset's name. Out: a model config, and a table of the tensor of each parameter. A new family is
one `Family` in a module here, which is found by itself, or one that `register` adds from outside; models without
released weights are `Presets`.
"""

from llama_jax.zoo.reading import (
    ConfigReader as ConfigReader,
    Key as Key,
    without_keys as without_keys,
)
from llama_jax.zoo.registry import (
    Family as Family,
    MetaFiles as MetaFiles,
    Presets as Presets,
    all_presets as all_presets,
    families as families,
    family as family,
    model_type_of as model_type_of,
    model_type_of_params as model_type_of_params,
    presets as presets,
    register as register,
)
from llama_jax.zoo.rope import read_rope as read_rope, write_rope as write_rope
from llama_jax.zoo.weights import TensorNames as TensorNames, WeightMapping as WeightMapping, mappings as mappings
