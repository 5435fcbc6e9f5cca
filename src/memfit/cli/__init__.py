"""The command line: converts arguments to a request, results to text or JSON, and errors to exit codes.

Exit codes: 0 success; 1 memfit or a run failed, ``lint`` found an error, memory grew (``baseline``), or a
gate of ``decide`` does not hold; 2 invalid use; 3 nothing fits; 75 ``run`` has saved before SIGTERM ended it
and can be resumed; 130, 143 and 129 ended by Ctrl-C, SIGTERM and SIGHUP. ``watch`` with a command exits as
the command does. Commands load torch and other heavy libraries only when they need them.
"""

from __future__ import annotations

from memfit.cli.app import main

__all__ = ["main"]
