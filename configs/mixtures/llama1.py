"""LLaMA-1 7B on its paper's mixture (arXiv 2302.13971, table 1).

python train.py mixtures/llama1 --tokenizer.path tokenizer.model

The corpora are folders below $CORPORA: common_crawl, c4, github, wikipedia, books, arxiv, stack_exchange. Shares are of
the tokens, the paper's sampling proportions; how many epochs of each corpus they come to follows from the corpora's
sizes and is told when the run starts. With the paper's own (3.3 TB, 783 GB, 328 GB, 83 GB, 85 GB, 92 GB, 78 GB) and its
1.4T tokens it was 1.10, 1.06, 0.64, 2.45, 2.23, 1.06 and 1.03.

Everything else, the cost too, is as in the config llama1_7b. Nothing is claimed of the result: not run to the end with
this package.
"""

import dataclasses

from llama_jax.data import DataConfig, Source
from llama_jax.run import RunConfig, load_config

SHARES = {
    "common_crawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stack_exchange": 0.02,
}


def get_sources(root: str = "$CORPORA") -> tuple[Source, ...]:
    """Return the seven corpora as folders below `root`."""
    return tuple(Source(name, (f"{root}/{name}",), share=share) for name, share in SHARES.items())


def get_config() -> RunConfig:
    return dataclasses.replace(load_config("llama1_7b"), data=DataConfig(path=(), sources=get_sources()))
