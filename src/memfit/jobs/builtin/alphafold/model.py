"""The whole network of AlphaFold 2: embedders, recycling, stacks of blocks, heads (supplementary algorithms 2
to 5 and 29 to 32)."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import nn

from memfit.jobs.builtin.alphafold.evoformer import (
    EvoformerBlock,
    Templates,
    Widths,
    one_hot_distances,
    relative_positions,
)
from memfit.jobs.builtin.alphafold.structure import StructureModule, StructureWidths
from memfit.techniques.axial import Axial

TARGET, MSA, EXTRA, TEMPLATE = 22, 49, 25, 88  # features of a residue, a row's residue, an extra one, a pair
RESIDUE_CLASSES: Final = 23  # 20 amino acids, unknown, gap, mask
DISTANCE_BINS: Final = 64  # from 2.3125 to 21.6875 Angstrom, the last without end
CONFIDENCE_BINS: Final = 50
_REACH: Final = 32
# CB of an ideal residue in the frame of algorithm 21 (C on x, N in the xy plane), Angstrom.
_BETA: Final = (-0.529, -0.774, -1.205)
_RECYCLED: Final = (3.375, 21.375, 15)  # Angstrom, Angstrom, bins


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FoldSize:
    """Size of an AlphaFold 2. ``widths``, ``extra``, ``template``, ``structure``: channels and heads of the
    Evoformer, the extra-MSA stack, the template stack and the structure module. ``blocks``, ``extra_blocks``,
    ``template_blocks``: numbers of blocks of the first three. ``templates``: number of templates, 0 for none.
    ``rows``, ``extra_rows``: rows of the MSA and of the extra MSA. ``residues``: residues to which a chain is
    cropped. ``recycles``: passes without gradients before the pass that is learned from (the paper draws 0 to
    3 of them; more than one need no more memory than one). ``batch_size``: chains of a step."""

    widths: Widths
    extra: Widths
    template: Widths
    structure: StructureWidths
    blocks: int
    extra_blocks: int
    template_blocks: int
    templates: int
    rows: int
    extra_rows: int
    residues: int
    recycles: int
    batch_size: int


def published_size(*, residues: int, rows: int, extra_rows: int, batch_size: int) -> FoldSize:
    """Return the size of the published network (model_1 in table 5 of AlphaFold 2's supplement, which has
    four templates) for the given numbers of residues, rows and chains."""
    return FoldSize(
        widths=Widths(c_m=256, c_z=128, msa_heads=8, msa_head_width=32),
        extra=Widths(c_m=64, c_z=128, msa_heads=8, msa_head_width=8, global_columns=True),
        template=Widths(
            c_m=64, c_z=64, msa_heads=4, msa_head_width=16, pair_head_width=16, triangle=64, transition=2
        ),
        structure=StructureWidths(c_s=384, c_z=128),
        blocks=48,
        extra_blocks=4,
        template_blocks=2,
        templates=4,
        rows=rows,
        extra_rows=extra_rows,
        residues=residues,
        recycles=1,
        batch_size=batch_size,
    )


def small_size(*, residues: int, batch_size: int) -> FoldSize:
    """Return the size of a network of 0.23 million parameters (the published one has 93 million): 16 rows,
    112 extra rows, and all parts but the templates, for which the built-in data has no structures. Its
    structure module has no dropout, which slows its learning more than it helps in short trainings."""
    shared: dict[str, Any] = {
        "c_z": 32,
        "pair_heads": 2,
        "pair_head_width": 16,
        "triangle": 32,
        "outer": 8,
        "transition": 2,
    }
    return FoldSize(
        widths=Widths(c_m=48, msa_heads=4, msa_head_width=12, **shared),
        extra=Widths(c_m=16, msa_heads=2, msa_head_width=8, global_columns=True, **shared),
        template=Widths(c_m=16, msa_heads=4, msa_head_width=4, **shared),
        structure=StructureWidths(
            c_s=48, c_z=32, heads=4, head_width=12, value_points=4, iterations=4, angle_width=32, dropout=0.0
        ),
        blocks=2,
        extra_blocks=1,
        template_blocks=1,
        templates=0,
        rows=16,
        extra_rows=112,
        residues=residues,
        recycles=1,
        batch_size=batch_size,
    )


class InputEmbedder(Axial):
    """Algorithms 3 and 4 of AlphaFold 2: returns the first MSA representation (batch, rows, residues, c_m)
    and the first pair representation (batch, residues, residues, c_z) from the batch's ``target``, ``msa``
    and ``index``. If ranks share a sample, the pair representation is this rank's slice of dimension 1; the
    MSA is whole."""

    def __init__(self, size: FoldSize) -> None:
        super().__init__()
        c_m, c_z = size.widths.c_m, size.widths.c_z
        self.left, self.right = nn.Linear(TARGET, c_z), nn.Linear(TARGET, c_z)
        self.target, self.msa = nn.Linear(TARGET, c_m), nn.Linear(MSA, c_m)
        self.position = nn.Linear(2 * _REACH + 1, c_z)

    def forward(
        self, target: torch.Tensor, msa: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.left(self.across.own(target, 1)).unsqueeze(2) + self.right(target).unsqueeze(1)
        own_index = self.across.own(index, 1)
        z = z + self.position(relative_positions(own_index, index, _REACH).to(target.dtype))
        return self.msa(msa) + self.target(target).unsqueeze(1), z


class RecyclingEmbedder(Axial):
    """Algorithm 32 of AlphaFold 2: returns (update of the MSA's first row, update of the pair representation)
    from the previous pass: from the MSA's first row ``first`` (batch, residues, c_m), the pair representation
    ``z``, and the CB positions ``beta`` (batch, residues, 3) in Angstrom. If ranks share a sample, ``z`` and
    its update are this rank's slice of dimension 1."""

    def __init__(self, size: FoldSize) -> None:
        super().__init__()
        self.norm_m, self.norm_z = nn.LayerNorm(size.widths.c_m), nn.LayerNorm(size.widths.c_z)
        self.distance = nn.Linear(_RECYCLED[2], size.widths.c_z)

    def forward(
        self, first: torch.Tensor, z: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        squared = (beta.unsqueeze(1) - self.across.own(beta, 1).unsqueeze(2)).square().sum(-1)
        return self.norm_m(first), self.norm_z(z) + self.distance(one_hot_distances(squared, *_RECYCLED))


class Confidence(nn.Module):
    """Algorithm 29 of AlphaFold 2: maps the single representation (batch, residues, c_s) to logits (batch,
    residues, 50) of each residue's lDDT, in 50 equal bins from 0 to 1."""

    def __init__(self, c_s: int) -> None:
        super().__init__()
        hidden_width = min(128, c_s)
        self.layers = nn.Sequential(
            nn.LayerNorm(c_s),
            nn.Linear(c_s, hidden_width),
            nn.ReLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.ReLU(),
            nn.Linear(hidden_width, CONFIDENCE_BINS),
        )

    def forward(self, single: torch.Tensor) -> torch.Tensor:
        return self.layers(single)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Returns three logits: of the bin of each distance between CB atoms (batch, residues, residues, 64),
    from the pair representation z; of the masked residues of the MSA (batch, rows, residues, 23), from the
    MSA representation m; and of each residue's lDDT (batch, residues, 50), from the single representation."""

    def __init__(self, size: FoldSize) -> None:
        super().__init__()
        self.distance = nn.Linear(size.widths.c_z, DISTANCE_BINS)
        self.residue = nn.Linear(size.widths.c_m, RESIDUE_CLASSES)
        self.confidence = Confidence(size.structure.c_s)

    def forward(
        self, m: torch.Tensor, z: torch.Tensor, single: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        half_logits = self.distance(z)
        return half_logits + half_logits.transpose(1, 2), self.residue(m), self.confidence(single)


class AlphaFold(Axial):
    """AlphaFold 2. ``forward(batch)`` takes a batch of the job alphafold2 and returns a mapping of tensors:
    the heads' logits "distance", "residue" and "confidence"; "rotations", "translations" (Angstrom) and
    "angles" of each iteration of the structure module; and what the next pass gets, "first" (the MSA's first
    row), "pairs" (the pair representation) and "beta" (CB positions, Angstrom). If ranks share a sample,
    "pairs" is this rank's slice of dimension 1; all others are whole."""

    def __init__(self, size: FoldSize) -> None:
        super().__init__()
        self.size = size
        self.embed, self.recycle = InputEmbedder(size), RecyclingEmbedder(size)
        self.template = (
            Templates(size.template, TEMPLATE, size.widths.c_z, size.template_blocks, 16)
            if size.templates
            else None
        )
        self.embed_extra = nn.Linear(EXTRA, size.extra.c_m)
        self.extra = nn.ModuleList(EvoformerBlock(size.extra) for _ in range(size.extra_blocks))
        self.blocks = nn.ModuleList(EvoformerBlock(size.widths) for _ in range(size.blocks))
        self.single = nn.Linear(size.widths.c_m, size.structure.c_s)
        self.structure, self.heads = StructureModule(size.structure), Heads(size)
        self.apply(_initialize)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        features = dict(batch)
        count, length = features["target"].shape[:2]
        target, widths = features["target"], self.size.widths
        first_row, z = (
            target.new_zeros(count, length, widths.c_m),
            target.new_zeros(count, self.across.size(length), length, widths.c_z),
        )
        beta = target.new_zeros(count, length, 3)
        with torch.no_grad():
            for _ in range(self.size.recycles):
                out = self._pass(features, first_row, z, beta)
                first_row, z, beta = out["first"], out["pairs"], out["beta"]
                del out
        # Casts of weights that autocast made without gradients must not serve the pass that has them.
        torch.clear_autocast_cache()
        return self._pass(features, first_row, z, beta)

    def _pass(
        self, features: dict[str, torch.Tensor], first_row: torch.Tensor, z: torch.Tensor, beta: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        mask = features["mask"]
        pairs = mask.unsqueeze(1) * mask.unsqueeze(2)
        m, input_pairs = self.embed(features["target"], features["msa"], features["index"])
        # Masks in a wider dtype would widen what they mask.
        pairs, row_mask = pairs.to(m.dtype), mask.to(m.dtype).unsqueeze(1)
        first_row, recycled_pairs = self.recycle(first_row, z, beta)
        m, z = torch.cat([(m[:, 0] + first_row).unsqueeze(1), m[:, 1:]], dim=1), input_pairs + recycled_pairs
        del input_pairs, recycled_pairs
        rows, m = row_mask.expand(m.shape[:3]), self.across.own(m, 1)
        if self.template is not None:
            z = z + self.template(z, pairs, features["template"], features["template_mask"])
        extra_rows = row_mask.expand(features["extra"].shape[:3])
        extra = self.embed_extra(self.across.own(features["extra"], 1))
        for block in self.extra:
            extra, z = block(extra, z, extra_rows, pairs)
        del extra
        for block in self.blocks:
            m, z = block(m, z, rows, pairs)
        sharded_pairs = z
        m, z = self.across.whole(m, 1, rows.shape[1]), self.across.whole(z, 1, rows.shape[2])
        single, rotations, translations, angles = self.structure(self.single(m[:, 0]), z, mask)
        distance, residue, confidence = self.heads(m, z, single)
        return {
            "first": m[:, 0],
            "pairs": sharded_pairs,
            "distance": distance,
            "residue": residue,
            "confidence": confidence,
            "rotations": rotations,
            "translations": translations,
            "angles": angles,
            "beta": translations[-1] + (rotations[-1] @ rotations.new_tensor(_BETA)),
        }


def _initialize(module: nn.Module) -> None:
    """Initialize the linear layers that are direct children of ``module`` (after supplement 1.11.4 of
    AlphaFold 2): weights normal with a variance of one over the number of inputs, biases zero. Gates get zero
    weights and biases of one. A layer whose output is added to a residual, the distance head and the
    structure module's frame update get zero weights and biases."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=child.in_features**-0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
            if name == "gate":
                nn.init.zeros_(child.weight)
                nn.init.ones_(child.bias)
    residual = {
        "Attention": "out",
        "GlobalAttention": "out",
        "Transition": "down",
        "OuterProduct": "out",
        "TriangleMultiplication": "out",
        "Templates": "out",
        "InvariantPointAttention": "out",
        "StructureModule": "update",
        "Heads": "distance",
    }.get(type(module).__name__)
    if residual is not None:
        nn.init.zeros_(getattr(module, residual).weight)
        nn.init.zeros_(getattr(module, residual).bias)


def distance_edges(device: torch.device | None = None) -> torch.Tensor:
    """Return the 63 bounds between the 64 bins of distance: evenly spaced from 2.3125 to 21.6875 Angstrom."""
    return torch.linspace(2.3125, 21.6875, DISTANCE_BINS - 1, device=device)


def distance_bins(beta: torch.Tensor) -> torch.Tensor:
    """Return the number, 0 to 63, of the bin of each distance between the CB positions ``beta`` (batch,
    residues, 3) in Angstrom, as int64 (batch, residues, residues). Distances up to the first bound of
    `distance_edges` are in bin 0, those above the last in bin 63."""
    edges = distance_edges(beta.device) ** 2
    squared = (beta.unsqueeze(1) - beta.unsqueeze(2)).square().sum(-1)
    return torch.bucketize(squared, edges)


def beta_of(atoms: torch.Tensor) -> torch.Tensor:
    """Return the positions (..., 3) that CB would have by the ideal tetrahedron, for backbones ``atoms``
    (..., 3 of N CA C, 3)."""
    n, ca, c = atoms.unbind(-2)
    b, d = ca - n, c - ca
    return -0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d + ca  # type: ignore[no-any-return]
