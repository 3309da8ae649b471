from . import (
    ablation as ablation,
    checkpoint as checkpoint,
    chips as chips,
    config as config,
    data as data,
    evaluation as evaluation,
    files as files,
    inspect as inspect,
    models as models,
    nn as nn,
    parallel as parallel,
    planning as planning,
    remote as remote,
    reports as reports,
    run as run,
    run_config as run_config,
    sampling as sampling,
    tokenizers as tokenizers,
    training as training,
    zoo as zoo,
)
from .ablation import ablate as ablate, open_sweep as open_sweep, scaling as scaling
from .checkpoint import (
    LanguageModel as LanguageModel,
    convert as convert,
    load as load,
    merge as merge,
    save as save,
    save_adapters as save_adapters,
)
from .config import UserError as UserError, override as override
from .evaluation import Evaluation as Evaluation, evaluate as evaluate, score as score
from .models import build as build, num_parameters as num_parameters
from .planning import plan as plan
from .reports import report as report
from .run import Run as Run, open_run as open_run, resume as resume, train as train
from .run_config import RunConfig as RunConfig, load_config as load_config
from .sampling import chat as chat, generate as generate, generate_text as generate_text
from .zoo import presets as presets

__version__: str
