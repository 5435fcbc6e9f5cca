"""``alphafold2``: protein structure from alignments, AlphaFold 2 written from its paper's algorithms.

Structures and family profiles are real. Alignments are SIMULATED: their rows are sampled from a Potts model
whose fields are the profile and whose couplings lie on the real contacts (``alphafold/coevolution.py``).
Parts without data are left out: side chains (their torsions are not judged), and templates at ``tiny`` (they
are empty at other sizes). Float32 islands: the structure module (distances between coordinates of tens of
Angstrom, chains of frame products), recycled distances, and the heads' logits. In float16, the masks of -1e9
are also infinite.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import threadpoolctl

from memfit.files.replace import write_whole
from memfit.jobs.builtin.alphafold.coevolution import CONTACT_ANGSTROM, contact_map, sample_alignment
from memfit.jobs.builtin.batches import (
    Array,
    as_tensors,
    equal_parts,
    evaluating,
    open_arrays,
    step_rng,
    to_device,
)
from memfit.jobs.builtin.chains import ConcatenatedChains
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.alphafold.model import FoldSize

NAME: Final = "alphafold2"
TITLE: Final = "Protein structure (AlphaFold 2: Evoformer and structure module)"
SIZES: Final = ("tiny", "initial", "finetune", "paper")
DATA_SOURCE: Final = (
    "backbones and family profiles of 1,120 PDB chains split by 30 % identity clusters "
    "(wwPDB, CC0; profiles from ProMod3, Apache-2.0); alignments SIMULATED by a Potts model whose couplings "
    "lie on the real contacts"
)
HIDDEN_SHARE: Final = 0.15  # of the alignment's residues (supplement 1.2.7)
# What stands in a hidden residue's place: a random amino acid, one of the profile, itself, else the mask.
_REPLACED_BY: Final = {"uniform": 0.1, "profile": 0.1, "same": 0.1}
_DIMENSIONS: Final = {
    "length": "residues",
    "crop": "residues",
    "rows": "rows",
    "extra_rows": "extra_rows",
    "layers": "blocks",
}
_MASK_CLASS: Final = 22
APART: Final = 12  # least separation in residues of a medium- or long-range contact
TESTED: Final = 120  # number of chains in the test set
_RELATIVES, _STRENGTH = 128, 4.0  # of simulated alignments: sequences, and strength of the couplings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Folds(ConcatenatedChains):
    """Chains of proteins, one after another, with n residues in all. ``residue`` (n,): numbers of amino
    acids, 20 for an unknown one. ``profile`` (n, 20): shares of the amino acids in the family, from 0 to 1.
    ``atoms`` (n, 3 of N CA C, 3): positions in Angstrom. The first ``train_count`` chains are for training.
    ``alignment_of``: function of a chain's index that returns its simulated relatives, numbers of amino
    acids, uint8 (sequences, residues); None: there are none. ``potential`` (20, 20): logarithm of how much
    more often than by chance two amino acids are in contact in training chains; None: it is not known.
    """

    residue: Array
    profile: Array
    atoms: Array
    alignment_of: Callable[[int], Array] | None = None
    potential: Array | None = None


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES on the built-in chains.

    ``tiny`` is a small network on 64 residues, 16 rows of an MSA and 112 extra rows. ``initial`` training
    (the same as ``paper``) has 256 residues and 128 rows, ``finetune`` 384 residues and 512 rows. ``batch``:
    chains of a step, by default 4 for ``tiny`` and else 1. ``length``: residues to which chains are padded or
    cropped. Raises UserError for any ``data`` or ``weights``, for an unknown dimension, and for fewer than 13
    residues, which have no pair that the metric counts.
    """
    options.refuse(
        "data",
        "weights",
        job=NAME,
        why="it trains from scratch on the chains that come with memfit",
    )
    shape = options.set_dimensions(_shape(options.size, options.length, options.batch), _DIMENSIONS)
    if shape.residues <= APART:
        raise UserError(
            f"{NAME} cannot be trained on crops of {shape.residues} residues (--dim crop)",
            allowed=f"at least {APART + 1} residues: contacts count from {APART} residues apart on",
        )
    folds = built_in_folds()
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: _build(shape),
        make_batch=lambda step, seed: train_batch(folds, shape, step=step, seed=seed),
        loss=fine_tuning_loss if options.size == "finetune" else loss,
        evaluate=lambda model: contact_precision(model, folds, shape),
        metric=metric(folds, shape),
        optimizer=OptimizerChoice(
            name="adam", learning_rate=2e-3 if options.size == "tiny" else 1e-3, eps=1e-6
        ),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS),
        tokens_per_batch=shape.batch_size * shape.residues,
        length_unit="residues",
        steps=60,
        blocks="blocks",
        more_blocks=("extra", "template.blocks") if shape.templates else ("extra",),
        islands=("structure", "recycle", "heads"),
        data_source=DATA_SOURCE,
    )


def _shape(size: str, length: int | None, batch: int | None) -> FoldSize:
    from memfit.jobs.builtin.alphafold.model import published_size, small_size

    if size == "tiny":
        return small_size(residues=length or 64, batch_size=batch or 4)
    crops = (
        {"residues": 384, "rows": 512, "extra_rows": 5120}
        if size == "finetune"
        else {"residues": 256, "rows": 128, "extra_rows": 1024}
    )
    return published_size(**crops | ({"residues": length} if length else {}), batch_size=batch or 1)


def _build(shape: FoldSize) -> torch.nn.Module:
    from memfit.jobs.builtin.alphafold.model import AlphaFold

    return AlphaFold(shape)


def built_in_folds() -> Folds:
    """Return the 1,120 built-in chains of the job ``protein-ss`` that have a simulated alignment (1,000 for
    training), with the positions of their backbone atoms. A residue without a profile gets one that is almost
    only its own amino acid."""
    with open_arrays("pdb_ss") as archive:
        profile, residue = archive["profile"].astype(np.float32), archive["residue"].astype(np.int64)
        length, train_count = archive["length"], int(archive["n_train"])
    with open_arrays("pdb_backbone") as archive:
        chains, potential, corrections = archive["chain"], archive["potential"], archive["correction"]
        atoms = np.cumsum(archive["step"].astype(np.int32), axis=0).reshape(-1, 3, 3)
    has_backbone = np.repeat(np.isin(np.arange(len(length)), chains), length)
    profile, residue = profile[has_backbone], residue[has_backbone]
    one_hot = np.eye(21, dtype=np.float32)[residue][:, :20] + np.float32(1e-3)
    profile = np.where(profile.sum(-1, keepdims=True) > 0, profile, one_hot)
    folds = Folds(
        offset=np.concatenate([[0], np.cumsum(length[chains])]),
        residue=residue,
        profile=profile / profile.sum(-1, keepdims=True),
        atoms=(atoms / 100).astype(np.float32),
        train_count=int((chains < train_count).sum()),
        potential=potential,
    )

    def alignment_of(index: int) -> Array:
        return _cached_alignment(folds, index, chains[index], corrections[corrections[:, 0] == index])

    return dataclasses.replace(folds, alignment_of=alignment_of)


def simulated_alignment(folds: Folds, index: int, seed: int) -> Array:
    """Return 128 simulated relatives of the chain with this index, uint8 (128, residues), which takes about
    0.1 s. ``seed``: of the sampler; that of a built-in chain is its number among the 2,500 of
    ``protein-ss``."""
    assert folds.potential is not None
    span = slice(folds.offset[index], folds.offset[index + 1])
    contacts = contact_map(folds.atoms[span])
    rng = np.random.default_rng((0, int(seed)))
    return sample_alignment(
        folds.profile[span], contacts, folds.potential, rng, rows=_RELATIVES, strength=_STRENGTH
    )


def _cached_alignment(folds: Folds, index: int, seed: int, corrections: Array) -> Array:
    """Return `simulated_alignment` with ``corrections`` (letters, 4), each a chain, a row, a residue and the
    letter there. It is stored in the user's cache folder when it is first made. If nothing can be stored
    there, it is made again each time."""
    import platformdirs

    path = platformdirs.user_cache_path("memfit", appauthor=False) / "alignments-1" / f"{seed}.u8"
    size = _RELATIVES * int(folds.offset[index + 1] - folds.offset[index])
    with contextlib.suppress(OSError):
        if len(data := path.read_bytes()) == size:
            return np.frombuffer(data, np.uint8).reshape(_RELATIVES, -1)
    rows = simulated_alignment(folds, index, seed)
    rows[corrections[:, 1], corrections[:, 2]] = corrections[:, 3]
    with contextlib.suppress(UserError):
        write_whole(path, rows.tobytes(), durable=False, make_folder=True)
    return rows


def train_batch(folds: Folds, shape: FoldSize, *, step: int, seed: int) -> dict[str, torch.Tensor]:
    """Return a training batch with the keys of `pack`, which depends on ``step`` and ``seed`` only.

    Chains longer than ``shape.residues`` are cropped at a random position, shorter ones are padded.
    """
    rng = step_rng(step, seed)
    chains, skipped = folds.draw_crops(shape.residues, shape.batch_size, rng, step=step, seed=seed)
    return pack(folds, chains, skipped, shape, rng)


def pack(
    folds: Folds, picked: Array, skipped: Array, shape: FoldSize, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Return a batch of the chains with the indices ``picked``, each without its first ``skipped`` residues
    (one number per chain) and then cut or padded to n = ``shape.residues``.

    Network inputs: ``target`` (batch, n, 22), one-hot residues; ``msa`` (batch, rows, n, 49), the rows, of
    which some residues are replaced, and the profiles of their clusters; ``extra`` (batch, extra rows, n,
    25); ``index`` (batch, n) int64, places in the crop; ``mask`` (batch, n), 0 at padding. The first row is
    the chain. The others are sequences of the alignment in random order and, if these are too few, rows drawn
    column by column from the profile. Targets: ``atoms`` (batch, n, 3 of N CA C, 3) in Angstrom; ``residue``
    (batch, rows, n) int64, to be predicted where ``hidden`` (batch, rows, n) is 1 (15 % at random, never
    padding). If the size has templates, ``template`` and ``template_mask`` are included and all zero.
    """
    count, length = len(picked), shape.residues
    residue, mask = np.full((count, length), 20), np.zeros((count, length), np.float32)
    profile = np.zeros((count, length, 20), np.float32)
    atoms = np.zeros((count, length, 3, 3), np.float32)
    for row, (span, residues) in enumerate(folds.spans(picked, skipped, length)):
        residue[row, span], mask[row, span] = folds.residue[residues], 1
        profile[row, span], atoms[row, span] = folds.profile[residues], folds.atoms[residues]
    homologs = _homologs(profile, shape.rows + shape.extra_rows - 1, rng)
    if folds.alignment_of is not None:
        order = rng.permutation(_RELATIVES)[: homologs.shape[1]]
        for row, (span, _) in enumerate(folds.spans(picked, skipped, length)):
            relatives = folds.alignment_of(int(picked[row]))[order, skipped[row] :]
            homologs[row, : len(order), span] = relatives[:, :length]
    msa = np.concatenate([residue[:, None], homologs[:, : shape.rows - 1]], axis=1)
    eye = np.eye(23, dtype=np.float32)
    hidden = (rng.random(msa.shape) < HIDDEN_SHARE) * mask[:, None]
    visible = eye[np.where(hidden > 0, _replacements(msa, profile, rng), msa)]
    extra = eye[homologs[:, shape.rows - 1 :]]
    clusters = _cluster_profiles(visible, extra, mask)
    deletions = np.zeros((*msa.shape, 3), np.float32)  # of which simulated alignments have none
    arrays = {
        "target": eye[residue][..., :22],
        "msa": np.concatenate([visible, deletions[..., :2], clusters, deletions[..., 2:]], axis=-1),
        "extra": np.concatenate([extra, np.zeros((*extra.shape[:-1], 2), np.float32)], axis=-1),
        "index": np.broadcast_to(np.arange(length), (count, length)).copy(),
        "mask": mask,
        "atoms": atoms,
        "residue": msa.astype(np.int64),
        "hidden": hidden.astype(np.float32),
    }
    if shape.templates:
        arrays["template"] = np.zeros((count, shape.templates, length, length, 88), np.float32)
        arrays["template_mask"] = np.zeros((count, shape.templates), np.float32)
    return as_tensors(arrays)


def _homologs(profile: Array, rows: int, rng: np.random.Generator) -> Array:
    """Return residue numbers 0 to 19, int64 (batch, rows, n), each drawn independently from the ``profile``
    (batch, n, 20) of its column."""
    cumulative = np.cumsum(profile, axis=-1)
    random_values = rng.random((profile.shape[0], rows, profile.shape[1]), np.float32)
    residues = np.zeros(random_values.shape, np.int64)
    for letter in range(19):
        residues += random_values > cumulative[:, None, :, letter]
    return residues


def _replacements(msa: Array, profile: Array, rng: np.random.Generator) -> Array:
    """Return for every residue of ``msa`` (batch, rows, n) what stands in its place if it is hidden
    (supplement 1.2.7): the mask class in 70 % of the cases, in 10 % each a random amino acid, one drawn from
    the ``profile`` (batch, n, 20), and the residue itself."""
    kind = rng.choice(4, msa.shape, p=(*_REPLACED_BY.values(), 1 - sum(_REPLACED_BY.values())))
    choices = (rng.integers(0, 20, msa.shape), _homologs(profile, msa.shape[1], rng), msa, _MASK_CLASS)
    return np.select([kind == index for index in range(4)], choices)


def _cluster_profiles(visible: Array, extra: Array, mask: Array) -> Array:
    """Return the share of each class, (batch, rows, n, 23), in the clusters of the rows ``visible`` (batch,
    rows, n, 23): a row and the rows of ``extra`` (batch, extra rows, n, 23) that agree with it in more
    residues than with any other row (supplement 1.2.7). ``mask`` (batch, n) is 0 at padding, which does not
    count, and neither does the mask class."""
    profiles = np.empty_like(visible)
    # The products are small: several threads would spend their time waiting for each other.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for row, (rows, others) in enumerate(zip(visible, extra, strict=True)):
            known = (rows[..., :21] * mask[row, :, None]).reshape(len(rows), -1)
            nearest = np.argmax(others[..., :21].reshape(len(others), -1) @ known.T, axis=1)
            members = np.eye(len(rows), dtype=np.float32)[nearest].T  # sums of zeros and ones are exact
            sums = rows + (members @ others.reshape(len(others), -1)).reshape(rows.shape)
            profiles[row] = sums / (1 + members.sum(1))[:, None, None]
    return profiles


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return AlphaFold 2's loss of initial training (equation 7 of its supplement), averaged over the
    samples."""
    return terms(model(batch), batch)["loss"]


def fine_tuning_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return AlphaFold 2's loss of fine-tuning: that of initial training and the loss of violated geometry,
    averaged over the samples. The loss of resolved atoms is left out: in the data all are."""
    return terms(model(batch), batch, fine_tuning=True)["loss"]


def terms(out: Any, batch: Any, *, fine_tuning: bool = False) -> dict[str, torch.Tensor]:
    """Return scalars: the parts of the loss, "fape" (all backbone atoms), "auxiliary" (CA atoms and torsions
    of every iteration), "distance", "residue" and "confidence", each averaged over samples; "loss", the sum
    of these with the weights 0.5, 0.5, 0.3, 2 and 0.01; and "lddt", the mean lDDT (0 to 1) of the predicted
    CA atoms. ``fine_tuning`` adds the part "violation", with the weight 1. ``out``: what the model returns
    for ``batch``, which is read in float32."""
    import torch
    from torch.nn import functional

    from memfit.jobs.builtin.alphafold.model import CONFIDENCE_BINS, beta_of, distance_bins
    from memfit.jobs.builtin.alphafold.structure import (
        Frames,
        fape,
        frames_of,
        lddt,
        torsion_loss,
        torsions,
        violations,
    )

    mask, atoms = batch["mask"], batch["atoms"]
    pairs = mask.unsqueeze(1) * mask.unsqueeze(2)

    def cross_entropy(logits: Any, classes: Any, weight: Any) -> torch.Tensor:
        losses = functional.cross_entropy(logits.float().movedim(-1, 1), classes, reduction="none")
        return ((losses * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)).mean()  # type: ignore[no-any-return]

    true_frames = frames_of(atoms)
    rotations, translations = out["rotations"].float(), out["translations"].float()
    frame_errors = [
        fape(Frames(r, t), true_frames, t, true_frames.translation, (mask, mask))
        for r, t in zip(rotations.unbind(0), translations.unbind(0), strict=True)
    ]
    local_atoms = true_frames.invert(atoms)  # bond lengths and angles are taken from the true structure
    placed_atoms = Frames(rotations[-1], translations[-1]).apply(local_atoms).flatten(1, 2)
    final_error = fape(
        Frames(rotations[-1], translations[-1]),
        true_frames,
        placed_atoms,
        atoms.flatten(1, 2),
        (mask, mask.repeat_interleave(3, dim=1)),
    ).mean()
    chain_mask = mask * functional.pad(mask[:, :-1], (1, 0))
    true_torsions, torsion_mask = torsions(atoms, chain_mask)
    auxiliary = torch.stack(frame_errors).mean() + sum(
        torsion_loss(a[:, :, :3].float(), true_torsions, torsion_mask).mean() for a in out["angles"].unbind(0)
    ) / len(frame_errors)
    with torch.no_grad():
        true_lddt = lddt(translations[-1], true_frames.translation, mask)
        bins = (true_lddt * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
    parts = {
        "fape": final_error,
        "auxiliary": auxiliary,
        "distance": cross_entropy(out["distance"], distance_bins(beta_of(atoms)), pairs),
        "residue": cross_entropy(out["residue"], batch["residue"], batch["hidden"]),
        "confidence": cross_entropy(out["confidence"], bins, mask),
    }
    weights = {"fape": 0.5, "auxiliary": 0.5, "distance": 0.3, "residue": 2.0, "confidence": 0.01}
    if fine_tuning:
        parts["violation"] = violations(placed_atoms.unflatten(1, (-1, 3)), mask, chain_mask).mean()
        weights["violation"] = 1.0
    total = sum(weights[name] * part for name, part in parts.items())
    return {**parts, "loss": torch.as_tensor(total), "lddt": (true_lddt * mask).sum() / mask.sum()}


# -- evaluation -------------------------------------------------------------------------------------------


def test_parts(folds: Folds, shape: FoldSize) -> Any:
    """Yield the first 120 test chains (all, if there are fewer) in batches with the keys of `pack`. Only the
    first ``shape.residues`` residues of a chain count. The batches are the same every time."""
    test = np.arange(folds.train_count, folds.count)[:TESTED]
    for index, chains in enumerate(equal_parts(test, shape.batch_size)):
        yield pack(folds, chains, np.zeros_like(chains), shape, step_rng(index, 0))


def contact_precision(model: torch.nn.Module, folds: Folds, shape: FoldSize) -> float:
    """Return a percentage: how many of the L // 2 (at least one) pairs of residues that the model's distance
    head says are most likely in contact are truly in contact, averaged over the test chains of `test_parts`.
    In contact: CB atoms under 8 Angstrom apart. L: residues of the chain, at most ``shape.residues``. Only
    pairs at least 12 residues apart along the chain are ranked; chains without any are left out."""
    from memfit.jobs.builtin.alphafold.model import distance_edges

    # bins that end at or before the contact distance
    contact_bins = int((distance_edges() <= CONTACT_ANGSTROM).sum())
    precisions: list[float] = []
    with evaluating(model) as device:
        for tensors in test_parts(folds, shape):
            batch = to_device(tensors, device)
            logits = model(batch)["distance"].float()
            probabilities = logits.softmax(-1)[..., :contact_bins].sum(-1)
            precisions += chain_precisions(
                probabilities.cpu().numpy(), tensors["atoms"].numpy(), tensors["mask"].numpy()
            )
    return 100 * float(np.mean(precisions))


def chain_precisions(probabilities: Array, atoms: Array, mask: Array, *, divisor: int = 2) -> list[float]:
    """Return for each chain the share, 0 to 1, of true contacts among the L // ``divisor`` (at least one)
    pairs with the highest ``probabilities`` (chains, n, n) that are at least 12 residues apart. ``atoms``
    (chains, n, 3, 3) in Angstrom; L: number of residues where ``mask`` (chains, n) is 1, which come first.
    Chains without such pairs are left out."""
    precisions = []
    for scores, chain, chain_mask in zip(probabilities, atoms, mask, strict=True):
        length = int(chain_mask.sum())
        first, second = np.triu_indices(length, APART)
        if len(first):
            top_pairs = np.argsort(-scores[first, second], kind="stable")[: max(1, length // divisor)]
            contacts = contact_map(chain[:length])
            precisions.append(float(contacts[first[top_pairs], second[top_pairs]].mean()))
    return precisions


def metric(folds: Folds, shape: FoldSize) -> Metric:
    """Return the metric: contact precision at L/2 in percent, as `contact_precision` computes it. Higher is
    better.

    Its naive result ranks pairs without a network, by the sum of two terms: the logarithm of how often pairs
    with this separation along the chain are in contact in every fourth training chain; and the potential of
    `Folds`, averaged over the profiles of the two residues (0 if it is not known).
    """
    length = shape.residues
    contacts, totals = np.zeros(length), np.zeros(length)
    for chain in range(0, folds.train_count, 4):
        start = folds.offset[chain]
        touching = contact_map(folds.atoms[start : min(folds.offset[chain + 1], start + length)])
        for gap in range(APART, len(touching)):
            contacts[gap] += touching.diagonal(gap).sum()
            totals[gap] += len(touching) - gap
    prior = np.log(contacts / np.maximum(totals, 1) + 1e-4)
    potential = np.zeros((20, 20)) if folds.potential is None else folds.potential
    precisions: list[float] = []
    for chain in range(folds.train_count, folds.count)[:TESTED]:
        residues = slice(folds.offset[chain], min(folds.offset[chain + 1], folds.offset[chain] + length))
        atoms, profile = folds.atoms[residues], folds.profile[residues]
        separation = np.abs(np.subtract.outer(np.arange(len(atoms)), np.arange(len(atoms))))
        scores = prior[separation] + profile @ potential @ profile.T
        precisions += chain_precisions(scores[None], atoms[None], np.ones((1, len(atoms))))
    return Metric(
        name="contact precision at L/2",
        unit="percentage points",
        higher_is_better=True,
        margin=5.0,
        margin_source=(
            "the best groups' precision of long-range contacts rose by about 20 points from one CASP to the "
            "next (27, 47 and 70 % in CASP11, 12, 13; Shrestha et al. 2019, doi:10.1002/prot.25819): a "
            "quarter of such a step is no difference"
        ),
        naive=100 * float(np.mean(precisions)),
        naive_name="contacts ranked by separation along the chain and by pair counts with profiles",
    )
