"""Plans: what a run needs and how fast it can be, on a machine that is not here.

In: the configs of a run and the name of a topology. Out: what XLA's own compiler says of the real train step
(`compile_step`), whose text is read by `hlo.py` and `collectives.py`.
"""

from llama_jax.planning.collectives import Collective, read_collectives
from llama_jax.planning.compiled import CompiledStep, CompileRequest, DoesNotFit, Memory, compile_step
from llama_jax.planning.hlo import Program

__all__ = [
    "Collective",
    "CompileRequest",
    "CompiledStep",
    "DoesNotFit",
    "Memory",
    "Program",
    "compile_step",
    "read_collectives",
]
