from .app import ServingConfig as ServingConfig, application as application
from .running import serve as serve
