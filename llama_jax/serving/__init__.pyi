from .app import (
    LOCAL as LOCAL,
    Service as Service,
    ServingConfig as ServingConfig,
    application as application,
)
from .running import serve as serve
