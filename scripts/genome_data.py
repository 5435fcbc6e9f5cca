"""Makes src/memfit/jobs/data/ecoli_536.npz: a chromosome, four bases to the byte.

apt-get download bowtie-examples && dpkg -x bowtie-examples_*.deb unpacked
python scripts/genome_data.py unpacked/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1] / "src" / "memfit" / "jobs" / "data" / "ecoli_536.npz"


def main(path: str) -> None:
    heading, *lines = gzip.decompress(Path(path).read_bytes()).decode().splitlines()
    bases = np.array(["ACGT".index(base) for base in "".join(lines)], np.uint8)
    fours = np.pad(bases, (0, -len(bases) % 4)).reshape(-1, 4)
    packed = (fours << np.array([6, 4, 2, 0], np.uint8)).sum(1, dtype=np.uint8)
    np.savez(HERE, packed=packed, bases=np.int64(len(bases)))
    print(heading, len(bases), "bases;", HERE.name, hashlib.sha256(HERE.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
