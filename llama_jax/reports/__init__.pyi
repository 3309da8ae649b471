from .collecting import collect as collect
from .page import Report as Report, report as report
from .serving import watch as watch
