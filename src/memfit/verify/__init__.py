"""6. Is the candidate the same science as the baseline? The effect class chooses the test."""

from __future__ import annotations

from memfit.verify.bits import reproducibility
from memfit.verify.judge import verdict

__all__ = ["reproducibility", "verdict"]
