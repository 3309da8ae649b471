"""Plans: what a run needs and how fast it can be, on a machine that is not here.

In: the config of a run and the name of a topology. Out: memory, time and what they are bound by, by formulas
(`estimate`), the options that suit (`search`), and XLA's own figures of the real train step (`xla/`); `plan` has all of
it. A new chip is one entry of `llama_jax.chips.CHIPS`.
"""

from llama_jax.planning.estimate import (
    Plan as Plan,
    SamplingPlan as SamplingPlan,
    estimate as estimate,
    estimate_sampling as estimate_sampling,
)
from llama_jax.planning.memory import device_memory as device_memory
from llama_jax.planning.report import Report as Report, plan as plan
from llama_jax.planning.search import (
    Candidate as Candidate,
    best_mesh as best_mesh,
    mesh_of as mesh_of,
    search as search,
    suggestion as suggestion,
)
from llama_jax.planning.topology import Topology as Topology
from llama_jax.planning.xla import (
    Collective as Collective,
    CompiledStep as CompiledStep,
    Cycles as Cycles,
    DoesNotFit as DoesNotFit,
    Memory as Memory,
    Program as Program,
    compile_step as compile_step,
    read_collectives as read_collectives,
)
