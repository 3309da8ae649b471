"""Signals and errors of a command's process that no function of it can handle."""

import os
import signal
import sys
import threading
from typing import Any, NoReturn

STOPPED = "stopped by SIGTERM before the end: start again"


def leave(*_: Any) -> NoReturn:
    """End a command that has not begun at once: modules of C++ make another error of what interrupts their import."""
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(75)


def terminate(*_: Any) -> NoReturn:
    """End the command at a SIGTERM as at Ctrl-C: what it has begun is cleaned up. Raises KeyboardInterrupt."""
    raise KeyboardInterrupt(STOPPED)


def background_error(found: Any) -> None:
    """Report an error of a library's thread in a line, and none of closed loops and pipes: they follow from another."""
    if isinstance(found.exc_value, KeyboardInterrupt):  # in a destructor, where it is lost: it comes again
        number = signal.SIGTERM if found.exc_value.args else signal.SIGINT
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number)).start()
    elif not str(found.exc_value).endswith("is closed"):
        print(f"in the background: {found.exc_type.__name__}: {found.exc_value}", file=sys.stderr)
