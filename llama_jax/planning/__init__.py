"""Plans: what a run needs and how fast it can be, on a machine that is not here.

In: the configs of a run and the name of a topology. Out: memory, time and what they are bound by, by formulas
(`estimate`), the options that suit (`search`), and what XLA's own compiler says of the real train step
(`compile_step`), whose text is read by `hlo.py` and `collectives.py`. A new chip is a line in `hardware.py`,
a GPU one in `gpu_target.py` too.
"""

from llama_jax.planning.collectives import Collective, read_collectives
from llama_jax.planning.compiled import CompiledStep, CompileRequest, DoesNotFit, Memory, compile_step
from llama_jax.planning.estimate import Plan, SamplingPlan, estimate, estimate_sampling
from llama_jax.planning.hardware import CHIPS, Topology
from llama_jax.planning.hlo import Program
from llama_jax.planning.report import Report
from llama_jax.planning.search import Candidate, best_mesh, remedy, search
from llama_jax.planning.workload import Workload

__all__ = [
    "CHIPS",
    "Candidate",
    "Collective",
    "CompileRequest",
    "CompiledStep",
    "DoesNotFit",
    "Memory",
    "Plan",
    "Program",
    "Report",
    "SamplingPlan",
    "Topology",
    "Workload",
    "best_mesh",
    "compile_step",
    "estimate",
    "estimate_sampling",
    "read_collectives",
    "remedy",
    "search",
]
