"""Make the simulated alignments of the job ``alphafold2``: ``python scripts/alignments.py
src/memfit/jobs/builtin/data/alignments.npz``.

128 sequences for each of 1,000 training chains and the 120 test chains of the job, sampled from a Potts model
(`memfit.jobs.builtin.alphafold.coevolution`). Takes three minutes on one core.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np

from memfit.jobs.builtin.alphafold.coevolution import contact_map, contact_potential, sample_alignment
from memfit.jobs.builtin.batches import open_arrays

TRAINING, TESTED, ROWS, STRENGTH = 1000, 120, 128, 4.0


def main(path: str) -> None:
    with open_arrays("pdb_ss") as archive:
        residue, length = archive["residue"].astype(np.int64), archive["length"]
        profile, train_count = archive["profile"].astype(np.float32), int(archive["n_train"])
    with open_arrays("pdb_backbone") as archive:
        atoms = np.cumsum(archive["step"].astype(np.int32), axis=0).reshape(-1, 3, 3)
    atoms = (atoms / 100).astype(np.float32)
    offset = np.concatenate([[0], np.cumsum(length)])
    spans = [slice(start, stop) for start, stop in itertools.pairwise(offset)]
    potential = contact_potential((residue[span], atoms[span]) for span in spans[:train_count])
    chains = np.concatenate([np.arange(TRAINING), np.arange(train_count, train_count + TESTED)])
    alignments = []
    for chain in chains:
        span = spans[chain]
        one_hot = np.eye(21, dtype=np.float32)[residue[span]][:, :20] + np.float32(1e-3)
        known = profile[span].sum(-1, keepdims=True) > 0
        shares = np.where(known, profile[span], one_hot)
        shares /= shares.sum(-1, keepdims=True)
        rng = np.random.default_rng((0, int(chain)))
        rows = sample_alignment(
            shares, contact_map(atoms[span]), potential, rng, rows=ROWS, strength=STRENGTH
        )
        alignments.append(rows.T)
    np.savez_compressed(
        path,
        chain=chains.astype(np.int32),
        alignment=np.concatenate(alignments),
        potential=potential.astype(np.float32),
    )


if __name__ == "__main__":
    main(sys.argv[1])
