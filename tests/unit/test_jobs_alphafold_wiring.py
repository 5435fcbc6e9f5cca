"""The assembled AlphaFold 2: the data between stages, masks, the terms of the loss, and the published sizes,
constants and initial values (supplement of Jumper et al. 2021), each computed independently here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from alphafold_doubles import PUBLISHED, Gives, drawn
from torch import nn

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold import evoformer, model, structure
from memfit.jobs.builtin.alphafold.structure import Frames

Array = np.ndarray[Any, Any]
N = 10
SMALL = dataclasses.replace(
    model.small_size(residues=N, batch_size=1), blocks=2, extra_blocks=2, templates=2, template_blocks=2
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _batch() -> dict[str, torch.Tensor]:
    """A batch with random templates, which the data does not have."""
    batch = alphafold2.train_batch(alphafold2.built_in_folds(), SMALL, step=0, seed=0)
    return batch | {"template": torch.randn(1, 2, N, N, 88), "template_mask": torch.ones(1, 2)}


# -- backbones by their bonds, in numpy -------------------------------------------------------------------

_N_CA, _CA_C, _C_N = 1.458, 1.525, 1.329  # Engh and Huber 1991, Angstrom and degrees
_AT_CA, _AT_C, _AT_N = 111.0, 117.2, 121.7
_CB, _N_CA_CB, _C_CA_CB = 1.53, 110.5, 110.1
_TURNS = np.random.default_rng(1).uniform(-math.pi, math.pi, (14, 3))  # omega, phi, psi of 14 residues


def _unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x))


def _next(before: list[Array], length: float, angle: float, torsion: float) -> Array:
    """The atom after the last three; the torsion starts at cis and is positive clockwise when looking along
    the middle bond, as IUPAC defines it."""
    one, two, three = before[-3:]
    axis, opened = _unit(three - two), math.radians(angle)
    cis = _unit((one - two) - ((one - two) @ axis) * axis)
    turned = math.cos(torsion) * cis + math.sin(torsion) * np.cross(axis, cis)
    return np.asarray(three + length * (-math.cos(opened) * axis + math.sin(opened) * turned))


def _backbone(angles: Array) -> Array:
    """Atoms (n, 3 of N CA C, 3) of a chain with the torsions (n, 3 of omega phi psi) in radians."""
    opened = math.radians(_AT_CA)  # the first residue lies in its own frame
    atoms = [_N_CA * np.array([math.cos(opened), math.sin(opened), 0]), np.zeros(3), np.array([_CA_C, 0, 0])]
    for (_, _, psi), (omega, phi, _) in itertools.pairwise(angles):
        for bond in ((_C_N, _AT_C, psi), (_N_CA, _AT_N, omega), (_CA_C, _AT_CA, phi)):
            atoms.append(_next(atoms, *bond))
    return np.stack(atoms).reshape(-1, 3, 3)


def _axes(atoms: Array) -> Array:
    """Algorithm 21: the columns of the rotation at N, CA, C."""
    along, towards = _unit(atoms[2] - atoms[1]), atoms[0] - atoms[1]
    side = _unit(towards - (along @ towards) * along)
    return np.stack([along, side, np.cross(along, side)], axis=1)


def _left_handed_beta(atoms: Array) -> Array:
    """CB by its bond length and angles; of the two mirror images the L one, by the CORN rule: seen from H,
    CO, R and N run clockwise."""
    to_n, to_c = _unit(atoms[0] - atoms[1]), _unit(atoms[2] - atoms[1])
    cosines = np.cos(np.radians([_N_CA_CB, _C_CA_CB]))
    both = np.stack([to_n, to_c])
    level = np.linalg.solve(both @ both.T, cosines) @ both
    up = _unit(np.cross(to_n, to_c)) * math.sqrt(1 - level @ level)
    images = [(beta, -(to_n + to_c + beta)) for beta in (level + up, level - up)]  # and hydrogen
    (found,) = (beta for beta, h in images if np.cross(beta - to_c, to_n - beta) @ h < 0)
    return np.asarray(atoms[1] + _CB * found)


def test_torsions_recover_those_the_chain_was_built_with_and_are_masked_at_breaks() -> None:
    follows = torch.ones(1, 14)
    follows[0, [0, 4]] = 0
    found, held = structure.torsions(torch.tensor(_backbone(_TURNS))[None], follows)
    for (i, k), angle in np.ndenumerate(_TURNS):
        bond = i + 1 if k == 2 else i  # psi is of the bond before residue i + 1, the others of that before i
        assert float(held[0, i, k]) == (bond not in {0, 4, 14}), (i, k)
        if held[0, i, k]:
            assert found[0, i, k].tolist() == pytest.approx([math.sin(angle), math.cos(angle)])


def test_beta_carbons_are_those_of_l_amino_acids() -> None:
    for atoms in _backbone(_TURNS):
        assert model.beta_of(torch.tensor(atoms)).numpy() == pytest.approx(_left_handed_beta(atoms), abs=0.08)


# -- from stage to stage ----------------------------------------------------------------------------------


def _flow(network: Any, *given: Any) -> tuple[dict[str, list[tuple[Any, Any]]], Any]:
    """The inputs and outputs of every module, call by call, and the result of the whole."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name, _ in network.named_modules()}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: calls[name].append((args, out)))
    with torch.no_grad():
        return calls, network(*given)


def _same(given: Any, wanted: Any) -> None:
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)


def _changed(before: Any, after: Any) -> None:
    """Asserts a clear change, without which a test would not notice a stage that is left out."""
    assert all(float((b - a).abs().max()) > 0.1 for b, a in zip(before, after, strict=True))


def test_every_stage_receives_the_output_of_the_one_before() -> None:
    """Algorithm 2, lines 5 to 20, in both passes."""
    calls, out = _flow(drawn(model.AlphaFold(SMALL)).eval(), batch := _batch())
    beta = torch.tensor(_left_handed_beta(_backbone(np.zeros((1, 3)))[0])).float()
    first, pairs = torch.zeros(1, N, SMALL.widths.c_m), torch.zeros(1, N, N, SMALL.widths.c_z)
    for turn, placed in enumerate((calls["recycle"][1][0][2], out["beta"])):
        told = {name: each[turn] for name, each in calls.items() if len(each) == 2}
        _same(told["embed_extra"][0], [batch["extra"]])
        _same(told["recycle"][0][:2], (first, pairs))
        (m, fresh), (row, recycled) = told["embed"][1], told["recycle"][1]
        m, z = torch.cat([m[:, :1] + row[:, None], m[:, 1:]], 1), fresh + recycled
        _same(told["template"][0][:1], [z])
        _changed([z], [z := z + told["template"][1]])
        for stack, left in (("extra", told["embed_extra"][1]), ("blocks", m)):
            m = left
            for name in (f"{stack}.0", f"{stack}.1"):
                _same(told[name][0][:2], (m, z))
                _changed((m, z), told[name][1])
                m, z = told[name][1]
        first, pairs, made = m[:, 0], z, told["structure"][1]
        _same(told["single"][0], [first])
        _changed([first], [m[:, 1]])
        _same(told["structure"][0], (told["single"][1], z, batch["mask"]))
        _same(told["heads"][0], (m, z, made.single))
        assert float((placed - made.translations[-1] - made.rotations[-1] @ beta).abs().max()) < 0.08
    _same([out[k] for k in ("distance", "residue", "confidence")], told["heads"][1])
    _same([out[k] for k in ("rotations", "translations", "angles")], made[1:])


def test_templates_pass_through_every_stage_of_their_stack() -> None:
    """Algorithm 2, line 10, and algorithm 16, template by template."""
    calls, _ = _flow(drawn(model.AlphaFold(SMALL)).eval(), batch := _batch())
    names = ("template.embed", "template.blocks.0", "template.blocks.1", "template.norm")
    for index, line in enumerate(zip(*(calls[name] for name in names), strict=True)):
        _same(line[0][0], [batch["template"][:, index % 2]])
        for (_, left), (given, new) in itertools.pairwise(line):
            _same(given[:1], [left])
            _changed([left], [new])


# -- masks ------------------------------------------------------------------------------------------------


def test_masked_residues_do_not_change_any_output() -> None:
    """The outputs equal those of a shorter input, although the masked residues hold noise."""
    network, batch = drawn(model.AlphaFold(SMALL), 0.15).eval(), _batch()
    kept, less = N - 3, dict(batch)
    batch["mask"][:, kept:] = 0
    at = {"target": [1], "index": [1], "mask": [1], "msa": [2], "extra": [2], "template": [2, 3]}
    for name, dims in at.items():
        for dim in dims:
            if name not in {"index", "mask"}:
                batch[name].narrow(dim, kept, 3).normal_(std=3)
            less[name] = less[name].narrow(dim, 0, kept)
    found, wanted = network(batch), network(less)
    for name, part in wanted.items():
        same = found[name][tuple(slice(end) for end in part.shape)]
        torch.testing.assert_close(same, part, atol=1e-3, rtol=1e-3)


def test_point_attention_ignores_masked_keys_and_does_not_change_masked_queries() -> None:
    """As in the published folding.py, the pair mask shifts all logits of a masked query by one amount."""
    widths = structure.StructureWidths(c_s=8, c_z=4, heads=2, head_width=3, query_points=2, value_points=2)
    layer = drawn(structure.InvariantPointAttention(widths), 0.5).double()
    s, z = torch.randn(1, N, 8).double(), torch.randn(1, N, N, 4).double()
    rotation = structure.rotation_of(torch.randn(1, N, 3).double())
    shift, mask = torch.randn(1, N, 3).double(), torch.ones(1, N).double()
    mask[0, [2, 7]] = 0
    found, whole = layer(s, z, rotation, shift, mask)[0], layer(s, z, rotation, shift, 0 * mask + 1)[0]
    held = [i for i in range(N) if i not in {2, 7}]
    alone = layer(s[:, held], z[:, held][:, :, held], rotation[:, held], shift[:, held], mask[:, held])[0]
    torch.testing.assert_close(found[held], alone)
    torch.testing.assert_close(found[[2, 7]], whole[[2, 7]], atol=1e-5, rtol=1e-5)


def _aligned(guess: tuple[Array, Array], true: tuple[Array, Array], points: tuple[Array, Array]) -> Array:
    """Algorithm 28 before its mean, for errors below the clamp: (frames, points) in units of 10 Angstrom."""
    errors = np.zeros((len(guess[0]), len(points[0])))
    for i, j in np.ndindex(errors.shape):
        seen = guess[0][i].T @ (points[0][j] - guess[1][i]) - true[0][i].T @ (points[1][j] - true[1][i])
        errors[i, j] = np.linalg.norm(seen)
    assert errors.max() < 10
    return errors / 10


def test_the_aligned_error_is_the_mean_over_unmasked_frames_and_points() -> None:
    rotations = structure.rotation_of(torch.randn(2, 2, 4, 3).double())
    shifts, points = torch.randn(2, 2, 4, 3).double(), torch.randn(2, 2, 5, 3).double()
    frames_held = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 0]]).double()
    points_held = torch.tensor([[1.0, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).double()
    guess, true = (Frames(r, t) for r, t in zip(rotations, shifts, strict=True))
    found = structure.fape(guess, true, points[0], points[1], (frames_held, points_held))
    for b in range(2):
        r, t, p = rotations[:, b].numpy(), shifts[:, b].numpy(), points[:, b].numpy()
        errors = _aligned((r[0], t[0]), (r[1], t[1]), (p[0], p[1]))
        kept = errors[frames_held[b].numpy() > 0][:, points_held[b].numpy() > 0]
        assert float(found[b]) == pytest.approx(kept.mean(), rel=1e-3)


def _lddt(points: Array, true: Array, held: Array) -> Array:
    found = np.zeros(len(points))
    for i in range(len(points)):
        kept = [
            abs(np.linalg.norm(points[i] - points[j]) - apart) < limit
            for j in range(len(points))
            if j != i and held[i] and held[j] and (apart := np.linalg.norm(true[i] - true[j])) < 15
            for limit in (0.5, 1, 2, 4)
        ]
        found[i] = np.mean(kept) if kept else 0
    return found


def test_lddt_counts_unmasked_residues_within_15_angstrom() -> None:
    rng = np.random.default_rng(0)
    true, off, held = rng.uniform(0, 16, (1, 30, 3)), rng.normal(0, 1, (1, 30, 3)), rng.random((1, 30)) < 0.7
    found = structure.lddt(*(torch.tensor(x) for x in (true + off, true, held * 1.0)))[0].numpy()
    assert found[held[0]] == pytest.approx(_lddt((true + off)[0], true[0], held[0])[held[0]])


# -- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [-0.6, 0.6])
def test_recycled_distances_fall_in_the_nearest_bin(beside: float) -> None:
    """Algorithm 32, line 2: a little below and above each of 15 bins from 3 3/8 to 21 3/8 Angstrom."""
    layer = drawn(model.RecyclingEmbedder(SMALL))
    beta, z = torch.zeros(15, 2, 3), torch.zeros(15, 2, 2, SMALL.widths.c_z)
    beta[:, 1, 2] = torch.arange(15) * 18 / 14 + 3.375 + beside
    _, found = layer(torch.zeros(15, 2, SMALL.widths.c_m), z, beta)
    wanted = layer.norm_z(z[:, 0, 1]) + layer.distance.weight.T + layer.distance.bias
    torch.testing.assert_close(found[:, 0, 1], wanted)


def _case() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Array]:
    """Two chains with gaps, a prediction in three rounds (each closer, far off in gaps), and the torsions."""
    count, rng = 14, np.random.default_rng(3)
    angles, mask = np.stack([_TURNS, _TURNS[::-1]]), np.ones((2, count))
    mask[0, 5], mask[1, 11:] = 0, 0
    atoms = np.stack([_backbone(a) for a in angles])
    axes = np.array([[_axes(one) for one in chain] for chain in atoms])
    off = structure.rotation_of(torch.tensor(rng.normal(0, 0.05, (3, 2, count, 3)))).numpy()
    far = rng.normal(0, [[[[1.5]]], [[[1.0]]], [[[0.5]]]], (3, 2, count, 3)) + 40 * (1 - mask)[..., None]
    batch = {
        "atoms": torch.tensor(atoms).float(),
        "mask": torch.tensor(mask).float(),
        "residue": torch.randint(20, (2, 4, count)),
        "hidden": torch.tensor((rng.random((2, 4, count)) < 0.3) * mask[:, None]).float(),
    }
    out = {
        "rotations": torch.tensor(axes @ off).float(),
        "angles": torch.randn(3, 2, count, 7, 2),
        "translations": torch.tensor(atoms[:, :, 1] + far).float(),
        "residue": torch.randn(2, 4, count, 23),
        "distance": torch.randn(2, count, count, 64),
        "confidence": torch.randn(2, count, 50),
    }
    return batch, out, angles


def test_fape_is_of_the_last_round_and_the_auxiliary_loss_is_the_mean_over_rounds() -> None:
    """Algorithm 20 from line 17 on: FAPE of all atoms at the end; FAPE of CA and torsions in every round."""
    batch, out, angles = _case()
    final, along = [], []
    for b in range(2):
        held = np.flatnonzero(batch["mask"][b].numpy())
        atoms = batch["atoms"][b].double().numpy()[held]
        true = np.array([_axes(one) for one in atoms]), atoms[:, 1]
        bonds = [(i, k) for i in held for k in range(3) if (i + 1 if k == 2 else i - 1) in held]
        for r in range(3):
            guess = out["rotations"][r, b].numpy()[held], out["translations"][r, b].numpy()[held]
            turned = []
            for i, k in bonds:
                told, angle = out["angles"][r, b, i, k].double().numpy(), angles[b, i, k]
                apart = ((_unit(told) - [math.sin(angle), math.cos(angle)]) ** 2).sum()
                turned.append(apart + 0.02 * abs(np.linalg.norm(told) - 1))
            along.append(_aligned(guess, true, (guess[1], atoms[:, 1])).mean() + np.mean(turned))
        placed = guess[1][:, None] + np.einsum("nij,nkj,nak->nai", guess[0], true[0], atoms - atoms[:, 1:2])
        final.append(_aligned(guess, true, (placed.reshape(-1, 3), atoms.reshape(-1, 3))).mean())
    found = alphafold2.terms(out, batch)
    assert float(found["fape"]) == pytest.approx(np.mean(final), rel=2e-3)
    assert float(found["auxiliary"]) == pytest.approx(np.mean(along), rel=2e-3)


def test_class_losses_are_means_over_unmasked_pairs_masked_tokens_and_unmasked_residues() -> None:
    """Supplement 1.9.6, 1.9.8 and 1.9.9, and equation 7's weights."""
    batch, out, _ = _case()
    wanted: dict[str, list[float]] = {"distance": [], "residue": [], "confidence": []}
    for b in range(2):
        atoms, mask = batch["atoms"][b].double().numpy(), batch["mask"][b].numpy()
        held, (n, ca, c) = np.flatnonzero(mask), atoms.swapaxes(0, 1)
        across = np.cross(ca - n, c - ca)  # CB as trRosetta and its heirs place it
        beta = ca - 0.58273431 * across + 0.56802827 * (ca - n) - 0.54067466 * (c - ca)
        bins = (np.linalg.norm(beta[:, None] - beta, axis=-1) - 2) // (20 / 64)  # 64 from 2 to 22 Angstrom
        right = _lddt(out["translations"][-1, b].double().numpy(), atoms[:, 1], mask)
        hidden = np.argwhere(batch["hidden"][b].numpy() > 0)
        for name, kinds, places in (
            ("distance", np.clip(bins, 0, 63).astype(int), itertools.product(held, held)),
            ("residue", batch["residue"][b].numpy(), [tuple(place) for place in hidden]),
            ("confidence", np.minimum(100 * right // 2, 49).astype(int), [(i,) for i in held]),
        ):
            sure = out[name][b].double().log_softmax(-1).numpy()
            wanted[name].append(-float(np.mean([sure[(*place, kinds[place])] for place in places])))
    found = {name: float(part) for name, part in alphafold2.terms(out, batch).items()}
    assert {name: found[name] for name in wanted} == pytest.approx({k: np.mean(v) for k, v in wanted.items()})
    weights = {"fape": 0.5, "auxiliary": 0.5, "distance": 0.3, "residue": 2.0, "confidence": 0.01}
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in weights.items()))


# -- published sizes, dropout, initial values -------------------------------------------------------------


def test_the_published_structure_module_has_8_rounds() -> None:
    module = structure.StructureModule(PUBLISHED.structure)
    made = module(torch.randn(1, 3, 384), torch.randn(1, 3, 3, 128), torch.ones(1, 3))
    assert [t.shape[0] for t in made[1:]] == [8, 8, 8]


@pytest.mark.parametrize("stack", ["widths", "extra", "template"])
def test_the_published_rates_of_dropout_are_15_percent_of_rows_and_25_of_pairs(stack: str) -> None:
    widths = dataclasses.replace(getattr(PUBLISHED, stack), c_m=8, c_z=8, triangle=4, outer=2)
    block: Any = evoformer.EvoformerBlock(widths).train()
    block.row, block.column, block.transition = Gives(1.0), Gives(0.0), Gives(0.0)
    held = torch.ones(1, 1, 100), torch.ones(1, 100, 100)
    if stack != "template":  # whose blocks have no rows
        found = block(torch.zeros(1, 1, 100, 8), torch.zeros(1, 1, 1, 8), *held)[0]
        assert found.unique().tolist() == pytest.approx([0, 1 / 0.85])
    for name in ("outgoing", "incoming", "starting", "ending", "transition"):
        setattr(block.pairs, name, Gives(float(name != "transition")))
    found = block.pairs(torch.zeros(1, 40, 40, 8), held[1])
    assert found.unique().tolist() == pytest.approx([k / 0.75 for k in range(5)])


def test_structure_dropout_drops_a_tenth_of_the_sums_before_both_norms() -> None:
    """Algorithm 20, lines 6 to 9."""
    module: Any = structure.StructureModule(dataclasses.replace(PUBLISHED.structure, iterations=1)).train()
    for name in ("norm_s", "norm_z", "first", "norm_attention", "norm_transition"):
        setattr(module, name, nn.Identity())
    module.attention, module.transition = Gives(2.0), Gives(4.0)
    given = torch.ones(1, 100, 384), torch.zeros(1), torch.ones(1, 100)
    calls, _ = _flow(module, *given)
    first, second = (calls[name][0][0][0] for name in ("norm_attention", "norm_transition"))
    for found, before in ((first, torch.full_like(first, 3.0)), (second, first + 4)):
        torch.testing.assert_close(found, torch.where(found == 0, 0, before / 0.9))
        assert 0.09 < float((found == 0).double().mean()) < 0.11
    assert (_flow(module.eval(), *given)[0]["norm_transition"][0][0][0] == 7).all()


def test_gates_start_open_blocks_as_identity_and_point_weights_at_one() -> None:
    """Supplement 1.11.4: the sigmoid of a gate gets 1 for any input; softplus of a point weight is 1."""
    network = model.AlphaFold(SMALL).eval()
    with mock.patch.object(torch, "sigmoid", side_effect=torch.sigmoid) as gates:
        calls, _ = _flow(network, _batch())
    assert gates.call_count == 2 * (4 * 10 + 2 * 2 * 8)  # in 2 passes: 4 blocks of 10, 2 templates' 2 of 8
    assert all((args[0] == 1).all() for args, _ in gates.call_args_list)
    for name in ("extra.0", "extra.1", "blocks.0", "blocks.1"):
        _same(calls[name][1][0][:2], calls[name][1][1])
    learned = network.structure.attention.head_weight.tolist()
    assert [math.log1p(math.exp(w)) for w in learned] == pytest.approx([1.0] * 4)
