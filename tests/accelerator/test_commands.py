"""What a user of a machine with accelerators sees: every command says which device it means, and uses it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfit.engines.registry import ENGINES
from memfit.techniques.registry import TECHNIQUES

Command = Callable[..., "subprocess.CompletedProcess[str]"]
NAME = "Simulated accelerator"
MIB = 2**20
# A search weighs two techniques here and times only operators of the whole batch. What it does with others
# does not depend on the device.
SEARCHED = ("activation-checkpointing", "ddp")
WITHOUT = [argument for name in TECHNIQUES if name not in SEARCHED for argument in ("--without", name)]

JOB = """
import torch
from torch import nn
from memfit import Job, Metric


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 99), nn.GELU(), nn.Linear(99, 64), nn.Dropout(0.1))
            for _ in range(4)
        )
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def make_batch(step, seed):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    labels = torch.randint(0, 8, (512,), generator=generator)
    return {"x": torch.randn(512, 16, generator=generator), "y": labels}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def job():
    return Job(name="net", build_model=Net, make_batch=make_batch, loss=loss, batch_size=512, blocks="blocks")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("job") / "net.py"
    path.write_text(JOB)
    return f"{path}:job"


def test_doctor_shows_each_device_with_its_memory(memfit_on_device: Command) -> None:
    result = memfit_on_device("doctor", "--json", devices=2, capacity_bytes=512 * MIB)
    assert result.returncode == 0, result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["machine"]}
    for name in ("sim:0", "sim:1"):
        assert checks[name]["ok"]
        assert f"{NAME}: 512 MiB" in checks[name]["detail"]
    engines = {check["name"]: check["detail"] for check in json.loads(result.stdout)["engines"]}
    assert ", not tried on sim devices: " in engines["native"]
    assert "sim" not in engines["replay"]
    if not ENGINES["megatron"].probe().problem:
        assert ", trains on the processor, not on sim devices: " in engines["megatron"]


def test_plan_is_for_the_accelerator_and_says_so(job: str, memfit_on_device: Command) -> None:
    result = memfit_on_device("plan", job, "--memory", "8MiB", *WITHOUT, devices=2)
    assert result.returncode == 0, result.stderr
    assert f"device: {NAME} (sim); --nproc 2 uses all 2" in result.stderr
    assert f"{NAME} of this machine" in result.stdout
    on_processor = memfit_on_device("plan", job, "--memory", "64MiB", "--on", "this:cpu", *WITHOUT, devices=2)
    assert on_processor.returncode == 0, on_processor.stderr
    assert "this machine's processor" in on_processor.stdout
    assert NAME not in on_processor.stdout


def test_commands_without_nproc_do_not_offer_it(job: str, memfit_on_device: Command, tmp_path: Path) -> None:
    said = memfit_on_device("estimate", job, devices=2).stderr
    assert f"device: {NAME} (sim); `memfit plan --nproc 2` plans for all 2" in said
    plan = tmp_path / "ddp.yaml"
    plan.write_text("ranks: 2\ntechniques: {ddp: {}}\n")
    said = memfit_on_device("run", job, "--plan", plan, "--steps", "1", devices=2).stderr
    assert f"device: {NAME} (sim)\n" in said


def test_the_advice_on_precision_names_its_device_and_touches_none(
    job: str, memfit_on_device: Command
) -> None:
    result = memfit_on_device("estimate", job, "--precision", "bf16", "--after", "0", devices=2)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "in bf16, for cuda, measured on the processor" in result.stdout


@pytest.fixture(scope="module")
def run(job: str, memfit_on_device: Command) -> dict[str, Any]:
    """An undisturbed run of four steps."""
    result = memfit_on_device("run", job, "--steps", "4", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_run_trains_on_the_accelerator_within_its_prediction(run: dict[str, Any]) -> None:
    assert (run["device"], run["peak_source"]) == (NAME, "torch's allocator of sim")
    assert run["measured_peak_bytes"] == pytest.approx(run["predicted_peak_bytes"], rel=0.005)
    assert run["reserved_peak_bytes"] >= run["measured_peak_bytes"]


def test_a_run_that_fills_the_device_says_so(job: str, memfit_on_device: Command) -> None:
    result = memfit_on_device("run", job, "--steps", "3", "--memory", "2MiB")
    assert result.returncode == 1
    assert "memory of the device (sim) ran out: " in result.stdout
    assert "2.0 MiB allowed" in result.stdout or "2 MiB allowed" in result.stdout
    assert "memory of the host" not in result.stdout
    assert " of host memory resident at most" in result.stdout
    assert "not in a cap" not in result.stdout  # which is on the device's memory


def test_running_out_of_the_devices_memory_is_an_outcome(job: str, memfit_on_device: Command) -> None:
    result = memfit_on_device("run", job, "--steps", "3", "--memory", "2MiB", "--json")
    assert result.returncode == 1
    ended = json.loads(result.stdout)
    assert (ended["outcome"], ended["limit_kind"]) == ("oom", "memory fraction")
    assert "out of memory in" in ended["reason"]


@pytest.mark.long
def test_a_resumed_run_ends_as_an_undisturbed_one(
    run: dict[str, Any], job: str, memfit_on_device: Command, tmp_path: Path
) -> None:
    first = memfit_on_device("run", job, "--steps", "2", "--save", tmp_path / "kept", "--json")
    assert first.returncode == 0, first.stderr
    second = memfit_on_device("run", job, "--steps", "4", "--resume", tmp_path / "kept", "--json")
    assert second.returncode == 0, second.stderr
    losses = [*json.loads(first.stdout)["losses"], *json.loads(second.stdout)["losses"]]
    assert losses == run["losses"]


def test_what_cannot_train_on_the_device_is_refused_in_one_line(
    job: str, memfit_on_device: Command, tmp_path: Path
) -> None:
    for engine in ("accelerate", "deepspeed", "megatron"):
        if engine != "megatron" and ENGINES[engine].probe().problem:
            continue
        result = memfit_on_device("run", job, "--steps", "1", "--engine", engine)
        assert result.returncode == 2, result.stderr
        assert f"engine {engine} cannot train on devices of the kind 'sim'" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    moving = tmp_path / "moving.py"
    moving.write_text(JOB.replace('"y": labels', '"y": labels.to("sim")'))
    by_batch = memfit_on_device("estimate", f"{moving}:job")
    assert by_batch.returncode == 2
    assert by_batch.stderr.splitlines()[-1].startswith(
        "memfit: make_batch returns tensors on sim:0; allowed: "
    )


def test_a_plan_that_torch_cannot_compile_for_the_device_is_refused_with_its_name(
    job: str, memfit_on_device: Command, tmp_path: Path
) -> None:
    plan = tmp_path / "compile.yaml"
    plan.write_text("techniques: {compile: {}}\n")
    result = memfit_on_device("run", job, "--plan", plan, "--steps", "1")
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("memfit: compile is not supported on devices of the kind 'sim'")


def test_engines_that_train_on_cuda_only_are_not_called_supported_on_another_device(
    job: str, memfit_on_device: Command
) -> None:
    result = memfit_on_device("estimate", job, "--engines", "--json")
    assert result.returncode == 0, result.stderr
    cuda = {engine["engine"]: engine["cuda"] for engine in json.loads(result.stdout)["engines"]}
    assert cuda["colossalai"] == cuda["megatron"] == ["training on sim devices"]
    assert cuda["native"] == []


def test_another_machine_is_refused_where_training_runs_here(job: str, memfit_on_device: Command) -> None:
    result = memfit_on_device("run", job, "--on", "H100-SXM")
    assert (result.returncode, result.stdout) == (2, "")
    assert "training runs on this machine only; allowed: this, this:cpu" in result.stderr
    missing = memfit_on_device("run", job, "--on", "this:cuda")
    assert missing.returncode == 2
    assert "no device of the kind 'cuda'" in missing.stderr


def test_more_ranks_than_devices_are_refused(job: str, memfit_on_device: Command) -> None:
    result = memfit_on_device("plan", job, "--nproc", "2")
    assert result.returncode == 2
    assert "--nproc 2 is more than the 1 device of this machine" in result.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store.sqlite3"


@pytest.fixture(scope="module")
def poc(
    job: str, memfit_on_device: Command, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, str]:
    report = tmp_path_factory.mktemp("poc") / "report.html"
    result = memfit_on_device(
        "poc",
        job,
        *WITHOUT,
        "--goal",
        "smallest",
        "--steps",
        "6",
        "--seeds",
        "1",
        "--json",
        "--out",
        report,
        "--store",
        store,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout), report.read_text(encoding="utf-8"), result.stderr


def test_a_proof_of_concept_runs_on_the_accelerator(poc: tuple[dict[str, Any], str, str]) -> None:
    answer, report, errors = poc
    runs = {(r["role"], r["capped"]): r for r in answer["runs"]}
    assert {r["device"] for r in answer["runs"]} == {NAME}
    assert runs["baseline", True]["outcome"] == "oom"
    assert runs["recommended", True]["outcome"] == "ok"
    assert answer["verdict"] is not None
    for run in answer["runs"]:
        if run["outcome"] == "ok":
            assert run["measured_peak_bytes"] == pytest.approx(run["predicted_peak_bytes"], rel=0.005)
    assert f"device: {NAME} (sim)" in errors
    assert NAME in report
    text = " ".join(re.sub(r"<[^>]+>", " ", report).split())
    assert f"accelerators {NAME}" in text
    assert "none seen" not in text
    assert "this machine can hold" not in text
    assert "another processor" not in text
    assert "measuring this machine" not in errors


def test_the_check_of_gates_names_the_device_of_the_proof_of_concept(
    poc: tuple[dict[str, Any], str, str], memfit_on_device: Command, store: Path
) -> None:
    result = memfit_on_device("decide", "--gates", "default", "--store", store)
    assert f"PoC {poc[0]['poc_id']}: net tiny, {NAME} of this machine" in result.stdout


def test_the_report_calls_one_thing_this_machine(poc: tuple[dict[str, Any], str, str]) -> None:
    text = re.sub(r"<[^>]+>", " ", poc[1])
    assert f"{NAME} of this machine" in text
    assert "this machine's processor" not in text
    assert not re.search(
        r"(?<!of )this machine, \d", text
    )  # alone, as the processor is called without a device
