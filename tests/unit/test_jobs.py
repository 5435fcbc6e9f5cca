"""The built-in jobs, the user's own jobs, and how wrong inputs are refused."""

from __future__ import annotations

import dataclasses
import gzip
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.cli.options import SizeOptions
from memfit.jobs import registry
from memfit.jobs.builtin import char_lm, esm, fasta, protein_lm, protein_ss
from memfit.jobs.builtin.batches import epoch_indices
from memfit.jobs.training_step import TrainingStep, weigh_loss
from memfit.jobs.user_job import run_user_code
from memfit.jobs.weights import load_weights
from memfit.model.blocks import find_blocks, find_head
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan
from memfit.worker.degraded_training import scores_by_endpoint

BUILT_IN = ("protein-ss", "protein-lm", "char-lm")
# These have test files of their own.
ELSEWHERE = {"alphafold2", "molecules", "genome", "weather", "potential", "segmentation3d"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(spec: str, **options: Any) -> Job:
    return registry.load(JobRef(spec=spec, **options))


def refusal(spec: str, **options: Any) -> str:
    """The one-line message that refuses a wrong request."""
    with pytest.raises(UserError) as caught:
        load(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Operators(TorchDispatchMode):
    """Names of the operators that run, in order, without queries of a fake tensor's device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("prim."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of_a_step(job: Job, *, fake: bool) -> list[str]:
    batch = job.make_batch(0, 0)
    if not fake:
        model = job.build_model()
        with Operators() as seen:
            job.loss(model, batch).backward()
        return seen.names
    with FakeTensorMode() as mode:
        model = job.build_model()
        batch = _pytree.tree_map_only(torch.Tensor, mode.from_tensor, batch)
        with Operators() as seen:
            job.loss(model, batch).backward()
    return seen.names


# -- every built-in job ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_batch_depends_on_step_and_seed_alone(name: str) -> None:
    job, again = load(name, batch=3), load(name, batch=3)
    first = job.make_batch(4, 7)
    other = again.make_batch(4, 7)
    assert first.keys() == other.keys()
    assert all(torch.equal(first[k], other[k]) for k in first)
    assert all(t.shape[0] == 3 for t in first.values())
    for step, seed in ((5, 7), (4, 8)):
        assert any(not torch.equal(first[k], job.make_batch(step, seed)[k]) for k in first)


@pytest.mark.parametrize("name", BUILT_IN)
def test_fake_and_real_steps_run_the_same_operators(name: str) -> None:
    job = load(name, batch=2)
    real = operators_of_a_step(job, fake=False)
    assert len(real) > 100
    assert operators_of_a_step(job, fake=True) == real


def test_a_batch_without_padding_runs_the_same_operators() -> None:
    """Hugging Face drops a mask of ones; the jobs must not, or the memory would depend on the data."""
    job = load("protein-ss", batch=2)
    model, batch = job.build_model(), job.make_batch(0, 0)
    no_padding = torch.ones_like(batch["valid"])
    with Operators() as padded:
        model(batch["features"], batch["valid"])
    with Operators() as full:
        model(batch["features"], no_padding)
    assert padded.names == full.names


@pytest.mark.parametrize("name", BUILT_IN)
def test_loss_is_the_mean_over_loss_terms(name: str) -> None:
    """Two halves weighted by their terms give the loss of the whole."""
    torch.manual_seed(0)
    job = load(name, batch=4)
    model = job.build_model()
    whole = job.make_batch(0, 0)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    assert job.loss_terms is not None
    terms = [job.loss_terms(h) for h in halves]
    with torch.no_grad():
        weighted = sum(float(job.loss(model, h)) * n for h, n in zip(halves, terms, strict=True)) / sum(terms)
        assert weighted == pytest.approx(float(job.loss(model, whole)), rel=1e-5)
    assert sum(terms) == job.loss_terms(whole)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_untrained_model_is_no_better_than_naive(name: str) -> None:
    torch.manual_seed(0)
    job = load(name)
    assert job.evaluate is not None
    assert job.metric is not None
    model = job.build_model()
    value = scores_by_endpoint(job, job.evaluate(model))[job.metric.name]
    assert model.training, "evaluation gives the model back as it was"
    better = value > job.metric.naive + job.metric.margin
    assert not (better if job.metric.higher_is_better else value < job.metric.naive - job.metric.margin)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_loss_of_each_built_in_job_falls(name: str) -> None:
    torch.manual_seed(0)
    job = load(name, batch=8)
    step = TrainingStep(job, Plan())
    losses = [float(step.run(job.make_batch(i, 0))[0]) for i in range(12)]
    assert np.mean(losses[-3:]) < losses[0] - 0.02


@pytest.mark.parametrize("name", BUILT_IN)
def test_blocks_and_head_are_where_the_job_says(name: str) -> None:
    job = load(name)
    with FakeTensorMode():
        model = job.build_model()
    path, blocks = find_blocks(model, job.blocks)
    assert (path, len(blocks)) == (job.blocks, 4)
    assert find_blocks(model)[0] == path, "the default finds the same"
    assert find_head(model, job.head)[0] == find_head(model)[0] == job.head


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("protein-ss", "paper", 650),
        ("protein-lm", "3B", 2839),
        ("char-lm", "124M", 163),
        ("protein-lm", "8M", 7.5),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(
    name: str, size: str, millions: float
) -> None:
    """ESM-2's own counts; GPT-2 small is 124 M and 38.6 M more for the head that is not tied."""
    with FakeTensorMode():
        model = load(name, size=size).build_model()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_every_parameter_is_trained() -> None:
    """A parameter without gradient would be state and traffic for nothing."""
    for name in BUILT_IN:
        job = load(name, batch=2)
        model = job.build_model()
        job.loss(model, job.make_batch(0, 0)).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_describing_the_jobs_loads_no_torch() -> None:
    code = (
        "import sys; from memfit.jobs import registry; registry.describe(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_built_in_job_is_tested_here_or_elsewhere_and_in_the_help_of_data() -> None:
    assert {*BUILT_IN} | ELSEWHERE == {*registry.names()}
    (option,) = typing.get_args(typing.get_type_hints(SizeOptions, include_extras=True)["data"])[1:]
    assert all(name in option.help for name in registry.names()), "what it reads, or that it refuses --data"


# -- the data -------------------------------------------------------------------------------------------


def test_no_built_in_chain_is_in_both_training_and_test_data() -> None:
    with np.load(Path(protein_ss.__file__).parent / "data" / "pdb_ss.npz") as kept:
        names, count = kept["pdb_chain"], int(kept["n_train"])
        assert len(kept["residue"]) == len(kept["state"]) == kept["length"].sum() == 234_380
    assert (count, len(names)) == (2000, 2500)
    assert not set(names[:count]) & set(names[count:])


def test_q3_is_the_share_of_right_residues_and_naive_predicts_the_training_majority() -> None:
    chains = protein_ss.Chains(
        offset=np.array([0, 3, 5, 9]),
        features=np.zeros((9, 41), np.uint8),
        state=np.array([1, 1, 0, 2, 1, 1, 2, 2, 1]),  # training: strand 3 of 5; test: 1 2 2 1
        train_count=2,
        source="",
    )
    assert protein_ss.metric(chains, 8).naive == 50.0
    assert protein_ss.metric(chains, 3).naive == pytest.approx(100 / 3), "only what is scored counts"
    scores = protein_ss.scores(AlwaysThird(), chains, 8, 2)
    assert scores["Q3"] == 50.0
    assert scores["expected Q3"] < 50.0, "the model is not certain of its third state"
    assert load("protein-ss").metric.naive == pytest.approx(38.2, abs=0.05)  # type: ignore[union-attr]


class AlwaysThird(torch.nn.Module):
    """Predicts coil everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.0, 0.0, 1.0]))

    def forward(self, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*valid.shape, 3)


def test_features_are_residue_and_profile_and_padding_is_zero() -> None:
    batch = load("protein-ss", batch=16).make_batch(0, 0)
    features, valid = batch["features"], batch["valid"]
    assert features.shape == (16, 128, 41)
    assert torch.equal(features[..., :21].sum(-1), valid.float())
    assert (features[..., 21:].sum(-1)[valid] - 1).abs().max() < 0.1, "a profile is a distribution"
    assert features[~valid].abs().max() == 0
    assert torch.equal(batch["state"] == -100, ~valid)


@given(count=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_example_comes_once_an_epoch(count: int, batch: int, seed: int) -> None:
    steps = -(-2 * count // batch)
    drawn = np.concatenate([epoch_indices(count, batch, step=s, seed=seed) for s in range(steps)])
    assert sorted(drawn[:count]) == sorted(drawn[count : 2 * count]) == list(range(count))


def test_fifteen_percent_of_residues_have_labels_and_only_those_are_masked() -> None:
    batch = {k: v.numpy() for k, v in load("protein-lm", batch=64).make_batch(0, 0).items()}
    tokens, labels, valid = batch["tokens"], batch["labels"], batch["valid"]
    asked = labels >= 0
    residues = valid.sum() - 2 * len(tokens)  # without start and end
    assert asked.sum() / residues == pytest.approx(0.15, abs=0.003)
    assert not asked[tokens == 0].any()
    assert (tokens == 32)[asked].mean() == pytest.approx(0.8, abs=0.03)
    assert (tokens == labels)[asked].mean() == pytest.approx(0.1 + 0.1 / 20, abs=0.03)
    assert not (tokens == 32)[~asked].any()


def test_tokens_are_those_of_esm2() -> None:
    assert protein_lm.encode("LAGXJ").tolist() == [4, 5, 6, 24, 24]
    from transformers.models.esm.configuration_esm import get_default_vocab_list

    published = get_default_vocab_list()
    assert [published[i] for i in protein_lm.encode(fasta.RESIDUES)] == list(fasta.RESIDUES)
    assert (published[esm.PAD], published[esm.MASK]) == ("<pad>", "<mask>")


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(vocabulary))

        def forward(self, tokens: torch.Tensor, valid: object = None) -> torch.Tensor:
            return self.logits.expand(*tokens.shape, -1)

    sequences = protein_lm.read_sequences(None)
    assert protein_lm.held_out_nats(Uniform(33), sequences, 64, 50) == pytest.approx(math.log(33), rel=1e-5)
    text = char_lm.read(None, 256)
    assert char_lm.bits_per_byte(Uniform(256), text.test, 256, 16) == pytest.approx(8, rel=1e-5)


# -- the user's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (">a\nMKV\n>b\nMK1L\n", "line 4, column 3: '1' is not an amino acid"),
        (">a\nMKß1\n", "line 2, column 3: 'ß' is not an amino acid"),
        (">a\nMKﬆ\n", "line 2, column 3: 'ﬆ' is not an amino acid"),
        (">a\nMKV\nM-V\n", "line 3, column 2: '-'"),
        (">a\nMKV\n>empty\n\n>c\nMK\n", "line 3: no sequence follows the header of 'empty'"),
        (">a\nMKV\n>stop\n*\n>c\nMK\n", "line 3: no sequence follows the header of 'stop'"),
        ("MKV\n", "line 1: the first line with text must start with '>'"),
        ("\n \n", "is empty"),
        (">only\nMKV\n", "contains only 1 sequence"),
    ],
)
def test_a_broken_fasta_is_refused_with_its_file_and_line(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "proteins.fasta"
    file.write_text(text)
    message = refusal("protein-lm", data=str(file))
    assert place in message
    assert str(file) in message


def test_a_compressed_fasta_is_read_and_an_unreadable_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.fasta.gz"
    file.write_bytes(gzip.compress(b">one two\nmkv\nLL*\n\n>b\r\nXU\r\n"))
    assert fasta.read_fasta(str(file)) == [
        fasta.Protein(name="one", sequence="MKVLL"),
        fasta.Protein(name="b", sequence="XU"),
    ]
    file.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot read"):
        fasta.read_fasta(str(file))
    plain = tmp_path / "latin.fasta"
    plain.write_bytes(b">a\nMK\xe9\n")
    assert "not UTF-8" in refusal("protein-lm", data=str(plain))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (">a\nMKV\nHEC\n>b\nMKV\nHE\n", "line 6: 2 states in this line for 3 residues of 'b'"),
        (">a\nMKV\nHEX\n>b\nMK\nHE\n", "line 3, column 3: 'X' is not a state"),
        (">a\nMKV\n", "line 1: the header 'a' is followed by 1 lines of text"),
        (">a\nMKV\nHEC\n", "contains only 1 chain"),
    ],
)
def test_broken_labels_are_refused_with_their_line(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "labelled.fasta"
    file.write_text(text)
    assert place in refusal("protein-ss", data=str(file))


def test_the_users_labelled_chains_make_batches_and_are_cropped(tmp_path: Path) -> None:
    file = tmp_path / "labelled.fasta"
    file.write_text("".join(f">c{i}\n{'MKVX' * 40}\n{'HECC' * 40}\n" for i in range(5)))
    job = load("protein-ss", data=str(file), batch=2)
    batch = job.make_batch(0, 0)
    assert batch["valid"].all(), "160 residues fill 128"
    assert job.metric is not None
    assert job.metric.naive == 50.0  # C is half of every chain
    assert batch["features"][..., 20].mean() == pytest.approx(0.25), "X is the 21st residue"
    assert str(file) in job.data_source


def test_the_users_text_makes_batches_and_a_bad_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcd" * 1000)
    job = load("char-lm", data=str(file), batch=2)
    assert job.metric is not None
    assert job.metric.naive == pytest.approx(2, abs=0.1)  # four letters alike: two bits
    batch = job.make_batch(0, 0)
    assert torch.equal(batch["tokens"][:, 1:], batch["next"][:, :-1])
    file.write_text("abcd")
    assert "has 4 bytes" in refusal("char-lm", data=str(file))
    assert "cannot read" in refusal("char-lm", data=str(tmp_path / "absent.txt"))


# -- names, sizes, numbers ------------------------------------------------------------------------------


def test_wrong_names_get_suggestions_and_numbers_below_1_are_refused() -> None:
    assert "did you mean 'protein-ss'?" in refusal("protien-ss")
    assert "did you mean '650M'?" in refusal("protein-ss", size="650m")
    assert "gpt2" in refusal("hf:gtp2")
    assert "at least 1" in refusal("protein-ss", batch=0)
    assert "at least 1" in refusal("protein-ss", steps=-3)


def test_the_users_steps_and_batch_override_the_defaults() -> None:
    job = load("protein-ss", steps=7, batch=5)
    assert (job.steps, job.batch_size, job.tokens_per_batch) == (7, 5, 5 * 128)


# -- weights --------------------------------------------------------------------------------------------


def test_loaded_weights_equal_the_saved_ones(tmp_path: Path) -> None:
    for name in BUILT_IN:
        torch.manual_seed(1)
        saved = load(name).build_model()
        folder = tmp_path / name
        folder.mkdir()
        save_file({n: p.detach().clone() for n, p in saved.named_parameters()}, folder / "model.safetensors")
        loaded = load(name, weights=str(folder)).build_model()
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    job = load("char-lm", weights=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no such folder of weights"):
        job.build_model()
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="no safetensors"):
        load_weights(model, str(tmp_path))
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"weight in .* has shape \(3, 5\); allowed: \(3, 2\)"):
        load_weights(model, str(tmp_path))
    save_file({"bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing, first weight"):
        load_weights(model, str(tmp_path))
    save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="none of the model's parameters"):
        load_weights(model, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read"):
        load_weights(model, str(tmp_path))


def test_buffers_are_loaded_with_the_weights_if_the_files_have_them(tmp_path: Path) -> None:
    saved = torch.nn.BatchNorm1d(3)
    saved(torch.randn(8, 3))
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = torch.nn.BatchNorm1d(3)
    load_weights(loaded, str(tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    del state["running_mean"]
    save_file(state, tmp_path / "model.safetensors")
    without = torch.nn.BatchNorm1d(3)
    load_weights(without, str(tmp_path))
    assert without.running_mean.eq(0).all()  # type: ignore[union-attr]
    assert torch.equal(without.running_var, saved.running_var)  # type: ignore[arg-type]


def test_weights_are_accepted_under_fake_tensors_and_loaded_into_a_real_model(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, tmp_path / "model.safetensors")
    with FakeTensorMode():
        load_weights(torch.nn.Linear(2, 3), str(tmp_path))
    real = torch.nn.Linear(2, 3)
    load_weights(real, str(tmp_path))
    assert real.weight.eq(1).all()


# -- Hugging Face and the user's own --------------------------------------------------------------------

SMALL = (
    '{"model_type": "%s", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, '
    '"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40%s}'
)


@pytest.mark.parametrize(
    ("kind", "extra", "terms_per_row"),
    [
        ("llama", ', "num_key_value_heads": 2', 40),
        ("bert", "", 6),
        ("bert", ', "architectures": ["BertForSequenceClassification"]', None),
    ],
)
def test_a_local_hugging_face_configuration_trains(
    tmp_path: Path, kind: str, extra: str, terms_per_row: int | None
) -> None:
    (tmp_path / "config.json").write_text(SMALL % (kind, extra))
    job = load(f"hf:{tmp_path}", batch=3)
    step = TrainingStep(job, Plan())
    batch = job.make_batch(0, 0)
    assert batch["input_ids"].shape == (3, 40), "no longer than the model's positions"
    loss, norm = step.run(batch)
    assert loss.isfinite()
    assert norm > 0
    if terms_per_row is not None:
        assert (batch["labels"] >= 0).sum(1).tolist() == [terms_per_row] * 3


def test_a_bundled_hugging_face_configuration_builds_without_network() -> None:
    job = load("hf:gpt2")
    with FakeTensorMode():
        model = job.build_model()
        path, blocks = find_blocks(model, job.blocks)
    assert (path, len(blocks)) == ("transformer.h", 12)
    assert job.make_batch(0, 0)["input_ids"].shape == (4, 128)
    assert load("hf:gpt2", size="paper").tokens_per_batch == 4 * 1024


def test_hugging_face_configurations_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    assert "config.json" in refusal(f"hf:{tmp_path}")
    assert "has no head for which memfit has a loss" in refusal("hf:clip")
    assert "a file of your own can train any model" in refusal("hf:clip")
    assert "does not accept --data" in refusal("hf:gpt2", data="x")
    assert "unknown size" in refusal("hf:gpt2", size="8M")
    assert "vocab_size=1e3 is refused by" in refusal("hf:gpt2?vocab_size=1e3")
    assert "use_return_dict=1 is refused by" in refusal("hf:gpt2?use_return_dict=1")
    assert "has the setting vocab_size 0" in refusal("hf:gpt2?vocab_size=0")
    assert "has the setting image_size [224]" in refusal("hf:vit?image_size=[224]")
    assert "transformers cannot build" in refusal("hf:gpt2?n_head=5", length=1024)
    with pytest.raises(UserError, match=r"transformers cannot build .* negative dimension"):
        load("hf:gpt2?n_positions=-4").build_model()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": "many"}')
    assert "config.json cannot be loaded" in refusal(f"hf:{tmp_path}")


def test_the_name_of_a_changed_configuration_without_layers_has_the_changes() -> None:
    assert load("hf:convnext?num_channels=4").name == "hf:convnext?num_channels=4"


OWN = """
import torch
from memfit.types.job import Job
from helper_beside import WIDTH

def build():
    return torch.nn.Linear(WIDTH, 1)

def make(size="small", batch=4):
    return Job(name=size, build_model=build, make_batch=lambda step, seed: torch.ones(batch, WIDTH),
               loss=lambda model, x: model(x).mean(), batch_size=batch)

job = make()
number = 3

def broken():
    return 1 / 0

def wrong():
    return "a string"

def needs(x):
    return make()
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "helper_beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def test_a_users_file_may_hold_a_job_or_a_function_that_returns_one(own: str) -> None:
    job = load(f"{own}:job", steps=3)
    assert (job.name, job.steps) == ("small", 3)
    TrainingStep(job, Plan()).run(job.make_batch(0, 0))
    made = load(f"{own}:make", size="big", batch=2)
    assert (made.name, made.batch_size) == ("big", 2)
    assert sys.path[-1] == str(Path(own).parent)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        (
            "jib",
            "has no attribute 'jib'; allowed: build, make, job, broken, wrong, needs; did you mean 'job'?",
        ),
        ("", "has no attribute ''"),
        ("number", "is a int; allowed: a memfit.Job or a function that returns one"),
        ("broken", "raised ZeroDivisionError: division by zero at "),
        ("wrong", "returned a str; allowed: a memfit.Job"),
        ("needs", "cannot be called with no arguments"),
    ],
)
def test_an_attribute_that_is_no_job_is_refused(own: str, attribute: str, said: str) -> None:
    assert said in refusal(f"{own}:{attribute}")


def test_errors_in_the_users_file_name_their_line(own: str, tmp_path: Path) -> None:
    assert refusal(f"{own}:broken").endswith("mine.py:17")
    assert "no such file" in refusal(f"{tmp_path}/absent.py:job")
    file = tmp_path / "bad.py"
    file.write_text("x = 1\nimport surely_not_there\n")
    assert refusal(f"{file}:job").endswith(
        "ModuleNotFoundError: No module named 'surely_not_there' at " + f"{file}:2"
    )
    file.write_text("x = (\n")
    assert f"SyntaxError: '(' was never closed at {file}:1" in refusal(f"{file}:job")
    assert "does not accept --size" in refusal(f"{own}:job", size="big")
    assert "cannot be called with data" in refusal(f"{own}:make", data="x")


def test_an_error_whose_text_raises_is_reported_in_one_line() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def fail() -> None:
        raise Silent

    with pytest.raises(UserError, match=r"own.py:job raised Silent: an error without a text at "):
        run_user_code(fail, "own.py:job")


def test_a_job_that_changes_the_current_folder_does_not_change_memfits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "size.txt").write_text("3")
    (tmp_path / "own.py").write_text(
        "import os\nfrom pathlib import Path\nfrom memfit import Job\nos.chdir('data')\n"
        "job = Job(name='x', build_model=lambda: None, loss=max, batch_size=1,\n"
        "          make_batch=lambda step, seed: Path('size.txt').read_text())\n"
    )
    monkeypatch.chdir(tmp_path)
    job = load("own.py:job")
    assert Path.cwd() == tmp_path
    assert job.make_batch(0, 0) == "3"  # the job's own relative paths go on to work
    assert Path.cwd() == tmp_path
    with pytest.raises(UserError, match=r"build_model of own.py:job returned a NoneType; .* torch.nn.Module"):
        load("own.py:job").build_model()


def test_a_model_without_trainable_parameters_is_refused() -> None:
    job = dataclasses.replace(load("char-lm"), build_model=torch.nn.ReLU)
    with pytest.raises(UserError, match="the model has no trainable parameters"):
        TrainingStep(job, Plan())


def test_a_complex_loss_is_refused() -> None:
    loss = torch.ones((), dtype=torch.complex64, requires_grad=True)
    with pytest.raises(UserError, match="the loss of the training step is complex"):
        weigh_loss(loss, 1.0)


def test_ddps_error_about_parameters_without_gradients_is_explained_with_a_remedy() -> None:
    def fail() -> None:
        raise RuntimeError(
            "Expected to have finished reduction in the prior iteration before starting a new one."
        )

    with pytest.raises(UserError, match=r"own.py:job: ddp waits for gradients .* freeze them"):
        run_user_code(fail, "own.py:job")
