"""Weight files of other projects: a path comes in, a mapping from tensor name to lazily read tensor goes out.

Every reader returns `Tensors`, whose values read from the disk only what they are asked for. A newcomer adds a file
format as one module here; what the names in it *mean* is said in `zoo/`.
"""

from llama_jax.checkpoint.formats.tensors import Cut, Item, Joined, Split, Stack, Stored, Tensor, Tensors

__all__ = ["Cut", "Item", "Joined", "Split", "Stack", "Stored", "Tensor", "Tensors"]
