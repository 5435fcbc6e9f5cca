"""The structure module and its losses (Jumper et al. 2021, supplementary algorithms 20 to 24, 26 to 29).

Frames are rotations (..., 3, 3) and translations (..., 3) in Angstrom. The module is a float32 island:
distances are differences of large coordinates, and rotations are multiplied iteration after iteration.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from memfit.jobs.builtin.alphafold.evoformer import MASKED

SCALE: Final = 10.0  # Angstrom of a unit of translation
CLAMP: Final = 10.0  # Angstrom beyond which an aligned error counts no more
CLAMPED_SHARE: Final = 0.9  # of the loss; the rest is unclamped (supplement 1.11.5, there by batch)
_EPS: Final = 1e-4  # Angstrom^2 under a root
CA: Final = 1  # place in (N, CA, C)
# Mean and standard deviation of the bond from C to the next N, Angstrom; of the cosines of CA-C-N and C-N-CA.
_PEPTIDE: Final = (1.329, 0.014)
_PEPTIDE_COSINES: Final = ((-0.4473, 0.0311), (-0.5203, 0.0353))
_TOLERATED: Final = 12  # standard deviations
_RADII: Final = (1.55, 1.7, 1.7)  # van der Waals, of N CA C, Angstrom
_OVERLAP: Final = 1.5  # Angstrom by which radii may overlap


class Frames(NamedTuple):
    rotation: torch.Tensor  # (..., 3, 3)
    translation: torch.Tensor  # (..., 3)

    def apply(self, points: torch.Tensor) -> torch.Tensor:
        """Return the points (..., k, 3), given in the coordinates of each frame, in global coordinates."""
        return points @ self.rotation.transpose(-1, -2) + self.translation.unsqueeze(-2)

    def invert(self, points: torch.Tensor) -> torch.Tensor:
        """Return the points (..., k, 3), given in global coordinates, in the coordinates of each frame."""
        return (points - self.translation.unsqueeze(-2)) @ self.rotation

    def then(self, update: Frames) -> Frames:
        translation = (self.rotation @ update.translation.unsqueeze(-1)).squeeze(-1)
        return Frames(self.rotation @ update.rotation, translation + self.translation)


def frames_of(atoms: torch.Tensor) -> Frames:
    """Return the frames of backbones ``atoms`` (..., 3 of N CA C, 3) by algorithm 21 of AlphaFold 2: CA is
    the origin, C lies on the positive x axis, and N in the xy plane at positive y."""
    n, ca, c = atoms.unbind(-2)
    x = functional.normalize(c - ca, dim=-1, eps=1e-6)
    to_nitrogen = n - ca
    y = functional.normalize(to_nitrogen - (x * to_nitrogen).sum(-1, keepdim=True) * x, dim=-1, eps=1e-6)
    return Frames(torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1), ca)


def rotation_of(vector: torch.Tensor) -> torch.Tensor:
    """Return the rotation matrices (..., 3, 3) of the quaternions (1, b, c, d), each first divided by its
    length (algorithm 23 of AlphaFold 2). ``vector`` (..., 3) is (b, c, d)."""
    b, c, d = vector.unbind(-1)
    a = torch.rsqrt(1 + b * b + c * c + d * d)
    b, c, d = b * a, c * a, d * a
    rows = [
        a * a + b * b - c * c - d * d,
        2 * (b * c - a * d),
        2 * (b * d + a * c),
        2 * (b * c + a * d),
        a * a - b * b + c * c - d * d,
        2 * (c * d - a * b),
        2 * (b * d - a * c),
        2 * (c * d + a * b),
        a * a - b * b - c * c + d * d,
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StructureWidths:
    c_s: int
    c_z: int
    heads: int = 12
    head_width: int = 16
    query_points: int = 4
    value_points: int = 8
    iterations: int = 8
    angles: int = 7
    angle_width: int = 128
    dropout: float = 0.1


class InvariantPointAttention(nn.Module):
    """Algorithm 22 of AlphaFold 2: returns the update of the single representation s (batch, residues, c_s).
    Its attention along residues depends on s, on the pair representation z (batch, residues, residues, c_z),
    and on distances between points that each residue places in its frame. ``rotation`` and ``translation``:
    these frames. ``mask`` (batch, residues) is 0 at padding."""

    def __init__(self, widths: StructureWidths) -> None:
        super().__init__()
        w = self.widths = widths
        heads = w.heads
        self.query, self.key, self.value = (nn.Linear(w.c_s, heads * w.head_width) for _ in range(3))
        self.query_points, self.key_points = (nn.Linear(w.c_s, heads * w.query_points * 3) for _ in range(2))
        self.value_points = nn.Linear(w.c_s, heads * w.value_points * 3)
        self.bias = nn.Linear(w.c_z, heads)
        self.head_weight = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus of it is 1
        self.out = nn.Linear(heads * (w.c_z + w.head_width + w.value_points * 4), w.c_s)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.widths.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def _points(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Return the points x (batch, residues, heads x points x 3), given in the coordinates of each
        residue's frame, in global coordinates: (batch, heads, residues, points, 3)."""
        local = x.unflatten(-1, (-1, 3))
        heads = frames.apply(local).unflatten(-2, (self.widths.heads, -1))
        return heads.transpose(1, 2)  # type: ignore[no-any-return]

    def forward(
        self,
        s: torch.Tensor,
        z: torch.Tensor,
        rotation: torch.Tensor,
        translation: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        w, frames = self.widths, Frames(rotation, translation)
        query, key, value = (self._heads(p(s)) for p in (self.query, self.key, self.value))
        logits = (query @ key.transpose(-1, -2)) * math.sqrt(1 / (3 * w.head_width))
        logits = logits + math.sqrt(1 / 3) * self.bias(z).permute(0, 3, 1, 2)
        query_points, key_points = (self._points(p(s), frames) for p in (self.query_points, self.key_points))
        squared = (query_points.unsqueeze(3) - key_points.unsqueeze(2)).square().sum((-1, -2))
        weight = functional.softplus(self.head_weight) * math.sqrt(1 / (3 * 4.5 * w.query_points))
        logits = logits - 0.5 * weight[:, None, None] * squared
        pair_mask = mask.unsqueeze(1) * mask.unsqueeze(2)
        weights = (logits + ((pair_mask - 1) * -MASKED).unsqueeze(1)).softmax(-1)
        context = (weights @ value).transpose(1, 2).flatten(-2)
        points = torch.einsum("bhij,bhjpx->bihpx", weights, self._points(self.value_points(s), frames))
        points = frames.invert(points.flatten(2, 3))
        length = (points.square().sum(-1) + 1e-8).sqrt()
        pair_context = torch.einsum("bhij,bijc->bihc", weights, z).flatten(-2)
        return self.out(torch.cat([context, points.flatten(-2), length, pair_context], -1))  # type: ignore[no-any-return]


class Angles(nn.Module):
    """Algorithm 20 of AlphaFold 2, lines 11 to 14: returns (sine, cosine) of the torsion angles, (batch,
    residues, angles, 2), not scaled to length one, from the single representation ``s`` and the ``initial``
    one, both (batch, residues, c_s)."""

    def __init__(self, widths: StructureWidths) -> None:
        super().__init__()
        hidden_width = widths.angle_width
        self.first, self.initial = nn.Linear(widths.c_s, hidden_width), nn.Linear(widths.c_s, hidden_width)
        self.residual = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Linear(hidden_width, hidden_width),
                nn.ReLU(),
                nn.Linear(hidden_width, hidden_width),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(hidden_width, 2 * widths.angles)

    def forward(self, s: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        a = self.first(functional.relu(s)) + self.initial(functional.relu(initial))
        for layers in self.residual:
            a = a + layers(a)
        return self.out(functional.relu(a)).unflatten(-1, (-1, 2))  # type: ignore[no-any-return]


class Structure(NamedTuple):
    single: torch.Tensor  # (batch, residues, c_s)
    rotations: torch.Tensor  # (iterations, batch, residues, 3, 3)
    translations: torch.Tensor  # (iterations, batch, residues, 3)
    angles: torch.Tensor  # (iterations, batch, residues, angles, 2)


class StructureModule(nn.Module):
    """AlphaFold 2's structure module (algorithm 20). s (batch, residues, c_s) and z (batch, residues,
    residues, c_z) are the single and the pair representation; ``mask`` (batch, residues) is 0 at padding.
    Returns the last single representation, and the frames (rotations, translations in Angstrom) and torsion
    angles after each iteration. All iterations have the same weights. Inside, positions are in units of 10
    Angstrom, for which the weights of algorithm 22 were made."""

    def __init__(self, widths: StructureWidths) -> None:
        super().__init__()
        c = widths.c_s
        self.iterations = widths.iterations
        self.norm_s, self.norm_z = nn.LayerNorm(c), nn.LayerNorm(widths.c_z)
        self.first = nn.Linear(c, c)
        self.attention = InvariantPointAttention(widths)
        self.norm_attention, self.norm_transition = nn.LayerNorm(c), nn.LayerNorm(c)
        self.transition = nn.Sequential(
            nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c)
        )
        self.dropout, self.update, self.angles = nn.Dropout(widths.dropout), nn.Linear(c, 6), Angles(widths)

    def forward(self, s: torch.Tensor, z: torch.Tensor, mask: torch.Tensor) -> Structure:
        initial = s = self.norm_s(s)
        z, s = self.norm_z(z), self.first(s)
        rotation = torch.eye(3, dtype=s.dtype, device=s.device).expand(*s.shape[:2], 3, 3)
        frames = Frames(rotation, s.new_zeros(*s.shape[:2], 3))
        history: list[tuple[torch.Tensor, ...]] = []
        for index in range(self.iterations):
            s = s + self.attention(s, z, *frames, mask)
            s = self.norm_attention(self.dropout(s))
            s = self.norm_transition(self.dropout(s + self.transition(s)))
            step = self.update(s)
            frames = frames.then(Frames(rotation_of(step[..., :3]), step[..., 3:]))
            history.append((frames.rotation, frames.translation * SCALE, self.angles(s, initial)))
            if index < self.iterations - 1:
                frames = Frames(frames.rotation.detach(), frames.translation)
        rotations, translations, angles = (torch.stack(k) for k in zip(*history, strict=True))
        return Structure(s, rotations, translations, angles)


# -- losses -----------------------------------------------------------------------------------------------


def fape(
    predicted: Frames,
    true: Frames,
    points: torch.Tensor,
    true_points: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the frame-aligned point error of each sample (algorithm 28 of AlphaFold 2), (batch,). It is the
    mean over all pairs of a frame (batch, n) and a point (batch, k, 3) of the distance between the predicted
    one of ``points``, in coordinates of the predicted frame, and that of ``true_points``, in those of the
    true frame, in units of 10 Angstrom. A distance counts for 0.9 clamped at 10 Angstrom and for 0.1
    unclamped. ``masks``: (mask of the frames (batch, n), mask of the points (batch, k)), 0 for those that do
    not count."""
    differences = predicted.invert(points.unsqueeze(1)) - true.invert(true_points.unsqueeze(1))
    error = (differences.square().sum(-1) + _EPS).sqrt()
    error = CLAMPED_SHARE * error.clamp(max=CLAMP) + (1 - CLAMPED_SHARE) * error
    weight = masks[0].unsqueeze(2) * masks[1].unsqueeze(1)
    return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1) / SCALE


def torsion_loss(angles: torch.Tensor, true: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the loss of torsion angles (algorithm 27 of AlphaFold 2), a scalar. ``angles`` and ``true``
    (batch, residues, angles, 2): sines and cosines, the first of any length. An angle contributes its squared
    distance to the truth after scaling to length one, plus 0.02 times the deviation of its length from one.
    This is averaged over the angles where ``mask`` (batch, residues, angles) is 1, then over samples."""
    length = (angles.square().sum(-1) + 1e-8).sqrt()
    deviation = (angles / length.unsqueeze(-1) - true).square().sum(-1)
    count = mask.sum((1, 2)).clamp(min=1)
    return (((deviation + 0.02 * (length - 1).abs()) * mask).sum((-1, -2)) / count).mean(0)


def torsions(atoms: torch.Tensor, follows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sines and cosines (batch, residues, 3 of omega phi psi, 2); mask (batch, residues, 3), 1 where
    the angle exists) of the torsion angles of backbones ``atoms`` (batch, residues, 3 of N CA C, 3).
    ``follows`` (batch, residues) is 1 where a residue continues the chain of the one before, which omega and
    phi need; psi needs that of the next residue."""
    n, ca, c = atoms.unbind(-2)

    def before(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], x[:, :-1]], dim=1)

    omega = _dihedral(before(ca), before(c), n, ca)
    phi = _dihedral(before(c), n, ca, c)
    after = torch.cat([n[:, 1:], n[:, -1:]], dim=1)
    next_mask = torch.cat([follows[:, 1:], torch.zeros_like(follows[:, :1])], dim=1)
    psi = _dihedral(n, ca, c, after)
    return torch.stack([omega, phi, psi], dim=2), torch.stack([follows, follows, next_mask], dim=2)


def _dihedral(*points: torch.Tensor) -> torch.Tensor:
    a, b, c = (points[i + 1] - points[i] for i in range(3))
    first_normal, second_normal = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    sine = (torch.linalg.cross(first_normal, second_normal) * functional.normalize(b, dim=-1, eps=1e-6)).sum(
        -1
    )
    return functional.normalize(
        torch.stack([sine, (first_normal * second_normal).sum(-1)], dim=-1), dim=-1, eps=1e-6
    )


def violations(atoms: torch.Tensor, mask: torch.Tensor, follows: torch.Tensor) -> torch.Tensor:
    """Return the loss of violated geometry of each sample, (batch,), of backbones ``atoms`` (batch, residues,
    3 of N CA C, 3) in Angstrom (equations 44 to 47 of AlphaFold 2's supplement, of backbone atoms only): how
    far peptide bonds and the cosines of their two angles are beyond 12 standard deviations of their ideal,
    averaged over bonds; and how far atoms of different residues are closer than their radii less 1.5
    Angstrom, summed over pairs and divided by the number of atoms. ``mask`` (batch, residues) is 0 at
    padding; ``follows`` (batch, residues) is 1 where a residue continues the chain of the one before."""
    n, ca, c = atoms.unbind(-2)
    bonds = follows[:, 1:]
    peptide = n[:, 1:] - c[:, :-1]
    length = (peptide.square().sum(-1) + _EPS).sqrt()
    towards = functional.normalize(peptide, dim=-1, eps=1e-6)
    cosines = (
        (functional.normalize(ca[:, :-1] - c[:, :-1], dim=-1, eps=1e-6) * towards).sum(-1),
        -(functional.normalize(ca[:, 1:] - n[:, 1:], dim=-1, eps=1e-6) * towards).sum(-1),
    )
    excess = functional.relu((length - _PEPTIDE[0]).abs() - _TOLERATED * _PEPTIDE[1])
    for cosine, (ideal, deviation) in zip(cosines, _PEPTIDE_COSINES, strict=True):
        excess = excess + functional.relu((cosine - ideal).abs() - _TOLERATED * deviation)
    bond_loss = (excess * bonds).sum(-1) / bonds.sum(-1).clamp(min=1)
    points, radii = atoms.flatten(1, 2), atoms.new_tensor(_RADII).repeat(atoms.shape[1])
    residue = torch.arange(atoms.shape[1], device=atoms.device).repeat_interleave(len(_RADII))
    is_bond = (residue[:, None] + 1 == residue) & (radii[:, None] > radii)  # also CA to N: never a clash
    pairs = (residue[:, None] < residue) & ~is_bond
    own = mask.repeat_interleave(len(_RADII), dim=1)
    overlap = functional.relu(radii[:, None] + radii - _OVERLAP - _distances(points))
    counted = own.unsqueeze(1) * own.unsqueeze(2) * pairs
    return bond_loss + (overlap * counted).sum((1, 2)) / own.sum(-1).clamp(min=1)


def lddt(points: torch.Tensor, true: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the lDDT of each residue, (batch, residues), 0 to 1 (Mariani et al. 2013): of its distances to
    others that are truly under 15 Angstrom, the share that the prediction reproduces within 0.5, 1, 2 and 4
    Angstrom, averaged over these four. ``points`` and ``true``: predicted and true CA positions (batch,
    residues, 3) in Angstrom. Only residues where ``mask`` (batch, residues) is 1 count; the lDDT of others,
    and of a residue without such distances, is 0."""
    distances, true_distances = _distances(points), _distances(true)
    count = mask.unsqueeze(1) * mask.unsqueeze(2) * (true_distances < 15.0)
    count = count * (1 - torch.eye(count.shape[1], device=count.device))
    within_limits: Any = (distances - true_distances).abs().unsqueeze(-1) < _tolerances(true_distances)
    return (within_limits.float().mean(-1) * count).sum(-1) / count.sum(-1).clamp(min=1)  # type: ignore[no-any-return]


def _tolerances(like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=like.dtype, device=like.device)


def _distances(x: torch.Tensor) -> torch.Tensor:
    return ((x.unsqueeze(1) - x.unsqueeze(2)).square().sum(-1) + 1e-8).sqrt()
