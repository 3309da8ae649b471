"""Objectives: what a model is trained to say of a document.

In: a `Document`'s tokens, a random generator and a `Vocabulary`. Out: an `Example`, named arrays that `data.packing`
puts into rows with others. A new one is a frozen dataclass that derives from `Objective`, in a file here or in a
notebook's cell.
"""

from llama_jax.data.objectives.base import Document, Example, Objective, SequenceToSequence, Vocabulary
from llama_jax.data.objectives.blank_filling import BlankFilling
from llama_jax.data.objectives.classification import Classification
from llama_jax.data.objectives.denoising import Denoising
from llama_jax.data.objectives.left_to_right import Causal, Chat, Prefix
from llama_jax.data.objectives.masked import MaskedLM
from llama_jax.data.objectives.parallel_text import ParallelText
from llama_jax.data.objectives.span_corruption import SpanCorruption

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
