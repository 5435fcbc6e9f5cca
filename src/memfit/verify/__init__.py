"""Is the candidate scientifically equivalent to the baseline? The effect class determines the test."""

from __future__ import annotations

from memfit.verify.bits import reproducibility
from memfit.verify.judge import verdict

__all__ = ["reproducibility", "verdict"]
