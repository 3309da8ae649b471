from .attention import AttentionMaps as AttentionMaps, attention_maps as attention_maps
from .experts import ExpertLoad as ExpertLoad, expert_load as expert_load
from .lens import LogitLens as LogitLens, logit_lens as logit_lens
from .norms import (
    ActivationNorms as ActivationNorms,
    ParameterNorms as ParameterNorms,
    activation_norms as activation_norms,
    gradient_norms as gradient_norms,
)
from .sizes import CacheSizes as CacheSizes, RopeDecay as RopeDecay, kv_cache as kv_cache, rope_decay as rope_decay
from .updates import (
    UpdateHistory as UpdateHistory,
    UpdateNorms as UpdateNorms,
    log_updates as log_updates,
    update_history as update_history,
    update_norms as update_norms,
)
