from .collecting import collect as collect
from .page import Report as Report, report as report
from .serving import server as server, watch as watch
