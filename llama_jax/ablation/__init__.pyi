from .isoflop import Point as Point, Recommendation as Recommendation, Scaling as Scaling, scaling as scaling
from .laws import Cost as Cost, Law as Law
from .records import (
    SWEEP_FILE as SWEEP_FILE,
    SweepRecord as SweepRecord,
    TrialRecord as TrialRecord,
    VariantRecord as VariantRecord,
    read_sweep as read_sweep,
)
from .result import Sweep as Sweep, open_sweep as open_sweep
from .sweep import ablate as ablate
from .tables import columns_of as columns_of
