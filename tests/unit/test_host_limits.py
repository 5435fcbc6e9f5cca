"""The memory that this machine has for a process: limits of control groups, containers and Slurm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import psutil
import pytest

from memfit.cli import doctor
from memfit.cli.app import main
from memfit.jobs.builtin import weather
from memfit.planner.batch_memory import check_batch_memory
from memfit.runtime import cgroup, devices, local_machine
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import JobRef

GIB = 2**30


def _group(
    folder: Path, names: tuple[str, str, str], limit: object, used_bytes: int, cache_bytes: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used_bytes}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache_bytes}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_a_limit_above_the_own_group_of_version_2_counts(tmp_path: Path) -> None:
    _group(tmp_path / "job", V2, 2 * GIB, GIB, 0)
    _group(tmp_path / "job" / "task", V2, "max", GIB, 0)
    own = tmp_path / "own"
    own.write_text("0::/job/task\n")
    assert cgroup.limit_here(root=tmp_path, own=own) == (2 * GIB, GIB)


def test_the_least_limit_counts_though_a_group_above_has_less_left(tmp_path: Path) -> None:
    _group(tmp_path / "job", V2, 8 * GIB, 7 * GIB, 0)
    _group(tmp_path / "job" / "task", V2, 4 * GIB, GIB, 0)
    own = tmp_path / "own"
    own.write_text("0::/job/task\n")
    assert cgroup.limit_here(root=tmp_path, own=own) == (4 * GIB, GIB)


def test_the_memory_hierarchy_of_version_1_counts(tmp_path: Path) -> None:
    _group(tmp_path / "memory" / "slurm" / "job_7", V1, GIB, GIB // 2, GIB // 4)
    _group(tmp_path / "memory", V1, 9223372036854771712, 8 * GIB, 0)  # no limit
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/other\n4:memory:/slurm/job_7\n1:name=systemd:/x\n0::/\n")
    assert cgroup.limit_here(root=tmp_path, own=own) == (GIB, 3 * GIB // 4)


@pytest.mark.parametrize("names", [V1, V2], ids=["version 1", "version 2"])
def test_a_container_sees_its_limit_in_the_top_group(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """Its own group is the top one that it sees; the path is that of the host, as of a Kubernetes pod."""
    _group(tmp_path / "memory" if names is V1 else tmp_path, names, GIB, 0, 0)
    own = tmp_path / "own"
    own.write_text(f"{'4:memory' if names is V1 else '0:'}:/kubepods/pod1/container2\n")
    assert cgroup.limit_here(root=tmp_path, own=own) == (GIB, GIB)


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    _group(tmp_path, V2, "max", GIB, 0)
    own = tmp_path / "own"
    own.write_text("0::/\n")
    assert cgroup.limit_here(root=tmp_path, own=own) is None
    assert cgroup.limit_here(root=tmp_path, own=tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("variables", "size_bytes"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, 2 * GIB),
        ({"SLURM_MEM_PER_NODE": "3G"}, 3 * GIB),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "4"}, 2 * GIB),
        ({"SLURM_MEM_PER_GPU": "1024", "SLURM_GPUS_ON_NODE": "2"}, 2 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, None),  # the whole node
        ({"SLURM_MEM_PER_NODE": "much"}, None),
        ({"SLURM_MEM_PER_CPU": "512"}, None),
        ({"SLURM_MEM_PER_NODE": "9" * 5000}, None),
    ],
)
def test_slurm_allots_memory(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], size_bytes: int | None
) -> None:
    for name, value in {"SLURM_JOB_ID": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    allotted = devices.slurm_memory()
    assert (allotted[0] if allotted else None) == size_bytes


def test_what_slurm_left_in_the_environment_counts_only_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert devices.slurm_memory() is None


def test_this_machine_has_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    total_bytes = int(psutil.virtual_memory().total)
    with mock.patch.object(cgroup, "limit_here", return_value=(total_bytes // 2, GIB // 8)):
        limit = local_machine.host_memory_limit()
        assert (limit.total_bytes, limit.free_bytes, limit.source) == (
            total_bytes // 2,
            GIB // 8,
            "control group",
        )
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
        device = local_machine.this_machine("jp", HOST).device
        assert device.memory_bytes.value == 64 * 2**20
        assert device.memory_bytes.source == "Slurm (SLURM_MEM_PER_NODE)"
        assert local_machine.free_device_bytes(HOST) == 64 * 2**20


def test_doctor_tells_what_sets_the_memory() -> None:
    with mock.patch.object(cgroup, "limit_here", return_value=(GIB, GIB // 2)):
        detail = next(c.detail for c in doctor.machine() if c.name == "memory")
    assert detail.startswith("1 GiB by the control group, of ")
    assert detail.endswith("512 MiB free now")


def test_a_batch_too_large_for_this_machine_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_machine, "free_bytes", lambda: 4 * 2**20)  # a sample has 5 x 32 x 32 x 4 bytes
    made = mock.Mock(side_effect=weather.train_batch)
    monkeypatch.setattr(weather, "train_batch", made)
    for command in (
        "estimate",
        "plan --on 8xB200",
        "estimate --precision both",
        "baseline write --file b.toml",
    ):
        assert main((*command.split(), "weather", "--batch", "4096")) == 2
        err = capsys.readouterr().err
        assert "--batch 4096: to predict a step of weather" in err
        assert "it takes 80 MiB, more than a third of the 4 MiB that are free" in err
        assert "allowed: at most 68 samples of 20 KiB each, over all ranks" in err
    assert {call.args[2] for call in made.call_args_list} <= {1}
    check_batch_memory(JobRef(spec="weather", batch=68))
    check_batch_memory(JobRef(spec="weather"))  # its own batch
    vision = JobRef(
        spec="hf:vit?num_hidden_layers=1", batch=7
    )  # a sample has 3 x 224 x 224 x 4 bytes and a label
    with pytest.raises(UserError, match=r"allowed: at most 2 samples of 588 KiB each"):
        check_batch_memory(vision)
    check_batch_memory(dataclasses.replace(vision, batch=2))
    monkeypatch.setattr(local_machine, "free_bytes", lambda: 4 * 2**10)
    with pytest.raises(UserError, match="allowed: none of this size"):
        check_batch_memory(JobRef(spec="weather", batch=1))


def test_the_largest_batch_is_at_most_what_this_machine_can_make(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(local_machine, "free_bytes", lambda: 2**20)
    plan = tmp_path / "plain.yaml"
    plan.write_text("techniques: {}\n")
    words = ("plan", "weather", "--largest", "batch", "--on", "H100-SXM", "--plan", str(plan))
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the limit is not the memory of the training: --batch 18: to predict a step of weather" in out
