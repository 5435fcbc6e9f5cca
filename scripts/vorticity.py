"""Make the fields of the job ``weather``: ``python scripts/vorticity.py
src/memfit/jobs/data/vorticity.npz``.

Turbulence on a beta plane in arbitrary units, from random vorticity, after three time units of settling:
solved on 64 x 64 points, kept on 32 x 32. Takes ten seconds on one core.
"""

from __future__ import annotations

import sys

import numpy as np

from memfit.jobs.builtin.navier_stokes import Square, advance, coarsen, random_vorticity

TRAJECTORIES, TRAINING, FRAMES, FRAME_S, STEP_S = 64, 52, 14, 0.5, 0.05


def trajectories(square: Square, kept_points: int) -> np.ndarray:
    """(trajectories, frames, kept points, kept points)."""
    vorticity = random_vorticity(np.random.default_rng(0), TRAJECTORIES, square.points, peak=6)
    vorticity = advance(square, vorticity, step_s=STEP_S, steps=60)
    frames = [coarsen(vorticity, kept_points)]
    for _ in range(FRAMES - 1):
        vorticity = advance(square, vorticity, step_s=STEP_S, steps=round(FRAME_S / STEP_S))
        frames.append(coarsen(vorticity, kept_points))
    return np.stack(frames, axis=1)


if __name__ == "__main__":
    fields = trajectories(Square(points=64, viscosity=1e-3, beta=10.0), 32)
    np.savez_compressed(sys.argv[1], vorticity=fields.astype(np.float16), n_train=np.int32(TRAINING))
