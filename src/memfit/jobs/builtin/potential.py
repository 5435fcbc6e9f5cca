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
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import EVALUATED_AT_ONCE, as_tensors, epoch_indices, evaluating
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.schnet import SchnetSize

    Array = np.ndarray[Any, Any]

NAME: Final = "potential"
TITLE: Final = "Interatomic potential: forces as gradients of energy (SchNet)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "molecules of hydrogen, carbon, nitrogen and oxygen moving at 500 K, computed with GFN2-xTB for memfit; "
    "the test molecules are not among those for training"
)
_KEYS: Final = ("numbers", "molecule", "energy", "positions", "forces", "train_molecules")
_ENERGY_WEIGHT: Final = 0.05  # weight of squared eV per atom, relative to squared eV/angstrom
_APART: Final = 5.0  # distance in angstrom between molecules that share a sample
_FITTED: Final = 400  # number of frames to which the naive pair potential is fitted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoleculeFrames:
    """Frames of moving molecules.

    ``species`` (frames, atoms) uint8, 0 at padding. ``positions`` (angstrom) and ``forces`` (eV/angstrom)
    (frames, atoms, 3) float32. ``energy`` (frames,) in eV, minus the contributions of the elements.
    """

    species: Array
    positions: Array
    forces: Array
    energy: Array
    train_count: int
    source: str


def make(
    *,
    size: str = "tiny",
    data: str | None = None,
    weights: str | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Job:
    """Return the job at one of SIZES. ``data``: an ``.npz`` file with the same arrays as the built-in one."""
    if length is not None:
        raise UserError(f"{NAME} at length {length}", allowed="no length: molecules are as large as they are")
    frames = read(data)
    shape = _shape(size, frames)
    batch_size = batch or shape.batch_size
    return Job(
        name=NAME,
        title=TITLE,
        size=size,
        steps=200,
        build_model=lambda: _build(shape, weights),
        make_batch=lambda step, seed: train_batch(frames, shape, batch_size, step=step, seed=seed),
        loss=loss,
        evaluate=lambda model: force_error(model, frames, shape, batch_size),
        metric=metric(frames),
        optimizer=OptimizerChoice(learning_rate=3e-3 if size == "tiny" else 1e-4),
        batch_size=batch_size,
        blocks="blocks",
        data_source=frames.source,
        islands=("geometry", "energy"),
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


def _build(shape: SchnetSize, weights: str | None) -> torch.nn.Module:
    from memfit.jobs.builtin.schnet import Schnet
    from memfit.jobs.weights import load_weights

    model = Schnet(shape)
    if weights:
        load_weights(model, weights)
    return model


def read(path: str | None) -> MoleculeFrames:
    """Return the user's frames or the built-in ones.

    A least-squares fit over the training frames gives each element's energy, which is subtracted. Raises
    UserError for a file without the arrays.
    """
    file = Path(path) if path else resources.files("memfit.jobs.builtin") / "data" / "conformers.npz"
    try:
        with resources.as_file(file) as here, np.load(here) as kept:
            found = {key: kept[key] for key in _KEYS}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}", allowed=f"an .npz with {', '.join(_KEYS)}") from error
    train_count = int((found["molecule"] < found["train_molecules"]).sum())
    species = found["numbers"][found["molecule"]]
    counts = (species[:, :, None] == np.unique(species[species > 0])).sum(1).astype(np.float64)
    share = np.linalg.lstsq(counts[:train_count], found["energy"][:train_count], rcond=None)[0]
    return MoleculeFrames(
        species=species,
        positions=found["positions"],
        forces=found["forces"],
        energy=(found["energy"] - counts @ share).astype(np.float32),
        train_count=train_count,
        source=path or DATA_SOURCE,
    )


def train_batch(
    frames: MoleculeFrames, shape: SchnetSize, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a batch as in `packed`.

    A sample with room for more atoms than a molecule has contains several molecules.
    """
    several = shape.atoms // frames.species.shape[1]
    picked = epoch_indices(frames.train_count, batch_size * several, step=step, seed=seed)
    return packed(frames, picked.reshape(batch_size, several), shape)


def packed(frames: MoleculeFrames, picked: Array, shape: SchnetSize) -> dict[str, torch.Tensor]:
    """Return a batch for ``picked`` (batch, molecules per sample).

    ``species`` (batch, atoms) int64; ``positions`` and ``forces`` (batch, atoms, 3) and ``energy`` (batch,)
    float32; the nearest neighbours ``near`` (batch, atoms, neighbours) int64, and ``within``, which is True
    inside the cutoff.
    """
    batch, several = picked.shape
    grid = np.array(np.unravel_index(np.arange(several), (several, 3, 3)))[::-1].T * np.float32(_APART)
    room = ((0, 0), (0, shape.atoms - several * frames.species.shape[1]))
    species = np.pad(frames.species[picked].reshape(batch, -1), room).astype(np.int64)
    positions = np.pad(
        (frames.positions[picked] + grid[:, None]).reshape(batch, -1, 3).astype(np.float32), (*room, (0, 0))
    )
    forces = np.pad(frames.forces[picked].reshape(batch, -1, 3), (*room, (0, 0)))
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
    """Return (numbers of the nearest atoms (batch, atoms, neighbours) int64, whether each lies within the
    cutoff).
    """
    near = np.empty((*species.shape, shape.neighbours), np.int64)
    within = np.empty(near.shape, bool)
    for sample, (kinds, places) in enumerate(zip(species, positions, strict=True)):
        apart = np.linalg.norm(places[:, None] - places, axis=-1)
        apart[:, kinds == 0] = apart[kinds == 0] = np.inf
        np.fill_diagonal(apart, np.inf)
        near[sample] = np.argsort(apart, axis=1, kind="stable")[:, : shape.neighbours]
        within[sample] = np.take_along_axis(apart, near[sample], 1) < shape.cutoff
    return near, within


def _answer(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    energy, forces = model(batch["species"], batch["positions"], batch["near"], batch["within"])
    return energy.float(), forces.float()


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean over samples of the squared force error and a share of the squared energy error.

    The force error is in eV/angstrom per component, the energy error in eV per atom.
    """
    energy, forces = _answer(model, batch)
    atoms = (batch["species"] > 0).sum(1)
    pull = (forces - batch["forces"]).square().sum((1, 2)) / (3 * atoms)
    height = ((energy - batch["energy"]) / atoms).square()
    total: torch.Tensor = (pull + _ENERGY_WEIGHT * height).mean()
    return total


def _test(frames: MoleculeFrames) -> Array:
    return np.arange(frames.train_count, len(frames.energy))


def force_error(model: torch.nn.Module, frames: MoleculeFrames, shape: SchnetSize, batch_size: int) -> float:
    """Return the mean absolute error of force components over the atoms of the test frames, in
    meV/angstrom.
    """
    total = count = 0.0
    several = shape.atoms // frames.species.shape[1]
    test = _test(frames)
    test = test[: len(test) // several * several].reshape(-1, several)
    with evaluating(model) as device:
        few = min(batch_size, EVALUATED_AT_ONCE)
        for picked in np.array_split(test, -(-len(test) // few)):
            batch = packed(frames, picked, shape)
            part = {name: tensor.to(device) for name, tensor in batch.items()}
            wrong = (_answer(model, part)[1] - part["forces"]).abs() * (part["species"] > 0)[..., None]
            total += float(wrong.sum())
            count += 3 * float((part["species"] > 0).sum())
    return 1000 * total / count


def pair_forces(frames: MoleculeFrames, picked: Array, width: float = 0.25, cutoff: float = 5.0) -> Array:
    """Return the basis of a pair potential: force components (frames x atoms x 3, terms).

    Each pair of elements exerts a force along the line between its atoms, in bins of distance smoothed into
    triangles.
    """
    species, places = frames.species[picked].astype(np.int64), frames.positions[picked]
    apart = places[:, None] - places[:, :, None]
    distance = np.linalg.norm(apart, axis=-1) + 1e-9
    kinds = np.unique(frames.species[frames.species > 0])
    lookup = np.zeros(256, np.int64)
    lookup[kinds] = np.arange(len(kinds))
    one, other = lookup[species[:, :, None]], lookup[species[:, None]]
    pair = np.maximum(one, other) * len(kinds) + np.minimum(one, other)
    pairs = [i * len(kinds) + j for i in range(len(kinds)) for j in range(i + 1)]
    counts = (species[:, :, None] > 0) & (species[:, None] > 0) & (distance > 1e-6) & (distance < cutoff)
    bins = np.arange(0.75, cutoff, width)
    terms = np.empty((*species.shape, 3, len(pairs), len(bins)), np.float32)
    for place, middle in enumerate(bins):
        weight = np.maximum(0, 1 - np.abs(distance - middle) / width) * counts / distance
        for index, kind in enumerate(pairs):
            terms[..., index, place] = ((weight * (pair == kind))[..., None] * apart).sum(2)
    return terms.reshape(-1, len(pairs) * len(bins))


def metric(frames: MoleculeFrames) -> Metric:
    """Return the force error. The naive result is a pair potential fitted by least squares."""
    train = np.linspace(0, frames.train_count - 1, min(_FITTED, frames.train_count)).astype(np.int64)
    terms, asked = pair_forces(frames, train), frames.forces[train].ravel()
    ridge = 1e-3 * np.eye(terms.shape[1], dtype=np.float32)
    weights = np.linalg.solve(terms.T @ terms + ridge, terms.T @ asked)
    wrong = pulls = 0.0
    for part in np.array_split(_test(frames), 8):
        there = np.repeat(frames.species[part].ravel() > 0, 3)
        true = frames.forces[part].ravel()[there]
        wrong += float(np.abs((pair_forces(frames, part) @ weights)[there] - true).sum())
        pulls += float(np.abs(true).sum())
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
        naive=1000 * wrong / count,
        naive_name=(
            f"a pair potential fitted by least squares (no force at all: {1000 * pulls / count:.0f})"
        ),
    )
