"""The parts of AlphaFold 2 around its blocks, against the supplement's algorithms computed by hand: dropout,
embeddings, recycling, the structure module's frames and angles, heads and the torsion loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alphafold_doubles import Gives
from torch import nn

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold import evoformer, model, structure

N = 6
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
    dropout=(0.5, 0.5),
)
SMALL = dataclasses.replace(model.small_size(residues=16, batch_size=2), blocks=1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _random(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


# -- dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "shared"), [("outgoing", 1), ("incoming", 1), ("starting", 1), ("ending", 2), ("transition", 0)]
)
def test_pair_updates_drop_whole_rows_or_columns_as_in_algorithm_6(part: str, shared: int) -> None:
    """By rows after multiplications and starting-node attention, by columns after ending-node attention."""
    stack: Any = evoformer.PairStack(WIDTHS).train()
    for name in ("outgoing", "incoming", "starting", "ending", "transition"):
        setattr(stack, name, Gives(1.0 if name == part else 0.0))
    z = torch.zeros(1, 40, 40, 4)
    found = stack(z, torch.ones(1, 40, 40))
    values = set(found.unique().tolist())
    if not shared:
        assert values == {1.0}
        return
    assert values == {0.0, 2.0}
    assert (found == found.narrow(shared, 0, 1)).all()
    assert not (found == found.narrow(3 - shared, 0, 1)).all()


def test_row_attention_dropout_is_the_same_in_every_row_of_the_alignment() -> None:
    block: Any = evoformer.EvoformerBlock(WIDTHS).train()
    block.row, block.column, block.transition = Gives(1.0), Gives(0.0), Gives(0.0)
    m, z = torch.zeros(1, 9, 40, 6), torch.zeros(1, 40, 40, 4)
    found = block(m, z, torch.ones(1, 9, 40), torch.ones(1, 40, 40))[0]
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert (found == found[:, :1]).all()
    block.row, block.column = Gives(0.0), Gives(1.0)
    assert (block(m, z, torch.ones(1, 9, 40), torch.ones(1, 40, 40))[0] == 1).all(), "columns lose nothing"


# -- embeddings and recycling -----------------------------------------------------------------------------


def test_inputs_are_embedded_as_in_algorithm_3() -> None:
    layer = _random(model.InputEmbedder(SMALL))
    target, msa = torch.randn(1, N, model.TARGET).double(), torch.randn(1, 3, N, model.MSA).double()
    index = torch.tensor([[3, 4, 5, 40, 41, 90]])
    m, z = layer(target, msa, index)
    for i in range(N):
        for s in range(3):
            torch.testing.assert_close(m[0, s, i], layer.msa(msa[0, s, i]) + layer.target(target[0, i]))
        for j in range(N):
            apart = max(-32, min(32, int(index[0, i] - index[0, j])))
            place = torch.zeros(65).double()
            place[apart + 32] = 1
            wanted = layer.left(target[0, i]) + layer.right(target[0, j]) + layer.position(place)
            torch.testing.assert_close(z[0, i, j], wanted)


def test_recycled_features_are_normalised_and_distances_fall_in_the_nearest_bin() -> None:
    layer = _random(model.RecyclingEmbedder(SMALL)).float()
    c_m, c_z = SMALL.widths.c_m, SMALL.widths.c_z
    first, z = torch.randn(1, N, c_m), torch.randn(1, N, N, c_z)
    beta = torch.zeros(1, N, 3)
    beta[0, :, 0] = torch.tensor([0.0, 3.1, 6.5, 11.3, 20.9, 60.0])
    row, pairs = layer(first, z, beta)
    places = [3.375 + k * (21.375 - 3.375) / 14 for k in range(15)]

    def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
        around = x - x.mean()
        return around / (around.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias

    for i in range(N):
        torch.testing.assert_close(row[0, i], normed(first[0, i], layer.norm_m))
        for j in range(N):
            apart = abs(float(beta[0, i, 0] - beta[0, j, 0]))
            told = torch.zeros(15)
            told[min(range(15), key=lambda k: abs(apart - places[k]))] = 1
            torch.testing.assert_close(
                pairs[0, i, j], normed(z[0, i, j], layer.norm_z) + layer.distance(told)
            )


def test_a_templates_block_attends_before_it_multiplies() -> None:
    """Algorithm 16, unlike the Evoformer's algorithm 6."""
    block = _random(evoformer.TemplateBlock(SMALL.template)).double().eval()
    z, pairs = torch.randn(1, N, N, SMALL.template.c_z).double(), torch.ones(1, N, N).double()
    wanted = z
    for part in (block.starting, block.ending, block.outgoing, block.incoming):
        wanted = wanted + part(wanted, pairs)
    torch.testing.assert_close(block(z, pairs), wanted + block.transition(wanted))
    other = evoformer.PairStack.forward(block, z, pairs)
    assert not torch.allclose(other, block(z, pairs), rtol=1e-3)


def _seen(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[Any]]:
    """The positional arguments of every call of each module."""
    calls: dict[str, list[Any]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
        for name, module in modules.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return calls


def test_each_pass_adds_the_features_recycled_from_the_last_pass_without_gradient() -> None:
    network: Any = model.AlphaFold(SMALL).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    batch = alphafold2.train_batch(alphafold2.built_in_folds(), SMALL, step=0, seed=0)
    parts = {"recycle": network.recycle, "extra": network.extra[0], "block": network.blocks[0]}
    out: list[Any] = []
    calls = _seen(parts, lambda: out.append(network(batch)))
    assert len(calls["recycle"]) == SMALL.recycles + 1 == 2
    with torch.no_grad():
        m, fresh = network.embed(batch["target"], batch["msa"], batch["index"])
        for (first, z, beta), extra, block in zip(*calls.values(), strict=True):
            row, recycled = network.recycle(first, z, beta)
            torch.testing.assert_close(block[0][:, 0], m[:, 0] + row)
            torch.testing.assert_close(block[0][:, 1:], m[:, 1:])
            torch.testing.assert_close(extra[1], fresh + recycled)
    assert not any(t.any() for t in calls["recycle"][0]), "the first pass begins with nothing"
    told = calls["recycle"][1]
    assert all(t.any() for t in told)
    assert not any(t.requires_grad for t in told), "recycling has no gradient"
    found = out[0]
    turned = torch.einsum("nlij,j->nli", found["rotations"][-1:, 0], torch.tensor(model._BETA))
    torch.testing.assert_close(found["beta"][0], found["translations"][-1, 0] + turned[0])


# -- the structure module ---------------------------------------------------------------------------------


def _matrix(vector: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """4 x 4, of the quaternion (1, b, c, d) by its cross products: I + 2 a [v] + 2 [v] [v]."""
    length = (1 + vector.square().sum()).sqrt()
    a, v = 1 / length, vector / length
    zero = torch.zeros_like(a)
    cross = torch.stack([zero, -v[2], v[1], v[2], zero, -v[0], -v[1], v[0], zero]).view(3, 3)
    top = torch.cat([torch.eye(3).double() + 2 * a * cross + 2 * cross @ cross, shift.view(3, 1)], 1)
    return torch.cat([top, torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double()])


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    around = x - x.mean(-1, keepdim=True)
    return around / (around.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def test_frames_are_composed_in_each_round_and_earlier_rotations_carry_no_gradient() -> None:
    widths = structure.StructureWidths(
        c_s=8,
        c_z=4,
        heads=2,
        head_width=3,
        query_points=2,
        value_points=2,
        iterations=3,
        angles=2,
        angle_width=5,
        dropout=0.0,
    )
    module: Any = _random(structure.StructureModule(widths))
    given, z = torch.randn(1, N, 8).double(), torch.randn(1, N, N, 4).double()
    mask = torch.ones(1, N).double()

    def by_hand() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        initial = _norm(given, module.norm_s)
        s, pairs = module.first(initial), _norm(z, module.norm_z)
        placed = [torch.eye(4).double() for _ in range(N)]
        for index in range(3):
            frames = torch.stack(placed)[None]
            s = s + module.attention(s, pairs, frames[..., :3, :3], frames[..., :3, 3], mask)
            s = _norm(s, module.norm_attention)
            s = _norm(s + module.transition(s), module.norm_transition)
            step = module.update(s)[0]
            placed = [t @ _matrix(u[:3], u[3:]) for t, u in zip(placed, step, strict=True)]
            if index < 2:
                placed = [torch.cat([t[:, :3].detach(), t[:, 3:]], 1) for t in placed]
        a = module.angles.first(s.relu()) + module.angles.initial(initial.relu())
        for layers in module.angles.residual:
            a = a + layers[3](layers[1](a.relu()).relu())
        angles = module.angles.out(a.relu()).view(1, N, 2, 2)
        frames = torch.stack(placed)[None]
        return s, torch.cat([frames[..., :3], 10 * frames[..., 3:]], -1), angles  # units of 10 Angstrom

    s, frames, angles = by_hand()
    found = module(given, z, mask)
    torch.testing.assert_close(found.single, s)
    torch.testing.assert_close(found.rotations[-1], frames[..., :3, :3])
    torch.testing.assert_close(found.translations[-1], frames[..., :3, 3])
    torch.testing.assert_close(found.angles[-1], angles)
    weights = list(module.parameters())
    towards = torch.randn(1, N, 3).double()
    one = torch.autograd.grad((found.translations[-1] * towards).sum(), weights, allow_unused=True)
    other = torch.autograd.grad((frames[..., :3, 3] * towards).sum(), weights, allow_unused=True)
    assert sum(g is not None for g in one) > 20
    for left, right in zip(one, other, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


def test_torsion_loss_compares_normalised_angles_and_penalises_their_length() -> None:
    """Algorithm 27, with 0.02 times each length's distance from one."""
    found, held = torch.randn(2, 4, 3, 2).double(), torch.ones(2, 4, 3).double()
    held[0, 1, 2], held[1, 3] = 0, 0
    turned = torch.randn(2, 4, 3).double()
    true = torch.stack([turned.sin(), turned.cos()], -1)
    each = []
    for b in range(2):
        total = count = 0.0
        for i in range(4):
            for k in range(3):
                if held[b, i, k]:
                    sine, cosine = map(float, found[b, i, k])
                    length = math.hypot(sine, cosine)
                    apart = (sine / length - float(true[b, i, k, 0])) ** 2
                    apart += (cosine / length - float(true[b, i, k, 1])) ** 2
                    total, count = total + apart + 0.02 * abs(length - 1), count + 1
        each.append(total / count)
    assert float(structure.torsion_loss(found, true, held)) == pytest.approx(sum(each) / 2, rel=1e-6)


def test_distance_logits_sum_both_directions_and_the_other_heads_match_hand_computation() -> None:
    heads = _random(model.Heads(SMALL))
    widths, c_s = SMALL.widths, SMALL.structure.c_s
    m, z = torch.randn(1, 3, N, widths.c_m).double(), torch.randn(1, N, N, widths.c_z).double()
    single = torch.randn(1, N, c_s).double()
    distance, residue, confidence = heads(m, z, single)
    for i in range(N):
        for j in range(N):
            wanted = heads.distance(z[0, i, j]) + heads.distance(z[0, j, i])
            torch.testing.assert_close(distance[0, i, j], wanted)
    torch.testing.assert_close(residue[0, 2, 1], heads.residue(m[0, 2, 1]))
    layers = heads.confidence.layers
    hidden = layers[3](layers[1](_norm(single, layers[0])).relu()).relu()
    torch.testing.assert_close(confidence, layers[5](hidden))


# -- the loss of fine-tuning ------------------------------------------------------------------------------


def test_violations_are_of_bonds_beyond_12_deviations_and_of_atoms_that_overlap() -> None:
    """Supplement 1.9.11: a real chain has next to none."""
    folds = alphafold2.built_in_folds()
    atoms = torch.tensor(folds.atoms[folds.offset[0] : folds.offset[0] + 30])[None].double()
    mask, follows = torch.ones(1, 30).double(), torch.ones(1, 30).double()
    follows[:, 0] = 0
    assert float(structure.violations(atoms, mask, follows)) < 0.01
    along = torch.nn.functional.normalize(atoms[0, 10, 0] - atoms[0, 9, 2], dim=-1)
    apart = atoms.clone()
    apart[0, 10:] += 2 * along  # angles stay, as the bond is stretched along itself
    length = float((apart[0, 10, 0] - apart[0, 9, 2]).norm())
    found = float(structure.violations(apart, mask, follows) - structure.violations(atoms, mask, follows))
    assert found == pytest.approx((length - 1.329 - 12 * 0.014) / 29, abs=1e-3)
    follows[0, 10] = 0  # a break of the chain is no bond
    assert float(structure.violations(apart, mask, follows)) < 0.01
    clash = torch.zeros(1, 2, 3, 3).double()
    clash[0, 0, :, 1] = torch.tensor([0.0, 10.0, 20.0])
    clash[0, 1] = clash[0, 0] + torch.tensor([1.0, 0.0, 0.0])
    wanted = (1.55 + 1.55 - 1.5 - 1) + 2 * (1.7 + 1.7 - 1.5 - 1)
    found = float(structure.violations(clash, torch.ones(1, 2).double(), torch.zeros(1, 2).double()))
    assert found == pytest.approx(wanted / 6, abs=1e-3)


def test_only_the_size_finetune_is_trained_with_violations() -> None:
    assert alphafold2.make(size="finetune").loss is alphafold2.fine_tuning_loss
    assert alphafold2.make(size="initial").loss is alphafold2.make().loss is alphafold2.loss
