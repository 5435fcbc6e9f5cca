"""``potential``: energies and forces of moving molecules, by a SchNet that is differentiated twice.

Test molecules are not among the training molecules, so the task is not interpolation between frames of one
motion.

Two parts stay in float32: distances and what is computed from them (in bfloat16 the Gaussians are wrong by a
third and the loss moves by 6 %), and the sum of energies over atoms, whose error grows with their number (0.6
% with ten atoms). The layers between contribute an error of 2 %; forces are then wrong by another 12
meV/angstrom, which is inside the margin.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import Array, as_tensors, epoch_indices, equal_parts, evaluating, to_device
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.schnet import SchnetSize

NAME: Final = "potential"
TITLE: Final = "Interatomic potential: forces as gradients of energy (SchNet)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "molecules of hydrogen, carbon, nitrogen and oxygen moving at 500 K, computed with GFN2-xTB for memfit; "
    "the test molecules are not among those for training"
)
_KEYS: Final = ("numbers", "molecule", "energy", "positions", "forces", "train_molecules")
_MOST_PROTONS: Final = 118
_ALLOWED: Final = (
    "whole numbers: numbers (molecules, atoms), atomic numbers with 0 as padding, molecule (frames,), the "
    "index of each frame's molecule, and train_molecules; finite numbers: energy (frames,) in eV, positions "
    "(frames, atoms, 3) in angstrom and forces (frames, atoms, 3) in eV/angstrom; first the frames for "
    "training, whose molecule is below train_molecules, then at least one frame of another molecule, for "
    "testing"
)
_DIMENSIONS: Final = {
    "atoms": "atoms",
    "neighbours": "neighbours",
    "layers": "layers",
    "hidden": "width",
}
_ENERGY_WEIGHT: Final = 0.05  # weight of squared eV per atom, relative to squared eV/angstrom
_FITTED: Final = 400  # number of frames to which the naive pair potential is fitted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoleculeFrames:
    """Frames of moving molecules: the first ``train_count`` are for training, the others for testing.

    ``species`` (frames, atoms) uint8: atomic numbers, 0 at padding to the atoms of the largest molecule.
    ``positions`` (angstrom) and ``forces`` (eV/angstrom) (frames, atoms, 3) float32. ``energy`` (frames,) in
    eV, minus the sum of the fitted energies of the elements. ``source``: where the data come from.
    """

    species: Array
    positions: Array
    forces: Array
    energy: Array
    train_count: int
    source: str


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "paper"), by default on the built-in frames.

    ``data``: an ``.npz`` file with the arrays ``numbers`` (molecules, atoms of the largest one), atomic
    numbers, 0 at padding; ``molecule`` (frames,), the index of each frame's molecule; ``energy`` (frames,) in
    eV; ``positions`` in angstrom and ``forces`` in eV/angstrom, both (frames, atoms, 3); and
    ``train_molecules``, a number: frames of the molecules below it are for training and must come first.
    ``batch``: samples of a step. Raises UserError for any ``length``, for ``data`` as `read` does, and for a
    dimension that is unknown or impossible: "atoms" must be at least those of the largest molecule, at "tiny"
    a multiple of these, "neighbours" below "atoms", and "hidden" even.
    """
    options.refuse("length", job=NAME, why="its samples are molecules, whose number of atoms is --dim atoms")
    frames = read(options.data)
    shape = options.resize(_shape(options.size, frames), _DIMENSIONS)
    _must_hold(shape, frames.species.shape[1])
    # The tiny size has whole molecules only; every atom of the paper's size may be padding.
    multiples = {"atoms": frames.species.shape[1] if options.size == "tiny" else 1, "hidden": 2}
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        steps=200,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(frames, shape, shape.batch_size, step=step, seed=seed),
        loss=loss,
        evaluate=lambda model: force_error(model, frames, shape, shape.batch_size),
        metric=metric(frames),
        optimizer=OptimizerChoice(learning_rate=3e-3 if options.size == "tiny" else 1e-4),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, multiples),
        blocks="blocks",
        data_source=frames.source,
        islands=("geometry", "energy"),
    )


def _must_hold(shape: SchnetSize, largest_molecule: int) -> None:
    """Raise UserError if a sample of ``shape`` has fewer atoms than the largest molecule, or not more atoms
    than each has neighbours."""
    if shape.atoms < largest_molecule:
        raise UserError(
            f"a sample of {shape.atoms} atoms (--dim atoms) cannot hold the largest molecule",
            allowed=f"at least {largest_molecule} atoms",
        )
    if shape.neighbours >= shape.atoms:
        raise UserError(
            f"an atom cannot have {shape.neighbours} neighbours (--dim neighbours) in a sample of "
            f"{shape.atoms} atoms (--dim atoms)",
            allowed=f"1 to {shape.atoms - 1} neighbours",
        )


def _shape(size: str, frames: MoleculeFrames) -> SchnetSize:
    from memfit.jobs.builtin.schnet import OPEN_CATALYST, SchnetSize

    if size == "paper":
        return OPEN_CATALYST
    atoms = frames.species.shape[1]
    return SchnetSize(
        layers=3,
        width=64,
        filters=64,
        radial=32,
        cutoff=5.0,
        species=int(frames.species.max()) + 1,
        atoms=atoms,
        neighbours=atoms - 1,
        batch_size=32,
    )


def _build(shape: SchnetSize) -> torch.nn.Module:
    from memfit.jobs.builtin.schnet import Schnet

    return Schnet(shape)


def read(path: str | None) -> MoleculeFrames:
    """Return the frames of the user's file ``path``, or the built-in ones if None.

    The energy of each element, which is found by a least-squares fit over the training frames, is subtracted.
    Raises UserError for a file that cannot be read or lacks one of the arrays that `make` names, and for
    arrays that do not have the shapes, values and order that it describes.
    """
    file = Path(path) if path else resources.files("memfit.jobs.builtin") / "data" / "conformers.npz"
    try:
        with (
            resources.as_file(file) as local_path,
            local_path.open("rb") as stream,
            np.load(stream) as archive,
        ):
            arrays = {key: archive[key] for key in _KEYS}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as reason:
        raise UserError(
            f"the data file {path} cannot be read, or lacks an array: {reason}",
            allowed=f"a NumPy file .npz with the arrays {', '.join(_KEYS)}",
        ) from reason
    if fault := _fault(arrays):
        raise UserError(f"the data file {path} cannot be trained on: {fault}", allowed=_ALLOWED)
    train_count = int((arrays["molecule"] < arrays["train_molecules"]).sum())
    species = arrays["numbers"][arrays["molecule"]]
    counts = (species[:, :, None] == np.unique(species[species > 0])).sum(1).astype(np.float64)
    element_energy = np.linalg.lstsq(counts[:train_count], arrays["energy"][:train_count], rcond=None)[0]
    return MoleculeFrames(
        species=species.astype(np.uint8),
        positions=arrays["positions"].astype(np.float32),
        forces=arrays["forces"].astype(np.float32),
        energy=(arrays["energy"] - counts @ element_energy).astype(np.float32),
        train_count=train_count,
        source=path or DATA_SOURCE,
    )


def _fault(arrays: Mapping[str, Array]) -> str:
    """Return what the shapes, the values or the order of the arrays of a file lack that `make` describes; ""
    for nothing."""
    numbers, molecule, train_molecules = (arrays[key] for key in ("numbers", "molecule", "train_molecules"))
    whole = all(np.issubdtype(array.dtype, np.integer) for array in (numbers, molecule, train_molecules))
    if not whole or numbers.ndim != 2 or molecule.ndim != 1 or train_molecules.size != 1:
        return "numbers, molecule and train_molecules are not whole numbers of two, one and no dimensions"
    count, atoms = len(molecule), numbers.shape[1]
    shapes = {"energy": (count,), "positions": (count, atoms, 3), "forces": (count, atoms, 3)}
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            return f"{key} has the shape {arrays[key].shape}, not {shape}"
        if arrays[key].dtype.kind not in "fiu" or not np.isfinite(arrays[key]).all():
            return f"{key} has values that are not finite real numbers"
    if not numbers.size or numbers.min() < 0 or numbers.max() > _MOST_PROTONS:
        return "numbers are not atomic numbers"
    if not count or molecule.min() < 0 or molecule.max() >= len(numbers):
        return f"molecule has other indices than 0 to {len(numbers) - 1}, the rows of numbers"
    for_training = molecule < train_molecules
    train_count = int(for_training.sum())
    if not 0 < train_count < count:
        return f"{train_count} of its {count} frames are of molecules below train_molecules"
    if not for_training[:train_count].all():
        return "a frame of a molecule for testing comes before one of a molecule for training"
    return ""


def train_batch(
    frames: MoleculeFrames, shape: SchnetSize, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch with the keys of `pack`.

    A sample contains as many molecules as fit into ``shape.atoms``, each with room for the largest. They lie
    on a grid that keeps them farther apart than the cutoff, because their energies and forces were computed
    one by one.
    """
    molecules_per_sample = shape.atoms // frames.species.shape[1]
    indices = epoch_indices(frames.train_count, batch_size * molecules_per_sample, step=step, seed=seed)
    return pack(frames, indices.reshape(batch_size, molecules_per_sample), shape)


def pack(frames: MoleculeFrames, picked: Array, shape: SchnetSize) -> dict[str, torch.Tensor]:
    """Return a batch of the frames with the indices ``picked`` (batch, molecules per sample).

    ``species`` (batch, atoms) int64: atomic numbers, 0 at padding. ``positions`` (angstrom) and ``forces``
    (eV/angstrom) (batch, atoms, 3) float32. ``energy`` (batch,) float32: eV, summed over a sample's
    molecules. ``near`` (batch, atoms, neighbours) int64 and ``within`` (batch, atoms, neighbours) bool: as
    `neighbours` returns them.
    """
    batch, molecules_per_sample = picked.shape
    cells = np.array(np.unravel_index(np.arange(molecules_per_sample), (molecules_per_sample, 3, 3)))[::-1].T
    offsets = cells * np.float32(np.ceil(np.ptp(frames.positions, axis=(0, 1)).max() + shape.cutoff))
    padding = ((0, 0), (0, shape.atoms - molecules_per_sample * frames.species.shape[1]))
    species = np.pad(frames.species[picked].reshape(batch, -1), padding).astype(np.int64)
    positions = np.pad(
        (frames.positions[picked] + offsets[:, None]).reshape(batch, -1, 3).astype(np.float32),
        (*padding, (0, 0)),
    )
    forces = np.pad(frames.forces[picked].reshape(batch, -1, 3), (*padding, (0, 0)))
    near, within = neighbours(species, positions, shape)
    energy = frames.energy[picked].sum(1)
    return as_tensors(
        {
            "species": species,
            "positions": positions,
            "near": near,
            "within": within,
            "energy": energy,
            "forces": forces,
        }
    )


def neighbours(species: Array, positions: Array, shape: SchnetSize) -> tuple[Array, Array]:
    """Return two arrays (batch, atoms, ``shape.neighbours``): the indices of each atom's nearest other atoms
    in the sample, int64, the nearest first; and whether each is closer than ``shape.cutoff``, bool. The
    latter is False where either atom is padding; the index then means nothing. ``species`` (batch, atoms):
    atomic numbers, 0 at padding; ``positions`` (batch, atoms, 3): in angstrom."""
    near = np.empty((*species.shape, shape.neighbours), np.int64)
    within = np.empty(near.shape, bool)
    for sample, (elements, coordinates) in enumerate(zip(species, positions, strict=True)):
        distances = np.linalg.norm(coordinates[:, None] - coordinates, axis=-1)
        distances[:, elements == 0] = distances[elements == 0] = np.inf
        np.fill_diagonal(distances, np.inf)
        near[sample] = np.argsort(distances, axis=1, kind="stable")[:, : shape.neighbours]
        within[sample] = np.take_along_axis(distances, near[sample], 1) < shape.cutoff
    return near, within


def _answer(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    energy, forces = model(batch["species"], batch["positions"], batch["near"], batch["within"])
    return energy.float(), forces.float()


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean over samples of: the mean squared error of force components in (eV/angstrom)^2, plus
    0.05 times the square of the error of the energy per atom in eV. Padding does not count."""
    energy, forces = _answer(model, batch)
    atoms = (batch["species"] > 0).sum(1)
    force_term = (forces - batch["forces"]).square().sum((1, 2)) / (3 * atoms)
    energy_term = ((energy - batch["energy"]) / atoms).square()
    total: torch.Tensor = (force_term + _ENERGY_WEIGHT * energy_term).mean()
    return total


def _test(frames: MoleculeFrames) -> Array:
    return np.arange(frames.train_count, len(frames.energy))


def force_error(model: torch.nn.Module, frames: MoleculeFrames, shape: SchnetSize, batch_size: int) -> float:
    """Return the mean absolute error of force components over the atoms of the test frames, in meV/angstrom.
    If a sample holds several molecules, the last test frames, which are too few to fill one, are left out."""
    total = count = 0.0
    molecules_per_sample = shape.atoms // frames.species.shape[1]
    test = _test(frames)
    test = test[: len(test) // molecules_per_sample * molecules_per_sample].reshape(-1, molecules_per_sample)
    with evaluating(model) as device:
        for indices in equal_parts(test, batch_size):
            part = to_device(pack(frames, indices, shape), device)
            errors = (_answer(model, part)[1] - part["forces"]).abs() * (part["species"] > 0)[..., None]
            total += float(errors.sum())
            count += 3 * float((part["species"] > 0).sum())
    return 1000 * total / count


def pair_forces(frames: MoleculeFrames, picked: Array) -> Array:
    """Return the basis of a pair potential for the frames ``picked``: the force components that each of its
    terms alone would cause, float32 (frames x atoms x 3, terms).

    A term is a force along the line between two atoms of one pair of elements (in either order), whose
    strength is a triangle over distance: highest at the term's distance, zero from 0.25 angstrom on either
    side. These distances are 0.75, 1, 1.25, ... 4.75 angstrom. From 5 angstrom on, all forces are zero.
    """
    width, cutoff = 0.25, 5.0
    species, positions = frames.species[picked].astype(np.int64), frames.positions[picked]
    displacement = positions[:, None] - positions[:, :, None]
    distance = np.linalg.norm(displacement, axis=-1) + 1e-9
    kinds = np.unique(frames.species[frames.species > 0])
    lookup = np.zeros(256, np.int64)
    lookup[kinds] = np.arange(len(kinds))
    first_kind, second_kind = lookup[species[:, :, None]], lookup[species[:, None]]
    pair = np.maximum(first_kind, second_kind) * len(kinds) + np.minimum(first_kind, second_kind)
    pairs = [i * len(kinds) + j for i in range(len(kinds)) for j in range(i + 1)]
    pair_mask = (species[:, :, None] > 0) & (species[:, None] > 0) & (distance > 1e-6) & (distance < cutoff)
    bins = np.arange(0.75, cutoff, width)
    terms = np.empty((*species.shape, 3, len(pairs), len(bins)), np.float32)
    for bin_index, centre in enumerate(bins):
        weight = np.maximum(0, 1 - np.abs(distance - centre) / width) * pair_mask / distance
        for index, kind in enumerate(pairs):
            terms[..., index, bin_index] = ((weight * (pair == kind))[..., None] * displacement).sum(2)
    return terms.reshape(-1, len(pairs) * len(bins))


def metric(frames: MoleculeFrames) -> Metric:
    """Return the metric, the mean absolute error of force components in meV/angstrom; lower is better. Its
    naive result is that of a pair potential fitted by least squares to at most 400 training frames, evenly
    spread over all."""
    train = np.linspace(0, frames.train_count - 1, min(_FITTED, frames.train_count)).astype(np.int64)
    terms, target_forces = pair_forces(frames, train), frames.forces[train].ravel()
    ridge = 1e-3 * np.eye(terms.shape[1], dtype=np.float32)
    weights = np.linalg.solve(terms.T @ terms + ridge, terms.T @ target_forces)
    error_sum = force_sum = 0.0
    for indices in np.array_split(_test(frames), 8):
        atom_mask = np.repeat(frames.species[indices].ravel() > 0, 3)
        target = frames.forces[indices].ravel()[atom_mask]
        error_sum += float(np.abs((pair_forces(frames, indices) @ weights)[atom_mask] - target).sum())
        force_sum += float(np.abs(target).sum())
    count = 3 * int((frames.species[_test(frames)] > 0).sum())
    return Metric(
        name="force error",
        unit="meV/angstrom",
        higher_is_better=False,
        margin=21.7,
        margin_source=(
            "1 kcal/mol/angstrom (43.4 meV/angstrom) is the accuracy that the field calls chemical (Schuett "
            "et al. 2018, J. Chem. Phys. 148:241722): half of that is no difference"
        ),
        naive=1000 * error_sum / count,
        naive_name=(
            f"a pair potential fitted by least squares (no force at all: {1000 * force_sum / count:.0f})"
        ),
    )
