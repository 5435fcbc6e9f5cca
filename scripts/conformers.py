"""Makes src/memfit/jobs/data/conformers.npz: energies and forces of small molecules in motion, by GFN2-xTB.

    pip install tblite && PYTHONPATH=src python scripts/conformers.py

Molecules are written with all their hydrogens, laid out in space by springs, relaxed, and then moved by
Langevin dynamics at 500 K, of which every twentieth step of half a femtosecond is kept. A minute on one core.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from tblite.interface import Calculator

from memfit.jobs.builtin.smiles import graph

HERE = Path(__file__).parents[1] / "src" / "memfit" / "jobs" / "data" / "conformers.npz"
BOHR, HARTREE = 0.529177210903, 27.211386245988  # CODATA 2018, angstrom and eV
NUMBER = {"H": 1, "C": 6, "N": 7, "O": 8}
RADIUS = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66}  # covalent, Cordero et al. 2008, angstrom
MASS = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999}
STEP_FS, KELVIN, FRICTION_PER_FS = 0.5, 500.0, 0.01
ACCELERATION = 9.648533e-3  # angstrom / fs^2 of 1 eV/angstrom on 1 dalton
FRAMES, BETWEEN, SETTLING, RELAXING = 90, 20, 400, 300

M = "[H]C([H])([H])"  # methyl
TRAIN = {
    "methane": f"{M}[H]",
    "ethane": f"{M}C([H])([H])[H]",
    "propane": f"{M}C([H])([H])C([H])([H])[H]",
    "ethene": "[H]C([H])=C([H])[H]",
    "propene": f"{M}C([H])=C([H])[H]",
    "ethyne": "[H]C#C[H]",
    "methanol": f"{M}O[H]",
    "ethanol": f"{M}C([H])([H])O[H]",
    "dimethyl ether": f"{M}OC([H])([H])[H]",
    "formaldehyde": "[H]C([H])=O",
    "acetaldehyde": f"{M}C([H])=O",
    "formic acid": "[H]C(=O)O[H]",
    "acetic acid": f"{M}C(=O)O[H]",
    "methyl formate": f"{M}OC([H])=O",
    "methylamine": f"{M}N([H])[H]",
    "ethylamine": f"{M}C([H])([H])N([H])[H]",
    "formamide": "[H]C(=O)N([H])[H]",
    "urea": "[H]N([H])C(=O)N([H])[H]",
    "acetonitrile": f"{M}C#N",
    "water": "[H]O[H]",
    "ammonia": "[H]N([H])[H]",
    "glycolaldehyde": "[H]OC([H])([H])C([H])=O",
}
TEST = {
    "acetamide": f"{M}C(=O)N([H])[H]",
    "dimethylamine": f"{M}N([H])C([H])([H])[H]",
    "acetone": f"{M}C(=O)C([H])([H])[H]",
    "ethylene glycol": "[H]OC([H])([H])C([H])([H])O[H]",
}


class Molecule:
    """Elements, bonds, and GFN2-xTB's energy (eV) and forces (eV/angstrom) at positions in angstrom."""

    def __init__(self, smiles: str) -> None:
        self.elements, self.bonds = graph(smiles)
        self.numbers = np.array([NUMBER[e] for e in self.elements])
        self.masses = np.array([MASS[e] for e in self.elements])[:, None]
        radii = np.array([RADIUS[e] for e in self.elements])
        self.lengths = radii[:, None] + radii
        self.bound = np.zeros(self.lengths.shape, bool)
        for one, other in self.bonds:
            self.bound[one, other] = self.bound[other, one] = True
        self.calculator, self.last = None, None

    def energy_and_forces(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        if self.calculator is None:
            self.calculator = Calculator("GFN2-xTB", self.numbers, positions / BOHR)
            self.calculator.set("verbosity", 0)
        self.calculator.update(positions / BOHR)
        self.last = self.calculator.singlepoint(self.last)
        return self.last.get("energy") * HARTREE, -self.last.get("gradient") * HARTREE / BOHR

    def laid_out(self, rng: np.random.Generator) -> np.ndarray:
        """Bonds by springs, everything else pushed apart, from random places; then relaxed."""
        count = len(self.elements)
        off = ~np.eye(count, dtype=bool)

        def springs(flat: np.ndarray) -> float:
            places = flat.reshape(-1, 3)
            apart = np.sqrt(((places[:, None] - places) ** 2).sum(-1) + 1e-9)
            stretched = ((apart - self.lengths) ** 2)[self.bound].sum()
            return 10 * stretched + (1 / apart[off & ~self.bound]).sum()

        starts = (minimize(springs, rng.normal(size=3 * count)) for _ in range(9))
        places = min(starts, key=lambda found: found.fun).x.reshape(-1, 3)
        for _ in range(RELAXING):
            places = places + np.clip(0.02 * self.energy_and_forces(places)[1], -0.05, 0.05)
        return places

    def is_whole(self, positions: np.ndarray) -> bool:
        """Whether bonds are where they were, and nowhere else."""
        apart = np.linalg.norm(positions[:, None] - positions, axis=-1) + 9 * np.eye(len(positions))
        return bool(((apart < 1.3 * self.lengths) == self.bound).all())


def moved(molecule: Molecule, rng: np.random.Generator) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(energy, positions, forces) of frames along Langevin dynamics (BAOAB, Leimkuhler & Matthews 2013)."""
    places, frames = molecule.laid_out(rng), []
    assert molecule.is_whole(places), molecule.elements
    thermal = np.sqrt(8.617333e-5 * KELVIN * ACCELERATION / molecule.masses)  # angstrom / fs
    speeds = thermal * rng.normal(size=places.shape)
    kept = np.exp(-FRICTION_PER_FS * STEP_FS)
    energy, forces = molecule.energy_and_forces(places)
    for step in range(1, SETTLING + FRAMES * BETWEEN + 1):
        speeds = speeds + STEP_FS / 2 * ACCELERATION * forces / molecule.masses
        places = places + STEP_FS / 2 * speeds
        speeds = kept * speeds + np.sqrt(1 - kept**2) * thermal * rng.normal(size=places.shape)
        places = places + STEP_FS / 2 * speeds
        energy, forces = molecule.energy_and_forces(places)
        speeds = speeds + STEP_FS / 2 * ACCELERATION * forces / molecule.masses
        if step > SETTLING and step % BETWEEN == 0:
            frames.append((energy, places - places.mean(0), forces))
    return frames


def main() -> None:
    names = [*TRAIN, *TEST]
    molecules = [Molecule(smiles) for smiles in (TRAIN | TEST).values()]
    most = max(len(m.elements) for m in molecules)
    numbers = np.zeros((len(names), most), np.uint8)
    energy: list[float] = []
    positions = np.zeros((len(names) * FRAMES, most, 3), np.float32)
    forces = np.zeros_like(positions)
    for index, (name, molecule) in enumerate(zip(names, molecules, strict=True)):
        numbers[index, : len(molecule.elements)] = molecule.numbers
        frames = moved(molecule, np.random.default_rng(index))
        for frame, (value, places, pulls) in enumerate(frames, index * FRAMES):
            energy.append(value)
            positions[frame, : len(places)], forces[frame, : len(pulls)] = places, pulls
        print(f"{name}: mean force {np.abs([f[2] for f in frames]).mean():.3f} eV/angstrom")
    molecule_of = np.repeat(np.arange(len(names)), FRAMES).astype(np.uint8)
    np.savez_compressed(
        HERE,
        name=np.array(names),
        numbers=numbers,
        molecule=molecule_of,
        energy=np.array(energy),
        positions=positions,
        forces=forces,
        train_molecules=np.int64(len(TRAIN)),
    )
    print(HERE.name, HERE.stat().st_size, hashlib.sha256(HERE.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
