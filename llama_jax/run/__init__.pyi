from .callbacks import Event as Event
from .comparing import (
    HIGHER as HIGHER,
    LAST_LINES as LAST_LINES,
    Row as Row,
    RunRecord as RunRecord,
    choose_metric as choose_metric,
    compare_runs as compare_runs,
    differing_keys as differing_keys,
    find_runs as find_runs,
    rows_of as rows_of,
)
from .configs import (
    ChecksConfig as ChecksConfig,
    LoggingConfig as LoggingConfig,
    ProfileConfig as ProfileConfig,
    ResumeConfig as ResumeConfig,
    RunConfig as RunConfig,
    load_config as load_config,
)
from .continuing import CHANGEABLE as CHANGEABLE
from .directory import Run as Run, open_run as open_run
from .lanes import (
    Lane as Lane,
    Prepared as Prepared,
    prepare_runs as prepare_runs,
)
from .metrics import METRICS_FILE as METRICS_FILE, STARTS_FILE as STARTS_FILE, read_metrics as read_metrics
from .programs import programs as programs
from .reporting import Logger as Logger
from .resuming import config_to_continue as config_to_continue, resume as resume
from .signals import termination as termination
from .together import (
    lane_mesh as lane_mesh,
    lanes_at_once as lanes_at_once,
    train_together as train_together,
)
from .training import Preempted as Preempted, RunFailed as RunFailed, train as train
