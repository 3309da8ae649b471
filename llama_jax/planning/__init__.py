"""Plans: what a run needs and how fast it can be, on a machine that is not here.

In: the configs of a run and the name of a topology. Out: memory, time and what they are bound by, by formulas
(`estimate`), the options that suit (`search`), and what XLA's own compiler says of the real train step (`compiled`,
imported only where that is asked for). A new chip is a line in `hardware.py`.
"""

from llama_jax.planning.estimate import Plan, SamplingPlan, estimate, estimate_sampling
from llama_jax.planning.hardware import CHIPS, Topology
from llama_jax.planning.report import Report
from llama_jax.planning.search import Candidate, best_mesh, remedy, search
from llama_jax.planning.workload import Workload

__all__ = [
    "CHIPS",
    "Candidate",
    "Plan",
    "Report",
    "SamplingPlan",
    "Topology",
    "Workload",
    "best_mesh",
    "estimate",
    "estimate_sampling",
    "remedy",
    "search",
]
