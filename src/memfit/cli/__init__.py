"""The command line: arguments to a request, results to text or JSON, endings to exit codes.

Exit codes: 0 done, 1 memfit or a run failed, 2 the user's mistake, 3 nothing fits, 130 interrupted.
Every command loads torch and the other heavy libraries only when it needs them.
"""

from __future__ import annotations

from memfit.cli.app import main

__all__ = ["main"]
