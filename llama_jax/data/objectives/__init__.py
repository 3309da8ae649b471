"""Objectives: what a model is trained to say of a document.

In: a `Document`'s tokens, a random generator and a `Vocabulary`. Out: an `Example`, named arrays that `data.packing`
puts into rows with others. A new one is a frozen dataclass that derives from `Objective`, in a file here or in a
notebook's cell.
"""

from llama_jax.data.objectives.base import Document, Example, Objective, Vocabulary
from llama_jax.data.objectives.decoder import BlankFilling, Causal, Chat, Prefix
from llama_jax.data.objectives.encoder import Classification, MaskedLM
from llama_jax.data.objectives.encoder_decoder import Denoising, ParallelText, SequenceToSequence, SpanCorruption

__all__ = [
    "BlankFilling",
    "Causal",
    "Chat",
    "Classification",
    "Denoising",
    "Document",
    "Example",
    "MaskedLM",
    "Objective",
    "ParallelText",
    "Prefix",
    "SequenceToSequence",
    "SpanCorruption",
    "Vocabulary",
]
