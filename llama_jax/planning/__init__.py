"""Plans: what a run needs and how fast it can be, on a machine that is not here.

In: the configs of a run and the name of a topology. Out: memory, time and what they are bound by, by formulas
(`estimate`), the options that suit (`search`), and what XLA's own compiler says of the real train step
(`compile_step`), whose text is read by `hlo.py` and `collectives.py`. A new chip is a line in `hardware.py`,
a GPU one in `gpu_target.py` too.
"""

from llama_jax.planning.collectives import Collective as Collective, read_collectives as read_collectives
from llama_jax.planning.compiled import (
    CompiledStep as CompiledStep,
    CompileRequest as CompileRequest,
    DoesNotFit as DoesNotFit,
    Memory as Memory,
    compile_step as compile_step,
)
from llama_jax.planning.estimate import (
    Plan as Plan,
    SamplingPlan as SamplingPlan,
    estimate as estimate,
    estimate_sampling as estimate_sampling,
)
from llama_jax.planning.hardware import CHIPS as CHIPS, Topology as Topology
from llama_jax.planning.hlo import Program as Program
from llama_jax.planning.report import Report as Report
from llama_jax.planning.search import Candidate as Candidate, best_mesh as best_mesh, remedy as remedy, search as search
from llama_jax.planning.workload import Workload as Workload
