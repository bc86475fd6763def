"""The start of the server process: settings and address first, then PyTorch and everything that needs it.

Importing PyTorch takes seconds. A mistake on the command line or a port in use ends the process before that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

from engines.errors import PidError
from engines.private_directories import delete_temporary
from server import logs
from server.command_line import read_settings, warn_about_unknown_variables
from server.process.listen import listening


def main(arguments: Sequence[str]) -> int:
    """Run the server with these command-line arguments; return the exit status."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server handles it, which asks it to check its bundles
    try:
        settings = read_settings(arguments)
        logs.configure(settings.log_level, settings.log_format)
        warn_about_unknown_variables()
        with listening(settings.address) as listener:
            from server.main import serve_bundle  # imports PyTorch

            return serve_bundle(settings, listener)
    except PidError as error:
        logs.print_error(f"server: {error}")
        return 2
    finally:
        delete_temporary()
