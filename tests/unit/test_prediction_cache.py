"""What was predicted is kept on disk: the same answers as without, and none after a change of what they rest
on."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from child_ranks import run_children
from tiny import words
from typer.testing import CliRunner

from memfit.catalog.machine_spec import machine
from memfit.cli import doctor
from memfit.cli.app import app
from memfit.jobs import registry
from memfit.jobs.opened_files import OPENED_WHILE_LOADING
from memfit.jobs.registry import load
from memfit.planner import job_content as content_module
from memfit.planner.evaluate import Predictor
from memfit.planner.job_content import job_content
from memfit.planner.request import Request, make_predictor
from memfit.planner.search import search
from memfit.store import trace_columns
from memfit.store.prediction_cache import (
    PredictionCache,
    default_folder,
    digest_of,
    limit_bytes,
    pack,
    unpack,
)
from memfit.techniques.registry import TECHNIQUES, make_plain_plan
from memfit.trace import tracer
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Bounds, Plan, use
from memfit.types.result import Estimate, Interval
from memfit.types.serialization import dumps, restore, to_plain

HELPER = "WIDTH = 16\n\n\ndef scale(x):\n    return 2 * x\n"
LATE = "def shift(x):\n    return x + 1\n"
SOURCE = """
import json
import os
from pathlib import Path

import torch
from torch import nn

import {helper}
from memfit import Job

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "settings.json").read_text())


def build_model():
    width, count = {helper}.WIDTH, SETTINGS["blocks"]
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(count)])


def make_batch(step, seed):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    with open(HERE / "rows.txt") as file:
        rows = len(file.read().split())
    return {{"x": torch.randn(rows, {helper}.WIDTH, generator=generator)}}


def loss(model, batch):
    import {late}

    return {late}.shift({helper}.scale(model(batch["x"]))).square().mean()


job = Job(name="mine", build_model=build_model, make_batch=make_batch, loss=loss, batch_size=8)
"""


@pytest.fixture(autouse=True)
def without_modules_of_other_tests(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that other tests have loaded in this process, and changed since, forbid to keep anything."""
    temporary = str(tmp_path_factory.getbasetemp().parent)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(temporary):
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is switched on."""
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@dataclasses.dataclass
class UserFiles:
    folder: Path
    helper: str
    late: str

    @property
    def ref(self) -> JobRef:
        return JobRef(spec=f"{self.folder / 'mine.py'}:job")

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def forget(self) -> None:
        """Let this process know as little of the job as a new one."""
        OPENED_WHILE_LOADING.clear()
        for name in (self.helper, self.late):
            sys.modules.pop(name, None)

    def digest(self) -> str | None:
        """Return the digest of the job's content in a new process."""
        self.forget()
        content = job_content(self.ref, load(self.ref))
        return content.digest if content is not None else None


@pytest.fixture
def files(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[UserFiles]:
    """A job with a module beside it, another one that only its loss imports, and two data files."""
    unique = re.sub(r"\W", "_", request.node.name)
    names = f"helper_{unique}", f"late_{unique}"
    user_folder = tmp_path / "user"
    user_folder.mkdir()
    (user_folder / "mine.py").write_text(SOURCE.format(helper=names[0], late=names[1]))
    (user_folder / f"{names[0]}.py").write_text(HELPER)
    (user_folder / f"{names[1]}.py").write_text(LATE)
    (user_folder / "settings.json").write_text('{"blocks": 5, "rate": 1}')
    (user_folder / "rows.txt").write_text("a b c d e f g h")
    user_files = UserFiles(user_folder, *names)
    yield user_files
    user_files.forget()
    sys.path[:] = [p for p in sys.path if p != str(user_folder)]


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Ignores the progress."""


def ask(ref: JobRef, memory: int | None = None) -> str:
    without = tuple(set(TECHNIQUES) - {"bf16-autocast", "activation-checkpointing", "optimal-checkpointing"})
    request = Request(job_ref=ref, machine=machine("L4"), cap_bytes=memory, bounds=Bounds(without=without))
    return dumps(search(request, quiet).result)


def refuse_to_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(tracer.TrainingStep, "run", fail)


# -- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "device"),
    [
        (Plan(), "cpu"),
        (Plan(uses=(use("activation-checkpointing", every=1), use("bf16-autocast"))), "cuda"),
        (make_plain_plan(2), "cuda"),
    ],
    ids=["plain", "recomputed", "two ranks"],
)
def test_a_trace_read_from_bytes_equals_the_trace(plan: Plan, device: str) -> None:
    traced = trace(words(), plan, device=device, lines=True)
    read = trace_columns.from_bytes(unpack(pack(trace_columns.to_bytes(traced))))
    assert read == traced
    for rows in (
        zip(traced.ops, read.ops, strict=True),
        zip(traced.allocations, read.allocations, strict=True),
    ):
        for a, b in rows:
            assert [type(getattr(a, f.name)) for f in dataclasses.fields(a)] == [
                type(getattr(b, f.name)) for f in dataclasses.fields(b)
            ]


def test_restored_values_keep_the_types_of_numbers() -> None:
    estimate = Estimate(
        plan=Plan(uses=(use("gradient-accumulation", micro_batches=2),), ranks=2),
        allocated_bytes=Interval(value=3, low=1.5, high=4),
        phase_peak_bytes={"forward": 3},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=7,
        assumptions=("one",),
    )
    restored = restore(Estimate, to_plain(estimate))
    assert restored == estimate
    assert dumps(restored) == dumps(estimate)
    assert type(restored.allocated_bytes.value) is int


# -- files ------------------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_file_is_no_entry_and_is_deleted(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path)
    name = digest_of("an entry")
    cache.write(name, b"what was predicted")
    (path,) = tmp_path.rglob("*.memfit")
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"PK\x03\x04 a foreign file"):
        path.write_bytes(damaged)
        assert cache.read(name) is None
        assert not path.exists()
    cache.write(name, b"what was predicted")
    assert cache.read(name) == b"what was predicted"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_in_place_of_an_entry_is_not_waited_for(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path)
    name = digest_of("an entry")
    cache.write(name, b"what was predicted")
    (path,) = tmp_path.rglob("*.memfit")
    path.unlink()
    os.mkfifo(path)
    assert cache.read(name) is None
    cache.write(name, b"what was predicted")
    assert cache.read(name) == b"what was predicted"


def test_the_least_recently_used_entries_are_deleted_beyond_the_limit(tmp_path: Path) -> None:
    contents = {digest_of(i): os.urandom(10_000) for i in range(10)}
    cache = PredictionCache(tmp_path, limit_bytes=10**6)
    for age, (name, content) in enumerate(contents.items()):
        cache.write(name, content)
        path = next(tmp_path.rglob(f"{name}.memfit"))
        os.utime(path, (1000 + age, 1000 + age))
    oldest, *_, newest = contents
    assert cache.read(oldest) == contents[oldest]  # so that it is the one used last
    foreign = tmp_path / "notes.txt"
    foreign.write_text("x" * 10**6)
    PredictionCache(tmp_path, limit_bytes=50_000).write(digest_of("another"), b"")
    assert cache.usage()[1] <= 50_000
    assert cache.read(oldest) == contents[oldest]
    assert cache.read(newest) == contents[newest]
    assert cache.read(list(contents)[1]) is None
    assert foreign.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PredictionCache(tmp_path / "file" / "cache")
    cache.write(digest_of(1), b"x")
    assert cache.read(digest_of(1)) is None
    assert cache.usage() == (0, 0)


_WRITE_AND_READ = """
import os
import sys
from pathlib import Path

from memfit.store.prediction_cache import PredictionCache, digest_of

cache = PredictionCache(Path(sys.argv[1]), limit_bytes=200_000)
for i in range(150):
    name = digest_of(i % 7)
    cache.write(name, bytes([i % 7]) * 20_000 + os.urandom(10_000))
    read = cache.read(name)
    assert read is None or (read[0], len(read)) == (i % 7, 30_000)
"""


def test_several_processes_share_the_folder(tmp_path: Path) -> None:
    (tmp_path / "shares.py").write_text(_WRITE_AND_READ)
    run_children(tmp_path / "shares.py", [[tmp_path / "cache"]] * 2)
    assert list((tmp_path / "cache").rglob("*"))
    assert not list(tmp_path.rglob("*.draft"))


def test_an_environment_variable_moves_the_cache_or_switches_it_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.setenv("MEMFIT_CACHE", "off")
    assert default_folder() is None
    monkeypatch.delenv("MEMFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    default = default_folder()
    assert default is not None
    assert default.parts[-2:] == ("memfit", "predictions")


def test_a_limit_that_is_not_a_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFIT_CACHE_LIMIT", "much")
    with pytest.raises(UserError, match="MEMFIT_CACHE_LIMIT is 'much'"):
        limit_bytes()
    monkeypatch.setenv("MEMFIT_CACHE_LIMIT", "500MiB")
    assert limit_bytes() == 500 * 2**20


# -- answers ----------------------------------------------------------------------------------------------


def test_a_question_asked_again_gives_the_same_answer_without_a_trace(
    files: UserFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MEMFIT_CACHE", "off")
        uncached = ask(files.ref)
    assert not folder.exists()
    files.forget()
    assert ask(files.ref) == uncached
    files.forget()
    refuse_to_trace(monkeypatch)
    assert ask(files.ref) == uncached


def test_another_memory_is_answered_from_the_same_traces(files: UserFiles, folder: Path) -> None:
    ask(files.ref)
    count = PredictionCache(folder).usage()[0]
    ask(files.ref, memory=20 * 2**30)
    assert PredictionCache(folder).usage()[0] == count


@pytest.mark.parametrize("lines", [False, True])
def test_estimates_of_several_ranks_are_equal_from_disk(
    files: UserFiles, folder: Path, monkeypatch: pytest.MonkeyPatch, lines: bool
) -> None:
    request = Request(job_ref=files.ref, machine=machine("4xH100-SXM"), ranks=4)
    plan = make_plain_plan(4)

    def predicted() -> tuple[str, list[tuple[int, object]]]:
        _, predictor = make_predictor(request)
        predictor.lines = lines
        predictor.trace_ahead([plan])
        estimates = dumps(predictor.each_rank(plan))
        return estimates, [(rank, predictor.trace(p, rank)) for p, rank in predictor.traces]

    first = predicted()
    refuse_to_trace(monkeypatch)
    assert predicted() == first


def test_a_predictor_of_another_job_reads_nothing(files: UserFiles, folder: Path) -> None:
    _, predictor = make_predictor(Request(job_ref=files.ref, machine=machine("L4")))
    peak = predictor.whole(Plan()).allocated_bytes.value
    rows = 500_000
    larger = dataclasses.replace(predictor.job, make_batch=lambda step, seed: {"x": torch.zeros(rows, 16)})
    other = dataclasses.replace(predictor, job=larger, traces={}, part_digests={}, plain={})
    assert other.whole(Plan()).allocated_bytes.value > 2 * peak


def test_an_edit_of_a_module_that_the_job_imports_changes_the_answer(files: UserFiles, folder: Path) -> None:
    def peak() -> float:
        files.forget()
        _, predictor = make_predictor(Request(job_ref=files.ref, machine=machine("L4")))
        return predictor.whole(Plan()).allocated_bytes.value

    before = peak()
    files.edit(f"{files.helper}.py", "WIDTH = 16", "WIDTH = 512")
    assert peak() > 2 * before


def test_a_trace_that_reads_a_file_of_its_own_is_not_kept(files: UserFiles, folder: Path) -> None:
    (files.folder / "late.json").write_text("1")
    files.edit(
        "mine.py", "    import late", '    json.loads((HERE / "late.json").read_text())\n    import late'
    )
    _, predictor = make_predictor(Request(job_ref=files.ref, machine=machine("L4")))
    count = PredictionCache(folder).usage()[0]
    predictor.trace(Plan())
    assert PredictionCache(folder).usage()[0] == count


# -- what an answer rests on ------------------------------------------------------------------------------


def test_the_digest_of_a_job_is_the_same_again(files: UserFiles) -> None:
    first = files.digest()
    assert first is not None
    _, predictor = make_predictor(Request(job_ref=files.ref, machine=machine("L4")))
    predictor.trace(Plan())  # which loads the module that only the loss imports
    assert files.digest() == first


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mine.py", "square().mean()", "abs().mean()"),
        ("{helper}.py", "2 * x", "3 * x"),
        ("{late}.py", "x + 1", "x + 2"),
        ("settings.json", '"rate": 1', '"rate": 2'),
        ("rows.txt", "a b", "a  b"),
    ],
    ids=["the job's file", "a module it imports", "a module its loss imports", "settings it reads", "data"],
)
def test_an_edit_changes_the_digest_of_a_job(files: UserFiles, name: str, old: str, new: str) -> None:
    first = files.digest()
    files.edit(name.format(helper=files.helper, late=files.late), old, new)
    assert files.digest() not in (None, first)


@pytest.mark.parametrize("name", ["{helper}.py", "settings.json"])
def test_a_file_that_has_changed_since_it_was_read_leaves_no_digest(files: UserFiles, name: str) -> None:
    assert files.digest() is not None
    path = files.folder / name.format(helper=files.helper)
    path.write_text(path.read_text() + "\n")  # the module, or what it has read, is still the old one
    assert job_content(files.ref, load(files.ref)) is None
    assert files.digest() is not None


def test_a_trace_during_which_a_file_changes_is_not_kept(files: UserFiles, folder: Path) -> None:
    _, predictor = make_predictor(Request(job_ref=files.ref, machine=machine("L4")))
    count = PredictionCache(folder).usage()[0]
    files.edit("rows.txt", "a b", "a b c")
    predictor.trace(Plan())
    assert PredictionCache(folder).usage()[0] == count


def test_a_memfit_that_has_changed_since_the_process_began_leaves_no_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = JobRef(spec="protein-ss")
    assert job_content(ref, load(ref)) is not None
    monkeypatch.setattr(content_module, "_memfit_changed_s", time.time)
    assert job_content(ref, load(ref)) is None


def test_data_read_in_native_code_counts_by_its_values(files: UserFiles) -> None:
    data = files.folder / "rows.raw"
    torch.zeros(8, 16).numpy().tofile(data)
    files.edit(
        "mine.py",
        "    generator = ",
        '    x = torch.from_file(str(HERE / "rows.raw"), size=128).reshape(8, 16).clone()\n'
        '    return {"x": x}\n    generator = ',
    )
    first = files.digest()
    torch.ones(8, 16).numpy().tofile(data)
    assert files.digest() not in (None, first)


def test_environment_variables_change_the_digest_but_not_those_of_the_terminal(
    files: UserFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = files.digest()
    monkeypatch.setenv("COLUMNS", "61")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")  # which torch sets when it first needs it
    monkeypatch.setenv("MEMFIT_CACHE_LIMIT", "1GiB")
    assert files.digest() == first
    monkeypatch.setenv("MY_NUMBER_OF_LAYERS", "3")
    assert files.digest() not in (None, first)


@pytest.mark.parametrize("ref", [JobRef(spec="protein-ss"), JobRef(spec="hf:bert?num_hidden_layers=2")])
def test_what_is_asked_and_what_is_installed_change_the_digest(
    ref: JobRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(asked: JobRef) -> str:
        content = job_content(asked, load(asked))
        assert content is not None
        return content.digest

    digests = [
        digest(ref),
        digest(dataclasses.replace(ref, batch=2)),
        digest(dataclasses.replace(ref, clip=0.5)),
    ]
    assert digest(ref) == digests[0]
    for name, value in (
        ("_distributions", lambda: [("torch-99.dist-info", 0)]),
        ("_memfit_digest", lambda: "another memfit"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(content_module, name, value)
            content_module._software.cache_clear()
            digests.append(digest(ref))
    content_module._software.cache_clear()
    monkeypatch.setenv("TORCH_LOGS", "x")
    digests.append(digest(ref))
    assert len(set(digests)) == len(digests)


def test_the_weights_and_the_configuration_of_a_folder_change_the_digest(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    text = (
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_head": 2, "n_embd": 8}'
    )
    config.write_text(text)
    ref = JobRef(spec=f"hf:{tmp_path}")

    def digest() -> str | None:
        content = job_content(ref, load(ref))
        return content.digest if content is not None else None

    OPENED_WHILE_LOADING.clear()  # as in a new process
    first = digest()
    assert digest() == first
    OPENED_WHILE_LOADING.clear()
    config.write_text(text.replace('"n_head": 2', '"n_head": 4'))
    assert digest() not in (None, first)


@pytest.mark.parametrize(
    "code",
    [
        "return {'x': torch.randn(8, 16)}",
        "return {'x': torch.zeros(8, 16), 'connection': CONNECTION}",
        "return {'x': torch.zeros(8, 16), 'numbers': list(range(10**6))}",
    ],
    ids=["random batches", "a database", "too much"],
)
def test_a_job_whose_content_cannot_be_known_has_no_digest(files: UserFiles, code: str) -> None:
    files.edit("mine.py", "    generator = ", f"    {code}\n    generator = ")
    files.edit("mine.py", "HERE = ", "import sqlite3\n\nCONNECTION = sqlite3.connect(':memory:')\nHERE = ")
    if "CONNECTION}" not in code:
        files.edit("mine.py", "CONNECTION = sqlite3.connect(':memory:')", "")
    assert files.digest() is None


def test_masked_values_of_numpy_are_part_of_the_content(files: UserFiles) -> None:
    files.edit(
        "mine.py", "HERE = ", "import numpy\n\nEDGE = numpy.ma.masked\nROW = numpy.ma.array([1, 2])\nHERE = "
    )
    whole = files.digest()
    assert whole is not None
    files.edit("mine.py", "ROW = numpy.ma.array([1, 2])", "ROW = numpy.ma.array([1, 2], mask=[0, 1])")
    assert files.digest() not in (None, whole)


def test_a_job_with_a_value_that_cannot_be_read_has_no_digest(files: UserFiles) -> None:
    code = "class Odd(dict):\n    def items(self):\n        raise ArithmeticError\n\n\nODD = Odd()\n"
    files.edit("mine.py", "HERE = ", f"{code}\nHERE = ")
    assert files.digest() is None


def test_jobs_of_this_process_have_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OF_THIS_PROCESS", {"in memory": words()})
    ref = JobRef(spec="in memory")
    job: Job = load(ref)
    assert job_content(ref, job) is None
    _, predictor = make_predictor(Request(job_ref=ref, machine=machine("L4")))
    assert isinstance(predictor, Predictor)
    assert predictor.stored is None


def test_the_digest_leaves_the_generators_of_random_numbers_as_they_are(files: UserFiles) -> None:
    files.edit("mine.py", "    generator = ", "    torch.manual_seed(step)\n    generator = ")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert files.digest() is not None
    assert torch.equal(torch.rand(1), expected)


def test_doctor_shows_the_cache_and_how_to_clear_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", lambda extras: [])  # it imports each
    PredictionCache(folder).write(digest_of(1), b"x" * 1000)
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 0
    assert str(folder) in answer.output
    assert "1 entries" in answer.output
    assert "delete this folder" in answer.output
