"""Objectives: the inputs and targets that a model learns from a document.

In: a `Document`'s tokens, a random generator and a `Vocabulary`. Out: an `Example`, named arrays that `rows` puts into
rows. A new one is a frozen dataclass that derives from `Objective`, in a file here or in a notebook's cell.
"""

from llama_jax.data.objectives.base import (
    Document as Document,
    Example as Example,
    Objective as Objective,
    Vocabulary as Vocabulary,
)
from llama_jax.data.objectives.decoder import (
    BlankFilling as BlankFilling,
    Causal as Causal,
    Chat as Chat,
    Prefix as Prefix,
)
from llama_jax.data.objectives.encoder import Classification as Classification, MaskedLM as MaskedLM
from llama_jax.data.objectives.encoder_decoder import (
    Denoising as Denoising,
    ParallelText as ParallelText,
    SequenceToSequence as SequenceToSequence,
    SpanCorruption as SpanCorruption,
)
from llama_jax.data.objectives.preference import Preference as Preference
