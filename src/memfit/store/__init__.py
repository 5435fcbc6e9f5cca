"""Keep results on disk: an append-only SQLite file of Records, each with its environment.

`calibration` keeps this machine's timings in a second file, and `exchange` is the format for sharing PoCs.
"""

from __future__ import annotations

from memfit.store.database import Store, default_path
from memfit.store.environment import digest, fingerprint

__all__ = ["Store", "default_path", "digest", "fingerprint"]
