"""Make the backbones of the job ``alphafold2``: ``python scripts/fold_data.py
src/memfit/jobs/builtin/data/pdb_backbone.npz``.

The backbones of 1,000 training chains and 120 test chains, and the potential of contacts, which is counted in
all 2,000 training chains. ``pdb_backbone_2500.npz`` beside this script has the backbones of all 2,500 chains
of ``pdb_ss.npz``. ``correction`` is kept as it is in the file: letters of the alignments that version 0.1
sampled in float32, where these differ from what float64 gives.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from memfit.jobs.builtin.alphafold.coevolution import contact_potential
from memfit.jobs.builtin.batches import open_arrays

TRAINING, TESTED = 1000, 120


def main(path: str) -> None:
    with open_arrays("pdb_ss") as archive:
        residue, length = archive["residue"].astype(np.int64), archive["length"]
        train_count = int(archive["n_train"])
    with np.load(Path(__file__).with_name("pdb_backbone_2500.npz")) as archive:
        step = archive["step"]
    places = np.cumsum(step.astype(np.int32), axis=0).reshape(-1, 3, 3)
    atoms = (places / 100).astype(np.float32)
    offset = np.concatenate([[0], np.cumsum(length)])
    spans = [slice(start, stop) for start, stop in itertools.pairwise(offset)]
    potential = contact_potential((residue[span], atoms[span]) for span in spans[:train_count])
    chains = np.concatenate([np.arange(TRAINING), np.arange(train_count, train_count + TESTED)])
    with np.load(path) as archive:
        correction = archive["correction"]
    kept = np.concatenate([places[spans[chain]] for chain in chains]).reshape(-1, 3)
    np.savez_compressed(
        path,
        chain=chains.astype(np.int32),
        step=np.diff(kept, axis=0, prepend=0).astype(np.int16),
        potential=potential.astype(np.float32),
        correction=correction,
    )


if __name__ == "__main__":
    main(sys.argv[1])
