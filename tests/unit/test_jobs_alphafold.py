"""AlphaFold 2's operations against small cases computed by hand, its symmetries, and its data."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold import evoformer, model, structure
from memfit.jobs.builtin.alphafold.structure import Frames
from memfit.jobs.registry import load
from memfit.model.blocks import find_stacks
from memfit.trace.tracer import fake_model
from memfit.types.errors import UserError
from memfit.types.job import JobRef

WIDTHS = evoformer.Widths(
    c_m=6,
    c_z=4,
    msa_heads=3,
    msa_head_width=2,
    pair_heads=2,
    pair_head_width=3,
    triangle=5,
    outer=3,
    transition=2,
    dropout=(0.0, 0.0),
)
ROWS, N = 4, 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    m, z = torch.randn(1, ROWS, N, WIDTHS.c_m).double(), torch.randn(1, N, N, WIDTHS.c_z).double()
    held = torch.ones(1, N).double()
    held[:, -1] = 0
    return m, z, held.unsqueeze(1).repeat(1, ROWS, 1), held.unsqueeze(1) * held.unsqueeze(2)


# -- by hand, index by index ------------------------------------------------------------------------------


def _attend(a: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows x (n, width), bias (heads, n, n): the sums of algorithms 7, 8, 13 and 14 one by one."""
    x = a.norm(x)
    q, k, v = a.query(x), a.key(x), a.value(x)
    width = q.shape[1] // a.heads
    out = torch.zeros_like(q)
    for h, i in itertools.product(range(a.heads), range(len(x))):
        one = slice(h * width, (h + 1) * width)
        logits = [q[i, one] @ k[j, one] / width**0.5 + bias[h, i, j] for j in range(len(x))]
        weights = torch.softmax(torch.stack(logits), 0)
        out[i, one] = sum(w * v[j, one] for j, w in enumerate(weights))
    return a.out(torch.sigmoid(a.gate(x)) * out)


def test_row_attention_is_the_sum_over_residues_with_the_pairs_bias() -> None:
    m, z, rows, _ = _inputs()
    layer = _random(evoformer.RowAttention(WIDTHS))
    bias = layer.bias.weight(layer.bias.norm(z[0])).permute(2, 0, 1)
    masked = torch.where(rows[0, 0] > 0, 0.0, -1e9)
    found = layer(m, z, rows)[0]
    for s in range(ROWS):
        torch.testing.assert_close(found[s], _attend(layer.attention, m[0, s], bias + masked))


def test_column_attention_is_the_sum_over_rows() -> None:
    m, _, rows, _ = _inputs()
    rows[:, 2] = 0
    layer = _random(evoformer.ColumnAttention(WIDTHS))
    masked = torch.where(rows[0, :, 0] > 0, 0.0, -1e9).expand(WIDTHS.msa_heads, ROWS, ROWS)
    found = layer(m, rows)[0]
    for i in range(N - 1):
        torch.testing.assert_close(found[:, i], _attend(layer.attention, m[0, :, i], masked))


def test_global_column_attention_uses_the_mean_query_of_unmasked_rows() -> None:
    m, _, rows, _ = _inputs()
    rows[:, 1] = 0
    layer = _random(evoformer.ColumnAttention(dataclasses.replace(WIDTHS, global_columns=True)))
    a, found, held = layer.attention, layer(m, rows)[0], [0, 2, 3]
    for i in range(N - 1):
        x = a.norm(m[0, :, i])
        query = (a.query(x[held].sum(0) / (3 + 1e-5)) * 2**-0.5).unflatten(0, (3, 2))
        weights = torch.softmax(query @ a.key(x[held]).T, -1)
        mixed = (weights @ a.value(x[held])).flatten()
        torch.testing.assert_close(found[:, i], a.out(torch.sigmoid(a.gate(x)) * mixed))


def test_outer_product_mean_is_the_mean_over_unmasked_rows() -> None:
    m, _, rows, _ = _inputs()
    rows[:, 3] = 0
    layer = _random(evoformer.OuterProductMean(WIDTHS))
    x = layer.norm(m[0])
    left, right, found = layer.left(x), layer.right(x), layer(m, rows)[0]
    for i, j in itertools.product(range(N - 1), range(N - 1)):
        outer = sum(torch.outer(left[s, i], right[s, j]) for s in range(3))
        torch.testing.assert_close(found[i, j], layer.product.out(outer.flatten()) / (3 + 1e-3))


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication_sums_over_the_third_node(outgoing: bool) -> None:
    _, z, _, pairs = _inputs()
    layer = _random(evoformer.TriangleMultiplication(WIDTHS, outgoing=outgoing))
    x, held = layer.norm(z[0]), pairs[0]
    a, b = (
        held[..., None] * torch.sigmoid(side.gate(x)) * side.value(x) for side in (layer.left, layer.right)
    )
    found = layer(z, pairs)[0]
    for i, j in itertools.product(range(N), range(N)):
        third = (a[i, k] * b[j, k] if outgoing else a[k, i] * b[k, j] for k in range(N))
        wanted = torch.sigmoid(layer.gate(x[i, j])) * layer.out(layer.norm_out(sum(third)))
        torch.testing.assert_close(found[i, j], wanted)


@pytest.mark.parametrize("starting", [True, False])
def test_triangle_attention_is_along_the_edges_of_one_node(starting: bool) -> None:
    _, z, _, pairs = _inputs()
    layer = _random(evoformer.TriangleAttention(WIDTHS, starting=starting))
    edges = z[0] if starting else z[0].transpose(0, 1)
    bias = layer.bias.weight(layer.attention.norm(edges)).permute(2, 0, 1)  # by the third edge (j, k)
    found = layer(z, pairs)[0]
    for i in range(N - 1):
        masked = torch.where(pairs[0, i] > 0, 0.0, -1e9)
        wanted = _attend(layer.attention, edges[i], bias + masked)
        torch.testing.assert_close(found[i] if starting else found[:, i], wanted)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + norm.eps).sqrt() * norm.weight + norm.bias


def test_transition_is_a_norm_and_two_linear_layers_with_a_relu_between() -> None:
    m, *_ = _inputs()
    layer = _random(evoformer.Transition(WIDTHS.c_m, 2))
    assert layer.up.weight.shape == (12, 6)
    inner = (_normed(layer.norm, m) @ layer.up.weight.T + layer.up.bias).clamp(min=0)
    torch.testing.assert_close(layer(m), inner @ layer.down.weight.T + layer.down.bias)


def test_a_block_applies_its_parts_in_the_papers_order() -> None:
    """Algorithm 6: row and column attention, transition, the outer product, then the pairs' five parts."""
    m, z, rows, pairs = _inputs()
    block: Any = _random(evoformer.EvoformerBlock(WIDTHS)).eval()
    along = m + block.row(m, z, rows)
    across = along + block.column(along, rows)
    left = across + block.transition(across)
    found = z + block.outer(left, rows)
    for name in ("outgoing", "incoming", "starting", "ending"):
        found = found + getattr(block.pairs, name)(found, pairs)
    found = found + block.pairs.transition(found)
    for told, wanted in zip(block(m, z, rows, pairs), (left, found), strict=True):
        torch.testing.assert_close(told, wanted)


def test_relative_positions_are_i_minus_j_clipped_to_the_limit() -> None:
    index = torch.tensor([[0, 1, 5]])
    found = evoformer.relative_positions(index, index, 2).argmax(-1)[0]
    assert found.tolist() == [[2, 1, 0], [3, 2, 0], [4, 4, 2]]  # i - j, clipped, from -2 on


def test_templates_are_averaged_by_attention_and_absent_ones_are_ignored() -> None:
    _, z, _, pairs = _inputs()
    layer: Any = _random(evoformer.Templates(WIDTHS, 7, c_z=4, blocks=1, head_width=3)).eval()
    templates, real = torch.randn(1, 3, N, N, 7).double(), torch.tensor([[1.0, 0.0, 1.0]]).double()
    found, heads, held = layer(z, pairs, templates, real)[0], WIDTHS.pair_heads, [0, 2]
    stacked = [layer.norm(layer.blocks[0](layer.embed(templates[:, t]), pairs))[0] for t in range(3)]
    for i, j in itertools.product(range(N), range(N)):
        mixed = []
        for h in range(heads):
            one = slice(3 * h, 3 * h + 3)
            query = layer.query(z[0, i, j])[one]
            logits = torch.stack([query @ layer.key(stacked[t][i, j])[one] / 3**0.5 for t in held])
            weights = logits.softmax(0)
            mixed.append(
                sum(w * layer.value(stacked[t][i, j])[one] for w, t in zip(weights, held, strict=True))
            )
        torch.testing.assert_close(found[i, j], layer.out(torch.cat(mixed)))
    assert layer(z, pairs, templates, 0 * real).abs().max() == 0


def test_invariant_point_attention_follows_algorithm_22() -> None:
    c, points, values, heads = 3, 2, 4, 2
    widths = structure.StructureWidths(
        c_s=8, c_z=4, heads=heads, head_width=c, query_points=points, value_points=values
    )
    layer: Any = _random(structure.InvariantPointAttention(widths))
    s, z, mask = torch.randn(1, N, 8).double(), torch.randn(1, N, N, 4).double(), torch.ones(1, N).double()
    mask[0, -1] = 0
    frames = _frames(1, N)
    rotation, shift = frames.rotation[0], frames.translation[0]
    found = layer(s, z, *frames, mask)[0]

    def place(told: torch.Tensor, i: int, h: int, count: int) -> torch.Tensor:
        return told.view(heads, count, 3)[h] @ rotation[i].T + shift[i]

    gamma = torch.log1p(torch.exp(layer.head_weight))
    w_l, w_c = (1 / 3) ** 0.5, (2 / (9 * points)) ** 0.5
    for i in range(N - 1):
        mixed, seen, far, paired = [], [], [], []
        for h in range(heads):
            logits = []
            for j in range(N - 1):
                one = slice(h * c, h * c + c)
                near = (
                    layer.query(s[0, i])[one] @ layer.key(s[0, j])[one] / c**0.5 + layer.bias(z[0, i, j])[h]
                )
                apart = place(layer.query_points(s[0, i]), i, h, points) - place(
                    layer.key_points(s[0, j]), j, h, points
                )
                logits.append(w_l * (near - gamma[h] * w_c / 2 * (apart**2).sum()))
            weights = torch.stack(logits).softmax(0)
            mixed.append(sum(w * layer.value(s[0, j])[h * c : h * c + c] for j, w in enumerate(weights)))
            paired.append(sum(w * z[0, i, j] for j, w in enumerate(weights)))
            where = sum(w * place(layer.value_points(s[0, j]), j, h, values) for j, w in enumerate(weights))
            seen.append((where - shift[i]) @ rotation[i])
            far.append(((seen[-1] ** 2).sum(-1) + 1e-8).sqrt())
        parts = [torch.cat(mixed), torch.cat(seen).flatten(), torch.cat(far), torch.cat(paired)]
        torch.testing.assert_close(found[i], layer.out(torch.cat(parts)))


def test_dropout_is_shared_along_a_row() -> None:
    kept = evoformer.SharedDropout(0.5, 1).train()(torch.ones(2, 6, 40))
    assert (kept == kept[:, :1]).all()
    assert 0 < float((kept == 0).double().mean()) < 1
    assert set(kept.unique().tolist()) == {0.0, 2.0}


# -- the published sizes ----------------------------------------------------------------------------------


def test_a_block_and_the_network_have_the_published_number_of_parameters() -> None:
    """Others counted 1,829,952 for a block and 93 million in all (Wang et al. 2022, HelixFold)."""
    with torch.device("meta"):
        whole = model.AlphaFold(model.published_size(residues=256, rows=128, extra_rows=1024, batch_size=1))
    assert sum(p.numel() for p in whole.blocks[0].parameters()) == 1_829_952
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(93e6, rel=0.01)
    assert len(list(whole.blocks)) == 48


# -- structure --------------------------------------------------------------------------------------------


def _moved() -> Frames:
    return Frames(structure.rotation_of(torch.randn(3).double()), 20 * torch.randn(3).double())


def _frames(*shape: int) -> Frames:
    return Frames(
        structure.rotation_of(torch.randn(*shape, 3).double()), 10 * torch.randn(*shape, 3).double()
    )


def test_rotations_are_orthogonal_with_determinant_one() -> None:
    found = structure.rotation_of(torch.randn(50, 3).double())
    torch.testing.assert_close(found @ found.transpose(1, 2), torch.eye(3).double().expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(50).double())
    half = structure.rotation_of(torch.tensor([1.0, 0, 0]))  # (1, 1, 0, 0): a quarter turn about x
    torch.testing.assert_close(half @ torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 0, 1]))


def test_frames_put_the_alpha_carbon_at_the_origin_and_the_carbon_on_the_x_axis() -> None:
    atoms = torch.randn(7, 3, 3).double() * 3
    frames = structure.frames_of(atoms)
    n, ca, c = frames.invert(atoms).unbind(1)
    torch.testing.assert_close(ca, torch.zeros(7, 3).double())
    torch.testing.assert_close(c[:, 1:], torch.zeros(7, 2).double())
    assert (c[:, 0] > 0).all()
    assert (n[:, 1] > 0).all()
    torch.testing.assert_close(n[:, 2], torch.zeros(7).double())
    torch.testing.assert_close(frames.apply(frames.invert(atoms)), atoms)


def test_composed_frames_apply_one_after_the_other() -> None:
    a, b, points = _frames(4), _frames(4), torch.randn(4, 2, 3).double()
    torch.testing.assert_close(a.then(b).apply(points), a.apply(b.apply(points)))


def test_point_attention_is_invariant_to_a_rigid_motion_of_all_frames() -> None:
    widths = structure.StructureWidths(c_s=8, c_z=4, heads=2, head_width=3, query_points=2, value_points=3)
    layer = _random(structure.InvariantPointAttention(widths))
    s, z, mask = torch.randn(1, N, 8).double(), torch.randn(1, N, N, 4).double(), torch.ones(1, N).double()
    frames, moved = _frames(1, N), _moved()
    away = moved.then(frames)
    torch.testing.assert_close(layer(s, z, *away, mask), layer(s, z, *frames, mask))
    with pytest.raises(AssertionError):  # but it depends on how the frames lie to each other
        torch.testing.assert_close(layer(s, z, *_frames(1, N), mask), layer(s, z, *frames, mask))


def test_aligned_error_matches_hand_computation_and_is_invariant_to_rigid_motion() -> None:
    true, guess = _frames(1, 3), _frames(1, 3)
    points, guessed = torch.randn(1, 4, 3).double() * 8, torch.randn(1, 4, 3).double() * 8
    ones = torch.ones(1, 3).double(), torch.ones(1, 4).double()
    wanted = []
    for i, j in itertools.product(range(3), range(4)):
        one = guess.rotation[0, i].T @ (guessed[0, j] - guess.translation[0, i])
        other = true.rotation[0, i].T @ (points[0, j] - true.translation[0, i])
        error = float(((one - other).square().sum() + 1e-4).sqrt())
        wanted.append(0.9 * min(error, 10.0) + 0.1 * error)
    found = structure.fape(guess, true, guessed, points, ones)
    assert float(found) == pytest.approx(np.mean(wanted) / 10)
    moved = _moved()
    assert float(structure.fape(moved.then(guess), true, moved.apply(guessed), points, ones)) == (
        pytest.approx(float(found))
    )
    assert float(structure.fape(true, true, points, points, ones)) == pytest.approx(1e-3, rel=0.01)


def test_lddt_counts_the_distances_that_are_preserved() -> None:
    true = torch.tensor([[[0.0, 0, 0], [3.8, 0, 0], [7.6, 0, 0], [40.0, 0, 0]]])
    held = torch.ones(1, 4)
    assert structure.lddt(true + 5, true, held)[0, :3].tolist() == [1, 1, 1]
    moved = true.clone()
    moved[0, 2, 0] += 1.5  # within 2 and 4 Angstrom, not within 0.5 and 1; the far one is not looked at
    assert structure.lddt(moved, true, held)[0, :3].tolist() == pytest.approx([0.75, 0.75, 0.5])


def test_torsions_of_a_real_chain_have_trans_peptide_bonds_and_mostly_negative_phi() -> None:
    folds = alphafold2.built_in_folds()
    begin, end = folds.offset[0], folds.offset[1]
    atoms = torch.tensor(folds.atoms[begin:end])[None]
    angle, held = structure.torsions(atoms, torch.ones(1, end - begin))
    degrees = torch.rad2deg(torch.atan2(angle[0, 1:-1, :, 0], angle[0, 1:-1, :, 1]))
    assert float((degrees[:, 0].abs() > 150).double().mean()) > 0.95  # peptide bonds are trans
    assert float(((degrees[:, 1] > -180) & (degrees[:, 1] < 0)).double().mean()) > 0.85  # phi is negative
    assert held[0, -1].tolist() == [1, 1, 0]


# -- data -------------------------------------------------------------------------------------------------


def test_built_in_backbones_have_real_bond_lengths_and_normalised_profiles() -> None:
    folds = alphafold2.built_in_folds()
    assert (folds.count, folds.train_count) == (1120, 1000)
    inside = np.ones(len(folds.atoms) - 1, bool)
    inside[folds.offset[1:-1] - 1] = False
    step = np.linalg.norm(folds.atoms[1:, 0] - folds.atoms[:-1, 2], axis=-1)[inside]  # C to the next N
    assert abs(np.median(step) - 1.33) < 0.01
    assert (step < 1.7).mean() > 0.999
    assert np.allclose(folds.profile.sum(-1), 1, atol=1e-5)


def test_hidden_residues_are_masked_or_in_a_tenth_each_random_of_the_profile_or_themselves() -> None:
    """Supplement 1.2.7."""
    job = alphafold2.make(batch=16)
    batch, again = job.make_batch(2, 1), job.make_batch(2, 1)
    assert all((batch[k] == again[k]).all() for k in batch)
    hidden, inside = batch["hidden"] > 0, batch["mask"][:, None].expand_as(batch["hidden"]) > 0
    assert float(hidden[inside].double().mean()) == pytest.approx(0.15, abs=0.01)
    seen = batch["msa"][..., :23].argmax(-1)
    assert (seen[inside & ~hidden] == batch["residue"][inside & ~hidden]).all()
    masked, same = (seen == 22)[hidden].double().mean(), (seen == batch["residue"])[hidden].double().mean()
    assert float(masked) == pytest.approx(0.7, abs=0.03)
    assert float(same) == pytest.approx(0.1 + 2 * 0.1 / 18, abs=0.03)  # chance adds one in 18, about


def test_data_and_weights_of_the_user_are_refused() -> None:
    for given in ({"data": "x.npz"}, {"weights": "y.pt"}):
        with pytest.raises(UserError, match="that come with memfit"):
            alphafold2.make(**given)  # type: ignore[arg-type]


def test_crops_without_a_pair_that_the_metric_counts_are_refused() -> None:
    with pytest.raises(UserError, match="at least 13 residues"):
        alphafold2.make(dimensions={"crop": 12})
    assert alphafold2.make(dimensions={"crop": 13}).metric is not None


def test_every_loss_term_has_a_gradient_and_initial_size_batches_have_published_shapes() -> None:
    job = alphafold2.make(batch=1, length=20)
    built = job.build_model()
    for name, part in alphafold2.terms(built(job.make_batch(0, 0)), job.make_batch(0, 0)).items():
        if name != "lddt":
            grads = torch.autograd.grad(part, list(built.parameters()), allow_unused=True, retain_graph=True)
            assert any(g is not None and g.abs().sum() > 0 for g in grads), name
    batch = alphafold2.make(size="initial").make_batch(0, 0)
    assert batch["extra"].shape == (1, 1024, 256, 25)
    assert batch["template"].shape == (1, 4, 256, 256, 88)


@pytest.mark.parametrize(("size", "stacks"), [("tiny", [2, 1]), ("paper", [48, 4, 2])])
def test_every_stack_of_blocks_is_found(size: str, stacks: list[int]) -> None:
    job = load(JobRef(spec="alphafold2", size=size))
    found = find_stacks(fake_model(job), job.blocks, job.more_blocks)
    assert [len(blocks) for blocks in found.values()] == stacks
