"""Properties of AlphaFold 2 that no forward pass by hand shows: which parts each loss term has gradients for,
published widths, the contents of a batch, and which pairs of which chains the metric counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from alphafold_doubles import PUBLISHED, Gives, drawn
from torch import nn
from torch.autograd import gradcheck

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold import evoformer, model, structure
from memfit.jobs.builtin.alphafold.structure import Frames

Array = np.ndarray[Any, Any]
N = 24
SHAPE = dataclasses.replace(model.small_size(residues=N, batch_size=3), blocks=1, templates=2, rows=4)
LENGTHS = (9, 26, 40, 30, 30)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _folds(lengths: tuple[int, ...] = LENGTHS, train_count: int = 3) -> alphafold2.Folds:
    """Chains whose relatives all have the class 7 higher; an atom's coordinates are its residue's number."""
    offset = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(offset[-1])
    atoms = np.broadcast_to(place[:, None, None], (len(place), 3, 3)).astype(np.float32)
    residue = place * 3 % 20
    profile = np.eye(20, dtype=np.float32)[(residue + 7) % 20]
    return alphafold2.Folds(
        offset=offset, residue=residue, profile=profile, atoms=atoms, train_count=train_count
    )


def _packed(folds: alphafold2.Folds, **changes: Any) -> dict[str, torch.Tensor]:
    shape = dataclasses.replace(SHAPE, **changes)
    chains = np.arange(3)
    return alphafold2.pack(folds, chains, 0 * chains, shape, np.random.default_rng(0))


def _compact(lengths: tuple[int, ...], train_count: int) -> alphafold2.Folds:
    """Residues at random places and in random orientations in a box of 18 Angstrom."""
    folds, rng = _folds(lengths, train_count), np.random.default_rng(5)
    bonds = rng.normal(size=(*folds.atoms.shape[:2], 3))
    bonds *= 1.5 / np.linalg.norm(bonds, axis=-1, keepdims=True)
    bonds[:, structure.CA] = 0
    places = rng.uniform(0, 18, (len(folds.atoms), 1, 3))
    return dataclasses.replace(folds, atoms=(places + bonds).astype(np.float32))


def _batch() -> dict[str, torch.Tensor]:
    """A batch with random templates, which the data does not have."""
    batch = _packed(_compact(LENGTHS, 3))
    return batch | {"template": torch.randn(3, 2, N, N, 88), "template_mask": torch.ones(3, 2)}


# -- which parts each loss term trains --------------------------------------------------------------------

TRUNK = {
    "embed",
    "recycle",
    "template",
    "embed_extra",
    "extra.0.row",
    "extra.0.transition",
    "extra.0.outer",
    "extra.0.pairs",
    "blocks.0.row",
    "blocks.0.column",
    "blocks.0.transition",
}
PAIRS = {"blocks.0.outer", "blocks.0.pairs"}
SINGLE = {"single", "structure.attention", "structure.transition"}
ALL = TRUNK | PAIRS | SINGLE | {"structure.update", "structure.angles"}
HEADS = {"heads.distance", "heads.residue", "heads.confidence"}
TAUGHT = {
    "distance": TRUNK | PAIRS | {"heads.distance"},
    "residue": TRUNK | {"heads.residue"},
    "confidence": TRUNK | PAIRS | SINGLE | {"structure.update", "heads.confidence"},
    "fape": TRUNK | PAIRS | SINGLE | {"structure.update"},
    "auxiliary": ALL,
}


@pytest.mark.parametrize("term", TAUGHT)
def test_each_loss_term_has_gradients_for_exactly_its_expected_parts(term: str) -> None:
    network, batch = drawn(model.AlphaFold(SHAPE)).eval(), _batch()
    alphafold2.terms(network(batch), batch)[term].backward()
    learned = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    found = {part for part in ALL | HEADS if any(name.startswith(f"{part}.") for name in learned)}
    assert found == TAUGHT[term]


def _turned(*shape: int) -> torch.Tensor:
    return structure.rotation_of(torch.randn(*shape, 3).double())


def _learned(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


def test_point_attention_gradients_match_finite_differences() -> None:
    """With respect to the residues, the pairs, and the frames' rotations and translations."""
    widths = structure.StructureWidths(c_s=3, c_z=2, heads=2, head_width=2, query_points=1, value_points=2)
    layer = drawn(structure.InvariantPointAttention(widths)).double()
    s, z, shift = torch.randn(1, 3, 3).double(), torch.randn(1, 3, 3, 2).double(), torch.randn(1, 3, 3)
    given = _learned(s, z, _turned(1, 3), shift.double())
    assert gradcheck(lambda *x: layer(*x, torch.ones(1, 3).double()), given)


def test_aligned_error_gradients_match_finite_differences() -> None:
    """With respect to the predicted frames' rotations and translations, and the predicted points."""
    true, points = Frames(_turned(1, 3), torch.randn(1, 3, 3).double()), torch.randn(1, 4, 3).double()
    held = torch.ones(1, 3).double(), torch.ones(1, 4).double()
    given = _learned(_turned(1, 3), torch.randn(1, 3, 3).double(), torch.randn(1, 4, 3).double() * 8)
    assert gradcheck(lambda r, t, p: structure.fape(Frames(r, t), true, p, points, held), given)


# -- masks and dropout ------------------------------------------------------------------------------------


def test_outer_product_mean_is_over_the_rows_that_have_both_residues() -> None:
    layer, m = drawn(evoformer.OuterProductMean(SHAPE.widths)).double(), torch.randn(1, 6, 4, 48).double()
    rows = (torch.rand(1, 6, 4) < 0.6).double()
    rows[0, 0] = 1
    found, x = layer(m, rows)[0], layer.norm(m[0])
    left, right = layer.left(x), layer.right(x)
    for i, j in np.ndindex(4, 4):
        both = [s for s in range(6) if rows[0, s, i] and rows[0, s, j]]
        outer = torch.stack([torch.outer(left[s, i], right[s, j]) for s in both]).sum(0)
        torch.testing.assert_close(found[i, j], layer.product.out(outer.flatten()) / (len(both) + 1e-3))


@pytest.mark.parametrize("starting", [True, False])
def test_triangle_attention_ignores_a_masked_pair_but_not_its_transpose(starting: bool) -> None:
    layer = drawn(evoformer.TriangleAttention(SHAPE.widths, starting=starting))
    nn.init.zeros_(layer.bias.weight.weight)
    z, pairs, (i, k) = torch.randn(1, 5, 5, 32), torch.ones(1, 5, 5), (0, 3) if starting else (3, 0)
    pairs[0, i, k] = 0
    for place, seen in (((i, k), False), ((k, i), True)):
        changed = z.clone()
        changed[0, place[0], place[1]] = torch.randn(32)
        apart = (layer(changed, pairs) - layer(z, pairs)).abs()[0]
        line = apart[place[0]] if starting else apart[:, place[1]]  # the edges that share its node
        assert bool(line[[1, 2, 4]].max() > 1e-5) == seen


def test_a_masked_residue_stays_hidden_even_under_a_large_attention_bias() -> None:
    layer = drawn(evoformer.RowAttention(SHAPE.widths))
    nn.init.constant_(layer.bias.weight.weight, 1e6)
    m, z, rows = torch.randn(1, 1, 5, 48), torch.randn(1, 5, 5, 32), torch.ones(1, 1, 5)
    rows[..., -1] = 0
    other = m.clone()
    other[:, :, -1] = torch.randn(48)
    assert (layer(m, z, rows) == layer(other, z, rows))[:, :, :-1].all()


def test_dropout_drops_updates_but_not_the_residual_and_differs_between_samples() -> None:
    kept = evoformer.SharedDropout(0.5, 1).train()(torch.ones(3, 4, 20, 20))
    assert not (kept[0] == kept[1]).all()
    block: Any = evoformer.EvoformerBlock(SHAPE.widths).train()
    block.column, block.transition, block.pairs.transition = Gives(0.0), Gives(0.0), Gives(0.0)
    block.row, block.dropout.p = Gives(1.0), 1.0
    m, z = torch.randn(1, 4, 5, 48), torch.randn(1, 5, 5, 32)
    assert (block(m, z, torch.ones(1, 4, 5), torch.ones(1, 5, 5))[0] == m).all()
    for name in ("outgoing", "incoming", "starting", "ending"):
        setattr(block.pairs, name, Gives(1.0))
    block.pairs.by_row.p = block.pairs.by_column.p = 1.0
    assert (block.pairs(z, torch.ones(1, 5, 5)) == z).all()


# -- the published sizes ----------------------------------------------------------------------------------


def _published() -> Any:
    """The published network on the meta device, with one block of each stack, as its blocks are alike."""
    with torch.device("meta"):
        return model.AlphaFold(dataclasses.replace(PUBLISHED, blocks=1, extra_blocks=1, template_blocks=1))


def _shapes(module: nn.Module, *names: str) -> list[tuple[int, ...]]:
    return [tuple(module.get_submodule(name).weight.shape) for name in names]  # type: ignore[arg-type]


def test_the_templates_stack_has_its_published_widths() -> None:
    """Supplement 1.7.1, algorithms 16 and 17: 64 channels, 4 heads of 16, a transition of twice the width."""
    templates = _published().template
    pairs = templates.blocks[0]
    found = _shapes(pairs, "outgoing.left.value", "incoming.out", "transition.up")
    assert found == [(64, 64), (64, 64), (128, 64)]
    for attention in (pairs.starting.attention, pairs.ending.attention):
        assert (attention.heads, *attention.query.weight.shape) == (4, 64, 64)
    assert templates.heads == 4
    assert _shapes(templates, "query", "key", "value", "out") == [(64, 128), (64, 64), (64, 64), (128, 64)]


def test_the_extra_stack_has_its_published_widths() -> None:
    """Supplement 1.7.2, algorithms 18 and 19: 64 channels, 8 heads of 8, one query per column."""
    network = _published()
    block = network.extra[0]
    assert network.embed_extra.weight.shape == (64, 25)
    assert (block.row.attention.heads, *block.row.attention.query.weight.shape) == (8, 64, 64)
    assert isinstance(block.column.attention, evoformer.GlobalAttention)
    assert block.column.attention.heads == 8
    assert _shapes(block.column.attention, "query", "key", "value") == [(64, 64), (8, 64), (8, 64)]


def test_the_structure_module_has_its_published_widths() -> None:
    """Algorithms 20, 22 and 29: 12 heads of 16, 4 and 8 points; 2 blocks of 128 for 7 angles."""
    network = _published()
    module = network.structure
    attention, angles = module.attention, module.angles
    points = _shapes(attention, "query_points", "key_points", "value_points")
    assert _shapes(attention, "query", "key", "value", "bias") == [(12 * 16, 384)] * 3 + [(12, 128)]
    assert points == [(12 * 4 * 3, 384)] * 2 + [(12 * 8 * 3, 384)]
    assert _shapes(angles, "first", "initial", "out") == [(128, 384), (128, 384), (14, 128)]
    blocks = [[tuple(x.weight.shape) for x in b if isinstance(x, nn.Linear)] for b in angles.residual]
    assert blocks == [[(128, 128)] * 2] * 2
    assert [tuple(x.weight.shape) for x in module.transition if isinstance(x, nn.Linear)] == [(384, 384)] * 3
    linear = [tuple(x.weight.shape) for x in network.heads.confidence.layers if isinstance(x, nn.Linear)]
    assert linear == [(128, 384), (128, 128), (50, 128)]


def test_norms_have_epsilon_1e_5_and_queries_keys_and_values_have_no_bias() -> None:
    network, kinds = _published(), (evoformer.Attention, evoformer.GlobalAttention, evoformer.Templates)
    assert {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    attending = [m for m in network.modules() if isinstance(m, kinds)]
    assert len(attending) == 1 + 3 * 2 + 2 * 2
    assert all(p.bias is None for m in attending for p in (m.query, m.key, m.value))


def test_the_published_jobs_recycle_once_and_fine_tuning_has_longer_crops_of_more_rows() -> None:
    """Supplement 1.11.3 and table 4; recycling once needs as much memory as recycling three times."""
    assert PUBLISHED.recycles == 1
    for size, wanted in (("paper", (256, 128, 1024)), ("finetune", (384, 512, 5120))):
        shape = alphafold2._shape(size, None, None)
        assert (shape.residues, shape.rows, shape.extra_rows) == wanted
    optimizer = alphafold2.make(size="paper").optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.eps) == ("adam", 1e-3, 1e-6)


def test_residual_outputs_are_initialised_to_zero_and_inputs_by_their_width() -> None:
    """Supplement 1.11.4."""
    network = model.AlphaFold(SHAPE)
    for name in ("template.out", "structure.attention.out", "structure.update", "heads.distance"):
        assert not any(p.detach().any() for p in network.get_submodule(name).parameters()), name
    for layer in (network.embed.msa, network.embed.position, network.single):
        assert float(layer.weight.detach().std()) == pytest.approx(layer.in_features**-0.5, rel=0.1)


def test_lddt_has_thresholds_of_half_one_two_and_four_angstrom() -> None:
    true = torch.tensor([[[0.0, 0, 0], [10.0, 0, 0]]])
    off = torch.tensor([0.4, 0.6, 0.9, 1.1, 1.9, 2.1, 3.9, 4.1, 7.9])
    found = [float(structure.lddt(true * (1 + x / 10), true, torch.ones(1, 2))[0, 0]) for x in off]
    assert found == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]


# -- data -------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_atoms_and_classes_of_the_chain_at_every_residue() -> None:
    folds, batch = _folds(), _packed(_folds())
    assert batch["mask"].sum(1).tolist() == [9, 24, 24]
    assert (batch["index"] == torch.arange(N)).all()
    assert float(batch["template_mask"].abs().max()) == 0
    for b, start in enumerate(folds.offset[:3]):
        count = int(batch["mask"][b].sum())
        held, kinds = slice(count), torch.tensor(folds.residue[start : start + count])
        assert (batch["atoms"][b, held] == torch.arange(start, start + count)[:, None, None]).all()
        assert float(batch["atoms"][b, count:].abs().sum()) == 0
        assert (batch["target"][b, held].argmax(-1) == kinds).all()
        assert (batch["residue"][b, 0, held] == kinds).all()  # the chain itself, hidden or not
        assert (batch["residue"][b, 1:, held] == (kinds + 7) % 20).all()
        assert (batch["extra"][b, :, held, :23].argmax(-1) == (kinds + 7) % 20).all()
        shares, own = batch["msa"][b, :, held, 25:48], batch["msa"][b, :, held, :23]
        relatives = torch.stack([r[torch.arange(count), (kinds + 7) % 20] for r in shares])
        assert (relatives.max(0).values > 0.9).all()  # of the row with the 16 relatives in its cluster
        assert sum(bool((r == o).all()) for r, o in zip(shares, own, strict=True)) >= 3  # rows without any
    assert all((batch[name][..., :23].sum(-1) == 1).all() for name in ("msa", "extra"))
    assert not any(part.any() for part in (batch["msa"][..., 23:25], batch["msa"][..., 48:]))  # deletions
    assert not batch["extra"][..., 23:].any()


def test_each_row_masks_a_different_fifteen_percent_and_nothing_beyond_the_chain() -> None:
    batch = _packed(_folds(), rows=600)
    hidden, mask = batch["hidden"], batch["mask"][:, None].expand(-1, 600, -1)
    assert float(hidden[mask == 0].abs().sum()) == 0
    assert float(hidden[mask > 0].mean()) == pytest.approx(0.15, abs=0.01)
    assert float(hidden.mean(1)[batch["mask"] > 0].max()) < 0.25  # no place is hidden in all rows
    assert float(hidden.sum(1)[batch["mask"] > 0].min()) > 0


def test_extra_rows_differ_from_the_rows_of_the_alignment() -> None:
    batch = _packed(dataclasses.replace(_folds(), profile=np.full((sum(LENGTHS), 20), 0.05, np.float32)))
    extra, rows = batch["extra"][:, :, None, :, :23].argmax(-1), batch["residue"][:, None]
    assert float((extra == rows)[..., :9].double().mean(-1).max()) < 0.9


def test_crops_begin_anywhere_in_a_longer_chain() -> None:
    folds = _folds()
    drawn = [alphafold2.train_batch(folds, SHAPE, step=step, seed=0)["atoms"] for step in range(60)]
    begun = {int(at) for atoms in drawn for at in atoms[:, 0, 0, 0]}
    assert {at for at in begun if at < 9 + 26} == {0, 9, 10, 11}  # 24 of 9 and of 26 residues
    longest = [at - 35 for at in begun if at >= 35]
    assert (min(longest), max(longest)) == (0, 40 - N)
    assert len(longest) > 10


def test_class_losses_are_computed_in_single_precision() -> None:
    batch = _batch()
    out = dict(drawn(model.AlphaFold(SHAPE)).eval()(batch))
    low = out | {name: out[name].bfloat16() for name in ("distance", "residue", "confidence")}
    found, wanted = (
        alphafold2.terms(low, batch),
        alphafold2.terms({k: v.float() for k, v in low.items()}, batch),
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- the metric -------------------------------------------------------------------------------------------


class _Guesses(nn.Module):
    """Predicts random distances, and records the logits with the atoms they were predicted for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.told = nn.Parameter(torch.zeros(1)), []  # type: ignore[var-annotated]

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = 3 * torch.randn(len(batch["mask"]), N, N, 64)
        self.told += zip(logits, batch["atoms"], strict=True)
        return {"distance": logits}


def _chain(folds: alphafold2.Folds, chain: int) -> Array:
    return np.asarray(folds.atoms[folds.offset[chain] : folds.offset[chain + 1]][:N])


def _touching(atoms: Array) -> Array:
    """Whether the beta carbons of two residues are within 8 Angstrom."""
    n, ca, c = atoms.astype(np.float64).swapaxes(0, 1)
    across = np.cross(ca - n, c - ca)
    beta = ca - 0.58273431 * across + 0.56802827 * (ca - n) - 0.54067466 * (c - ca)
    return np.asarray(np.linalg.norm(beta[:, None] - beta, axis=-1) < 8)


def _precision(scores: Array, atoms: Array) -> float:
    """Precision of the best-scoring pairs 12 or more apart along the chain, half as many as residues."""
    count, touching = len(atoms), _touching(atoms)
    pairs = [(i, j) for i in range(count) for j in range(i + 12, count)]
    best = sorted(pairs, key=lambda pair: -scores[pair])[: count // 2]
    return float(np.mean([touching[pair] for pair in best]))


def test_contact_precision_counts_the_likeliest_pairs_of_the_held_out_chains() -> None:
    folds, guesses = _compact((24, 20, 24, 22, 30, 21, 24), 2), _Guesses()
    found, wanted = alphafold2.contact_precision(guesses, folds, SHAPE), []
    near = np.arange(64) * 20 / 64 + 2.3125 <= 8  # where the bins end, Angstrom
    for chain, (logits, atoms) in enumerate(guesses.told, start=2):
        true = _chain(folds, chain)
        assert (atoms.numpy()[: len(true)] == true).all()
        wanted.append(_precision(logits.double().softmax(-1).numpy()[..., near].sum(-1), true))
    assert len(wanted) == 5
    assert found == pytest.approx(100 * np.mean(wanted))


def test_the_naive_ranking_is_fitted_to_the_training_chains() -> None:
    folds = _compact((24, 24, 24, 24, 24, 24, 22, 23, 24), 4)
    atoms = np.concatenate([np.tile(folds.atoms[:24], (4, 1, 1)), folds.atoms[4 * 24 :]])  # four of a kind
    folds = dataclasses.replace(folds, atoms=atoms)
    touching = _touching(_chain(folds, 0))
    prior = np.array([touching.diagonal(apart).mean() if apart >= 12 else 0 for apart in range(N)])
    scores = prior[np.abs(np.subtract.outer(np.arange(N), np.arange(N)))]
    wanted = [_precision(scores, _chain(folds, chain)) for chain in range(4, 9)]
    assert alphafold2.metric(folds, SHAPE).naive == pytest.approx(100 * np.mean(wanted))
