"""SchNet (Schütt et al. 2018, J. Chem. Phys. 148:241722): a message-passing potential. Its forces are the
gradient of its energy, so training differentiates twice.

Neighbours are a tensor ``(batch, atoms, neighbours)`` with a mask, so no shape depends on the positions of
atoms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchnetSize:
    """Size of a SchNet.

    ``layers``: number of interactions. ``width``: channels of an atom. ``filters``: channels of a message.
    ``radial``: number of Gaussians that represent a distance. ``cutoff``: distance in angstrom from which on
    atoms do not interact. ``species``: number of element embeddings; atomic numbers must be lower. ``atoms``:
    atoms of a sample, padding included. ``neighbours``: neighbours of an atom, unused places included.
    ``batch_size``: samples of a step.
    """

    layers: int
    width: int
    filters: int
    radial: int
    cutoff: float
    species: int
    atoms: int
    neighbours: int
    batch_size: int


# SchNet of Open Catalyst 2020 (Chanussot et al. 2021, ACS Catal. 11:6059): 9.1 M parameters; structures have
# up to 225 atoms, each with 50 neighbours within 6 angstrom.
OPEN_CATALYST: Final = SchnetSize(
    layers=5,
    width=1024,
    filters=256,
    radial=200,
    cutoff=6.0,
    species=100,
    atoms=225,
    neighbours=50,
    batch_size=20,
)


def shifted_softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(x)) - log(2), which is zero at zero. Its derivatives are continuous, as forces
    require."""
    return functional.softplus(x) - math.log(2)


def gather_neighbours(x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``x`` (batch, atoms, width) at the indices ``near`` (batch, atoms, neighbours),
    which number the atoms of each sample from 0, as (batch, atoms, neighbours, width)."""
    batch, atoms, _ = near.shape
    start = torch.arange(batch, device=near.device)[:, None, None] * atoms
    return functional.embedding(near + start, x.flatten(0, 1))


class Geometry(nn.Module):
    """Represents the distance of each atom to each of its neighbours by ``size.radial`` Gaussians and a
    weight, from which the filters of messages are computed."""

    def __init__(self, size: SchnetSize) -> None:
        super().__init__()
        self.cutoff = size.cutoff
        self.centres: torch.Tensor
        self.register_buffer("centres", torch.linspace(0, size.cutoff, size.radial))
        self.sharpness = 0.5 * ((size.radial - 1) / size.cutoff) ** 2

    def forward(
        self, positions: torch.Tensor, near: torch.Tensor, within: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Gaussians, weight) of the distances between the atoms at ``positions`` (batch, atoms, 3)
        and their neighbours, whose indices are ``near`` (batch, atoms, neighbours).

        The Gaussians have the shape (batch, atoms, neighbours, radial), with centres evenly spaced from 0 to
        the cutoff. The weight (batch, atoms, neighbours, 1) falls from 1 at distance zero to 0 at the cutoff;
        it is 0 beyond, and where ``within`` (batch, atoms, neighbours) is False.
        """
        displacement = gather_neighbours(positions, near) - positions[:, :, None]
        # sets these distances to one, because the square root has no derivative at zero
        padding = (~within).to(displacement.dtype)
        distance = (displacement.square().sum(-1) + padding).sqrt()[..., None]
        in_range = (distance < self.cutoff) & within[..., None]
        weight = 0.5 * (torch.cos(distance * (math.pi / self.cutoff)) + 1) * in_range
        return torch.exp(-self.sharpness * (distance - self.centres).square()), weight


class SchnetInteraction(nn.Module):
    """Adds to the channels of each atom the messages of its neighbours, which are multiplied by filters
    computed from the distances."""

    def __init__(self, size: SchnetSize) -> None:
        super().__init__()
        self.filter_one = nn.Linear(size.radial, size.filters)
        self.filter_two = nn.Linear(size.filters, size.filters)
        self.heard = nn.Linear(size.width, size.filters, bias=False)
        self.one = nn.Linear(size.filters, size.width)
        self.two = nn.Linear(size.width, size.width)

    def forward(
        self, x: torch.Tensor, radial: torch.Tensor, weight: torch.Tensor, near: torch.Tensor
    ) -> torch.Tensor:
        """Return ``x``, the channels of the atoms (batch, atoms, width), with the messages of the neighbours
        ``near`` added. ``radial`` and ``weight``: as `Geometry` returns them for these neighbours."""
        filters = self.filter_two(shifted_softplus(self.filter_one(radial))) * weight
        message = (gather_neighbours(self.heard(x), near) * filters).sum(2)
        return x + self.two(shifted_softplus(self.one(message)))  # type: ignore[no-any-return]


class EnergySum(nn.Module):
    """Computes the energy of a sample as a sum of one number per atom. It needs float32, because small
    differences between large sums matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(width, width // 2)
        self.two = nn.Linear(width // 2, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return energies (batch,) in eV for ``x`` (batch, atoms, width). Atoms where ``mask`` (batch,
        atoms) is False (padding) do not count."""
        shares: torch.Tensor = self.two(shifted_softplus(self.one(x)))[..., 0] * mask
        return shares.sum(1)


class Schnet(nn.Module):
    """Maps atomic numbers, positions and lists of neighbours to the energy of each sample in eV, without the
    fitted energies of its elements, and to the forces, which are minus the gradient of this energy."""

    def __init__(self, size: SchnetSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.species, size.width)
        self.geometry = Geometry(size)
        self.blocks = nn.ModuleList([SchnetInteraction(size) for _ in range(size.layers)])
        self.energy = EnergySum(size.width)

    def forward(
        self, species: torch.Tensor, positions: torch.Tensor, near: torch.Tensor, within: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (energy (batch,) in eV, forces (batch, atoms, 3) in eV/angstrom).

        ``species`` (batch, atoms): atomic numbers, 0 at padding. ``positions`` (batch, atoms, 3) are in
        angstrom. ``near`` (batch, atoms, neighbours): indices of neighbours within the sample, which count
        where ``within`` is True. The forces have a graph for backward in training mode only. They are also
        computed if the caller disables gradients.
        """
        with torch.enable_grad():
            leaf_positions = positions.detach().requires_grad_()
            radial, weight = self.geometry(leaf_positions, near, within)
            x = self.embed(species)
            for block in self.blocks:
                x = block(x, radial, weight, near)
            energy = self.energy(x, species > 0)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf_positions, create_graph=self.training)
        return energy, -gradient
