"""Train steps that XLA compiles for machines that are not here, and the products and collectives of these programs."""

from llama_jax.planning.xla.collectives import Collective as Collective, read_collectives as read_collectives
from llama_jax.planning.xla.compiled import (
    CompiledStep as CompiledStep,
    DoesNotFit as DoesNotFit,
    Memory as Memory,
    compile_step as compile_step,
)
from llama_jax.planning.xla.hlo import Cycles as Cycles, Program as Program
