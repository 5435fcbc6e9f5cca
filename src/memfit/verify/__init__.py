"""Judge whether the runs of a plan give results that are scientifically equivalent to plain training's.

The plan's effect class determines the test. `reproducibility` compares two runs of one plan and seed.
"""

from __future__ import annotations

from memfit.verify.bits import reproducibility
from memfit.verify.judge import verdict

__all__ = ["reproducibility", "verdict"]
