"""The built-in jobs of chemistry and genetics: molecules, genome, potential."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_jobs import operators_of_a_step
from torch._subclasses.fake_tensor import FakeTensorMode

from memfit.jobs import registry
from memfit.jobs.builtin import (
    genome,
    hyena,
    molecules,
    molformer,
    next_token,
    potential,
    schnet,
    smiles,
)
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_blocks
from memfit.techniques import fp32_modules
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan, Use, use
from memfit.worker.degraded_training import scores_by_endpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(spec: str, **options: Any) -> Job:
    return registry.load(JobRef(spec=spec, **options))


# -- all three ------------------------------------------------------------------------------------------

JOBS = ("molecules", "genome", "potential")


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest, listed: str) -> Job:
    """Each job with a batch of four; molecules come from a list, as their package may not be installed."""
    return load(request.param, batch=4, **({"data": listed} if request.param == "molecules" else {}))


def test_a_batch_depends_on_step_and_seed_alone(job: Job) -> None:
    first, again = job.make_batch(4, 7), job.make_batch(4, 7)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(t.shape[0] == 4 for t in first.values())
    for step, seed in ((5, 7), (4, 8)):
        assert any(not torch.equal(first[k], job.make_batch(step, seed)[k]) for k in first)


def test_fake_and_real_steps_run_the_same_operators(job: Job) -> None:
    real = operators_of_a_step(job, fake=False)
    assert len(real) > 100
    assert operators_of_a_step(job, fake=True) == real


def test_the_loss_of_a_batch_is_the_mean_over_its_halves(job: Job) -> None:
    torch.manual_seed(0)
    model, whole = job.build_model(), job.make_batch(0, 0)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    mean = sum(float(job.loss(model, half).detach()) for half in halves) / 2
    assert mean == pytest.approx(float(job.loss(model, whole).detach()), rel=1e-5)


def test_every_parameter_is_trained_and_blocks_are_where_the_job_says(job: Job) -> None:
    model = job.build_model()
    job.loss(model, job.make_batch(0, 0)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert find_blocks(model)[0] == job.blocks == "blocks"
    assert bool(fp32_modules.find(model, job.islands)) == (job.name != "molecules")


@pytest.mark.parametrize("name", JOBS)
def test_an_untrained_model_is_no_better_than_naive(name: str) -> None:
    if name == "molecules":
        pytest.importorskip("chemicals", reason="not installed: chemicals")
    torch.manual_seed(0)
    job = load(name)
    assert job.evaluate is not None
    assert job.metric is not None
    model = job.build_model()
    value = scores_by_endpoint(job, job.evaluate(model))[job.metric.name]
    assert model.training, "evaluation gives the model back as it was"
    assert value > job.metric.naive - job.metric.margin


# -- molecules ------------------------------------------------------------------------------------------

BUTANES = "".join(
    f"{'C' * n},{n / 2}\nC1CC1{'C' * n}O,{n / 3}\nC1CCC1{'N' * n},{-n / 4}\n" for n in range(1, 9)
)


@pytest.fixture
def listed(tmp_path: Path) -> str:
    file = tmp_path / "molecules.csv"
    file.write_text("smiles,logp\n" + BUTANES)
    return str(file)


def test_a_smiles_string_is_parsed_into_atoms_and_bonds() -> None:
    atoms, bonds = smiles.graph("C[C@@H](O)c1cc(Cl)ccn1.[Na+]")
    assert atoms == ["C", "C", "O", "C", "C", "C", "CL", "C", "C", "N", "NA"]
    assert (3, 9) in bonds, "the ring is closed"
    assert all(len(atoms) - 1 not in bond for bond in bonds), "a salt's ion is bound to nothing"
    for broken in ("C1CC", "C(C", "C)C"):
        with pytest.raises(ValueError, match=r"not opened|not closed"):
            smiles.graph(broken)


def test_a_ring_skeleton_ignores_side_chains_and_the_way_of_writing() -> None:
    toluene = smiles.ring_skeleton("CC1=CC=CC=C1")
    assert toluene == smiles.ring_skeleton("c1ccccc1C(=O)OCC") != ""
    assert smiles.ring_skeleton("CCCO") == ""
    joined = smiles.ring_skeleton("C1CCCC1CC2CCCC2C")
    assert joined == smiles.ring_skeleton("OC1CCCC1CC%12CCCC%12")
    assert (
        len({joined, toluene, smiles.ring_skeleton("C1CCCC1CCC2CCCC2"), smiles.ring_skeleton("C1CCNC1")}) == 4
    )


def test_no_ring_skeleton_is_in_both_training_and_test_molecules(listed: str) -> None:
    found = molecules.split_by_skeleton(molecules._read_user_file(listed), 72, "")
    assert len(found.smiles) == 24
    skeletons = [smiles.ring_skeleton(text) for text in found.smiles]
    assert found.train_count == 16
    assert not set(skeletons[:16]) & set(skeletons[16:])
    assert len(molecules.split_by_skeleton(molecules._read_user_file(listed), 12, "").smiles) < 24, (
        "longer ones are left out"
    )


def test_a_skeleton_of_nearly_all_molecules_is_split_and_the_source_says_so(listed: str) -> None:
    chains = [("C" * n, float(n)) for n in range(1, 19)]
    for pairs in (chains, [("C1CC1", 0.0), *chains]):
        found = molecules.split_by_skeleton(pairs, 72, "mine")
        assert found.train_count == int(0.8 * len(pairs))
        assert found.scale[1] > 1
        assert found.source.startswith("mine: one ring skeleton has over four fifths")
    assert molecules.split_by_skeleton(molecules._read_user_file(listed), 72, "mine").source == "mine"


def test_padding_does_not_change_a_prediction() -> None:
    torch.manual_seed(0)
    model = molformer.Molformer(dataclasses.replace(molecules._shape("tiny"), layers=2))
    tokens = torch.randint(3, 50, (2, 20))
    short, _ = model(tokens, tokens > 0)
    padded = torch.nn.functional.pad(tokens, (0, 30))
    assert torch.allclose(model(padded, padded > 0)[0], short, atol=1e-6)


def test_linear_attention_is_a_weighted_mean() -> None:
    """Compared with the weights of every pair computed explicitly."""
    torch.manual_seed(0)
    attention = molformer.LinearAttention(4, 8)
    query, key, value = torch.randn(3, 1, 1, 5, 4)
    valid = torch.tensor([[True, True, True, True, False]])
    asked, held = (torch.relu(x @ attention.directions) + 1e-3 for x in (query, key))
    weights = (asked[0, 0, :, None] * held[0, 0, None, :4]).sum(-1)
    wanted = (weights / weights.sum(1, keepdim=True)) @ value[0, 0, :4]
    assert torch.allclose(attention(query, key, value, valid)[0, 0], wanted, atol=1e-5)


def test_the_users_molecules_make_batches_and_bad_files_are_refused(listed: str, tmp_path: Path) -> None:
    job = load("molecules", data=listed, batch=4)
    batch = job.make_batch(0, 0)
    assert batch["tokens"].shape == (4, 72)
    assert torch.equal(batch["valid"], batch["tokens"] > 0)
    assert job.metric is not None
    assert job.metric.naive > 0
    broken = tmp_path / "broken.csv"
    for text, line in (("C,1\nC1CC,2\n", 2), ("C1CC,2\nC,1\n", 1)):
        broken.write_text(text)
        with pytest.raises(UserError, match=rf"line {line}: broken SMILES string: a ring or branch"):
            load("molecules", data=str(broken))
    broken.write_text("C,1\n,2\n")
    with pytest.raises(UserError, match="line 2: broken SMILES string: it has no atom"):
        load("molecules", data=str(broken))
    for text, place in (("1CC1,2\nC,1\n", "no atom"), ("C11,2\nC,1\n", "the same atom twice")):
        broken.write_text(text)
        with pytest.raises(UserError, match=f"broken SMILES string: the ring number 1 follows {place}"):
            load("molecules", data=str(broken))
    broken.write_text("C,1\nCC,nan\n")
    with pytest.raises(UserError, match="line 2: no finite number follows the SMILES string: nan"):
        load("molecules", data=str(broken))
    broken.write_text("C,1\nCC,2\n")
    with pytest.raises(UserError, match="allowed: at least 10"):
        load("molecules", data=str(broken))


def test_molecules_without_their_package_name_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'memfit\[science\]'"):
        load("molecules")


def test_measured_molecules_have_centred_values_and_a_plausible_naive_error() -> None:
    pytest.importorskip("chemicals", reason="not installed: chemicals")
    job = load("molecules")
    assert job.metric is not None
    assert 1.2 < job.metric.naive < 1.6
    values = torch.cat([job.make_batch(i, 0)["value"] for i in range(20)])
    assert abs(float(values.mean())) < 0.1


def test_labels_are_set_exactly_at_masked_tokens(listed: str) -> None:
    job = load("molecules", data=listed, size="paper", batch=16)
    batch = job.make_batch(0, 0)
    asked = batch["labels"] >= 0
    assert (batch["tokens"][asked] == 2).all()
    assert not (batch["tokens"][~asked] == 2).any()
    assert batch["valid"][asked].all()


# -- genome ---------------------------------------------------------------------------------------------

SMALL = hyena.HyenaSize(layers=2, width=8, filter_width=4, kmer=3, vocabulary=64, length=32, batch_size=2)


def test_the_long_convolution_equals_the_explicit_causal_sum() -> None:
    torch.manual_seed(0)
    x, taps = torch.randn(2, 3, 9), torch.randn(3, 9)
    wanted = torch.stack([sum(taps[:, j] * x[:, :, i - j] for j in range(i + 1)) for i in range(9)], dim=-1)
    assert torch.allclose(hyena.causal_convolution(x, taps), wanted, atol=1e-5)


def test_no_base_depends_on_later_bases() -> None:
    torch.manual_seed(0)
    model = hyena.HyenaDna(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 64, (1, 32))
    other = tokens.clone()
    other[0, 20:] = torch.randint(0, 64, (12,))
    one, two = model(tokens), model(other)
    assert torch.allclose(one[0, :20], two[0, :20], atol=1e-4)
    assert not torch.allclose(one[0, 20:], two[0, 20:], atol=1e-2)


def test_the_chromosome_is_complete_and_words_encode_its_bases() -> None:
    found = genome.read(None, 1024)
    assert (len(found.train), len(found.test)) == (4_445_028, 493_892)
    assert "".join("ACGT"[b] for b in found.train[:10]) == "AGCTTTTCAT"
    assert genome.words(np.array([0, 1, 2, 3], np.uint8), 2).tolist() == [0b0001, 0b0110, 0b1011]


def test_the_target_of_each_word_is_the_base_that_follows() -> None:
    bases = np.arange(400, dtype=np.uint8) % 4
    batch = genome.train_batch(bases, SMALL, 2, step=0, seed=0)
    assert torch.equal(batch["tokens"] % 4, (batch["next"] + 3) % 4)
    assert batch["tokens"].shape == batch["next"].shape == (2, 32)


def test_markov_chains_need_fewer_bits_with_more_context() -> None:
    found = genome.read(None, 1024)
    places = genome.scored_positions(found, genome._shape("tiny"))
    bits = [genome.markov_bits(found, places[places >= 8], order) for order in (0, 2, 4)]
    assert bits == pytest.approx([2.000, 1.965, 1.945], abs=0.002)


def test_markov_bits_match_a_hand_computation() -> None:
    """AC repeated: C always follows A; eight pairs are seen, and one is added to each of four counts."""
    repeated = next_token.Corpus(
        train=np.tile(np.array([0, 1], np.uint8), 8), test=np.array([0, 1], np.uint8), source=""
    )
    assert genome.markov_bits(repeated, np.array([1]), 1) == pytest.approx(-np.log2(9 / 12))


def test_the_users_dna_is_read_and_refused_if_too_short(tmp_path: Path) -> None:
    file = tmp_path / "dna.fasta"
    file.write_text(">a\nACGTNNacgt\n>b\n" + "ACGGT" * 80)
    assert len(genome._fasta(str(file))) == 408
    with pytest.raises(UserError, match=r"408 bases of DNA are too few for .*; allowed: at least 2284 "):
        load("genome", data=str(file))


def test_a_few_thousand_bases_have_the_margin_of_the_built_in_chromosome(tmp_path: Path) -> None:
    file = tmp_path / "plasmid.fasta"
    file.write_text(">a\n" + "".join(np.random.default_rng(0).choice(list("ACGT"), 3000)))
    metric = load("genome", data=str(file), length=32).metric
    assert metric is not None
    assert metric.margin == 0.0036
    assert "on the chromosome of Escherichia coli 536" in metric.margin_source
    built_in = load("genome").metric
    assert built_in is not None
    assert built_in.margin == pytest.approx(0.0036, abs=5e-5)
    assert "on the same bases" in built_in.margin_source


# -- potential ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames() -> potential.MoleculeFrames:
    return potential.read(None)


@pytest.fixture(scope="module")
def small(frames: potential.MoleculeFrames) -> schnet.SchnetSize:
    return dataclasses.replace(potential._shape("tiny", frames), layers=2, width=16, filters=8, radial=12)


def inputs(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(batch[name] for name in ("species", "positions", "near", "within"))


def test_forces_are_the_negative_gradient_of_the_energy(
    frames: potential.MoleculeFrames, small: schnet.SchnetSize
) -> None:
    torch.manual_seed(0)
    model = schnet.Schnet(small).double()
    species, positions, near, within = inputs(potential.train_batch(frames, small, 2, step=0, seed=0))
    positions = positions.double()
    with torch.no_grad():
        forces = model(species, positions, near, within)[1]
        for atom, axis in ((0, 0), (2, 1)):
            moved = positions.clone()
            moved[1, atom, axis] += 1e-4
            other = positions.clone()
            other[1, atom, axis] -= 1e-4
            above, below = (model(species, p, near, within)[0][1] for p in (moved, other))
            assert float(below - above) / 2e-4 == pytest.approx(float(forces[1, atom, axis]), abs=1e-6)


def test_force_errors_have_right_gradients_and_the_loss_trains_every_parameter(
    frames: potential.MoleculeFrames, small: schnet.SchnetSize
) -> None:
    """The gradient of a force error, which is a second derivative, against a finite difference."""
    torch.manual_seed(0)
    model = schnet.Schnet(small).double()
    batch = potential.train_batch(frames, small, 2, step=0, seed=0)
    species, positions, near, within = inputs(batch)

    def error() -> torch.Tensor:
        return model(species, positions.double(), near, within)[1].square().mean()

    error().backward()
    weight = model.blocks[0].filter_one.weight
    slope = float(weight.grad[3, 5])
    with torch.no_grad():
        weight[3, 5] += 1e-5
        above = float(error())
        weight[3, 5] -= 2e-5
        assert (above - float(error())) / 2e-5 == pytest.approx(slope, rel=1e-4)
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["energy.two.bias"], "a constant has no slope; the energy's own error trains it"
    potential.loss(model.float(), batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_energy_is_invariant_and_forces_rotate_with_the_molecule(
    frames: potential.MoleculeFrames, small: schnet.SchnetSize
) -> None:
    torch.manual_seed(0)
    model = schnet.Schnet(small)
    batch = potential.pack(frames, np.array([[5]]), small)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    moved = dataclasses.replace(frames, positions=frames.positions @ turn.numpy() + np.float32([3, -1, 2]))
    energy, forces = model(*inputs(batch))
    other_energy, other_forces = model(*inputs(potential.pack(moved, np.array([[5]]), small)))
    assert torch.allclose(energy, other_energy, atol=1e-5)
    assert torch.allclose(forces @ turn, other_forces, atol=1e-5)
    assert forces.sum(1).abs().max() < 1e-5, "nothing pulls the whole molecule"


def test_padding_and_atoms_beyond_the_cutoff_add_no_energy(
    frames: potential.MoleculeFrames, small: schnet.SchnetSize
) -> None:
    torch.manual_seed(0)
    model = schnet.Schnet(small)
    alone = potential.pack(frames, np.array([[0]]), small)
    two = dataclasses.replace(small, atoms=26, neighbours=14)
    both = potential.pack(frames, np.array([[0, 1000]]), two)
    assert both["near"].shape == (1, 26, 14)
    assert not both["within"][both["species"] == 0].any()
    apart = both["positions"][0, 11:22].mean(0) - both["positions"][0, :5].mean(0)
    both["positions"][0, 11:22] += 3 * apart  # out of the cutoff; the list of neighbours still has them
    first, second = (
        model(*inputs(alone))[0],
        model(*inputs(potential.pack(frames, np.array([[1000]]), small)))[0],
    )
    assert torch.allclose(model(*inputs(both))[0], first + second, atol=1e-5)


def test_molecules_that_share_a_sample_are_out_of_each_others_reach(frames: potential.MoleculeFrames) -> None:
    size = potential._shape("paper", frames)
    batch = potential.train_batch(frames, size, 2, step=0, seed=0)
    molecule = torch.arange(size.atoms) // frames.species.shape[1]
    in_another = molecule[batch["near"]] != molecule[:, None]
    assert batch["within"].any()
    assert not (batch["within"] & in_another).any()


def test_neighbours_are_the_nearest_within_the_cutoff(small: schnet.SchnetSize) -> None:
    line = np.zeros((1, 4, 3), np.float32)
    line[0, :, 0] = [0, 1, 3, 99]
    size = dataclasses.replace(small, atoms=4, neighbours=2, cutoff=2.5)
    near, within = potential.neighbours(np.array([[1, 1, 1, 0]]), line, size)
    assert near[0, :3].tolist() == [[1, 2], [0, 2], [1, 0]]
    assert within[0].tolist() == [[True, False], [True, True], [True, False], [False, False]]


def test_at_least_two_test_molecules_have_formulas_unseen_in_training(
    frames: potential.MoleculeFrames,
) -> None:
    formulas = [tuple(sorted(row[row > 0])) for row in frames.species]
    train, test = set(formulas[: frames.train_count]), set(formulas[frames.train_count :])
    assert (frames.train_count, len(formulas), len(test)) == (1980, 2340, 4)
    assert len(test - train) >= 2, "some are isomers of what is trained on"
    assert frames.energy.std() < 1, "of hundreds of eV, elements account for the rest"


def test_the_naive_result_is_that_of_a_pair_potential(frames: potential.MoleculeFrames) -> None:
    naive = potential.metric(frames)
    assert naive.naive == pytest.approx(385, abs=2)
    assert "no force at all: 753" in naive.naive_name
    terms = potential.pair_forces(frames, np.arange(1)).reshape(11, 3, -1)
    assert np.abs(terms.sum(0)).max() < 1e-5, "action and reaction"


@pytest.mark.parametrize(
    "technique",
    [
        use("activation-checkpointing", every=1),
        use("selective-checkpointing", keep="matmul"),
        use("selective-checkpointing", keep="every-second-matmul"),
    ],
)
def test_checkpointing_a_twice_differentiated_model_changes_no_bit(technique: Use) -> None:
    job = load("potential", batch=2)
    batch, found = job.make_batch(0, 0), []
    for plan in (Plan(), Plan(uses=(technique,))):
        torch.manual_seed(0)
        found.append(TrainingStep(job, plan).run(batch))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_potential_refuses_a_length_and_wrong_data_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not accept --length: its samples are molecules"):
        load("potential", size="tiny@64")
    np.savez(tmp_path / "frames.npz", numbers=np.zeros((1, 3)))
    with pytest.raises(UserError, match=r"allowed: a NumPy file .npz with the arrays numbers, molecule"):
        load("potential", data=str(tmp_path / "frames.npz"))
    with pytest.raises(UserError, match="No such file"):
        load("potential", data=str(tmp_path / "absent.npz"))
    for sizes, message in (
        ({"atoms": 5, "neighbours": 4}, "5 atoms .* cannot hold the largest molecule; allowed: at least "),
        ({"neighbours": 50}, "cannot have 50 neighbours .*; allowed: 1 to "),
    ):
        with pytest.raises(UserError, match=message):
            load("potential", dimensions=sizes)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "frames.npz").read_bytes()[:60])
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name in ("cut.npz", "one.npz"):
        with pytest.raises(UserError, match="cannot be read, or lacks an array"):
            load("potential", data=str(tmp_path / name))


def _frames(**changes: Any) -> dict[str, Any]:
    """Arrays for `potential`: four frames of two molecules of three atoms, of which the first is for
    training."""
    rng = np.random.default_rng(0)
    arrays = {
        "numbers": np.array([[8, 1, 1], [6, 1, 0]]),
        "molecule": np.array([0, 0, 1, 1]),
        "energy": rng.normal(size=4),
        "positions": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "forces": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "train_molecules": np.array(1),
    }
    return arrays | {name: np.asarray(value) for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"molecule": [1, 0, 0, 1]}, "a molecule for testing comes before one of a molecule for training"),
        ({"train_molecules": 2}, "4 of its 4 frames are of molecules below train_molecules"),
        ({"train_molecules": 0}, "0 of its 4 frames"),
        ({"molecule": [0, 0, 1, 2]}, "molecule has other indices than 0 to 1"),
        ({"molecule": [0.0, 0.0, 1.0, 1.0]}, "not whole numbers"),
        ({"numbers": [[8, 1, 1], [6, -1, 0]]}, "numbers are not atomic numbers"),
        ({"energy": [1.0, 2.0]}, r"energy has the shape \(2,\), not \(4,\)"),
        ({"energy": ["a", "b", "c", "d"]}, "energy has values that are not finite real numbers"),
        ({"positions": np.full((4, 3, 3), np.nan)}, "positions has values that are not finite real numbers"),
        ({"forces": np.zeros((4, 2, 3))}, r"forces has the shape \(4, 2, 3\), not \(4, 3, 3\)"),
    ],
)
def test_potential_refuses_arrays_of_other_shapes_values_and_order(
    changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "frames.npz", **_frames())
    job = load("potential", data=str(tmp_path / "frames.npz"), batch=2)
    assert job.make_batch(0, 0)["species"].tolist() == [[8, 1, 1], [8, 1, 1]]
    np.savez(tmp_path / "frames.npz", **_frames(forces=np.zeros((4, 3, 3))))
    assert potential.read(str(tmp_path / "frames.npz")).forces.dtype == np.float32
    np.savez(tmp_path / "frames.npz", **_frames(**changes))
    with pytest.raises(UserError, match=fault):
        load("potential", data=str(tmp_path / "frames.npz"))


# -- published sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("molecules", 46.8),  # MoLFormer-XL as published, github.com/IBM/molformer: 47 M
        ("genome", 6.55),  # hyenadna-large-1m: 6.6 M
        ("potential", 9.09),  # SchNet of Open Catalyst 2020: 9.1 M
    ],
)
def test_paper_sizes_have_the_published_number_of_parameters(name: str, millions: float, listed: str) -> None:
    with FakeTensorMode():
        options = {"data": listed} if name == "molecules" else {}
        model = load(name, size="paper", batch=1, **options).build_model()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
