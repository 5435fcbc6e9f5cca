"""Colossal-AI: the arguments of its plugins, and its DDP compared with one native process.

What trains or builds a plugin needs the engine's own environment (`memfit doctor --install colossalai`,
5.7 GiB); without it those tests are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from memfit.cli import main
from memfit.cost.memory import memory_profile
from memfit.engines import environment
from memfit.engines.base import Engine
from memfit.engines.colossalai import CONFIG, ENGINE, config, plugin_of
from memfit.engines.environment import Environment, load_environment, store_environment
from memfit.engines.registry import ready_engine, render
from memfit.jobs.registry import load
from memfit.runtime.child_process import run
from memfit.runtime.engine_environment import install
from memfit.runtime.ranks import run_ranks
from memfit.techniques.registry import check, make_use
from memfit.trace.tracer import trace
from memfit.types.errors import RunError, UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind

made = pytest.mark.skipif(bool(ENGINE.probe().problem), reason=f"colossalai: {ENGINE.probe().problem}")

JOB = JobRef(spec=f"{Path(__file__).parent / 'small_gpt.py'}:gpt")


def _plan(ranks: int, **uses: dict[str, Any]) -> Plan:
    return check(Plan(ranks=ranks, uses=tuple(make_use(n.replace("_", "-"), k) for n, k in uses.items())))


def _spec(plan: Plan, engine: str = "colossalai") -> RunSpec:
    return RunSpec(
        name="x",
        role="run",
        job=JOB,
        plan=plan,
        engine=engine,
        seed=0,
        steps=20,
        threads=1,
        evaluate=False,
    )


@made
def test_ddp_has_the_losses_of_one_process_and_the_predicted_memory() -> None:
    plan = _plan(2, ddp={"bucket_mib": 1, "sync": "last"}, gradient_accumulation={"micro_batches": 2})
    reference = run(render(_spec(_plan(1), "native")), on_event=lambda event: None)
    ranks = run_ranks(render(_spec(plan)))
    assert [r.outcome for r in ranks] == [OutcomeKind.OK] * 2, ranks[0].reason
    losses = [statistics.fmean(parts) for parts in zip(*(r.losses for r in ranks), strict=True)]
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    for rank, measured in enumerate(ranks):
        found = memory_profile(trace(load(JOB), plan, rank=rank), Calibration())
        assert measured.peak_bytes == pytest.approx(found.peak_bytes, rel=0.02)


@made
def test_ddp_that_is_not_applied_is_reported() -> None:
    launch = render(_spec(_plan(2, ddp={})))
    without = json.dumps({"plugin": "", "arguments": {}})
    ranks = run_ranks(dataclasses.replace(launch, files={**launch.files, CONFIG: without}))
    assert all(r.outcome is OutcomeKind.FAILED and "ddp" in r.reason for r in ranks), ranks[0].reason


PLUGINS = {
    "TorchDDPPlugin": (
        _plan(2, ddp={"bucket_mib": 7}),
        {"bucket_cap_mb": 7, "gradient_as_bucket_view": True},
    ),
    "LowLevelZeroPlugin": (
        _plan(2, zero={"stage": 2, "reduce_bucket_elements": 3 << 20, "offload": "optimizer"}),
        {"stage": 2, "reduce_bucket_size_in_m": 3, "cpu_offload": True, "precision": "fp32"},
    ),
    "GeminiPlugin": (
        _plan(2, zero={"stage": 3, "precision": "bf16", "offload": "parameters"}),
        {"shard_param_frac": 1.0, "offload_optim_frac": 1.0, "offload_param_frac": 1.0, "precision": "bf16"},
    ),
    "HybridParallelPlugin": (
        _plan(
            4,
            pipeline={"stages": 2, "schedule": "interleaved", "virtual": 2},
            tensor_parallel={"vocabulary": "gathered", "sequence": True},
        ),
        {
            "tp_size": 2,
            "pp_size": 2,
            "num_model_chunks": 2,
            "pp_style": "interleaved",
            "sequence_parallelism_mode": "split_gather",
            "parallel_output": False,
        },
    ),
}
_BUILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from colossalai.booster import Booster, plugin
for ranks, given in json.loads(sys.argv[1]):
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    Booster(plugin=getattr(plugin, given["plugin"])(**given["arguments"]))
    dist.destroy_process_group()
    print("taken:", given["plugin"])
"""


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plan_maps_to_a_plugin_and_its_arguments(name: str) -> None:
    plan, wanted = PLUGINS[name]
    assert ENGINE.refusals(plan) == ()
    given = json.loads(render(_spec(plan)).files[CONFIG])
    assert given == config(plan)
    assert given["plugin"] == plugin_of(plan) == name
    assert wanted.items() <= given["arguments"].items()


@made
def test_the_plugin_constructors_accept_the_arguments() -> None:
    home = load_environment("colossalai")
    assert home is not None
    given = [(p.ranks, json.loads(render(_spec(p)).files[CONFIG])) for p, _ in PLUGINS.values()]
    child = subprocess.run(
        (home.python, "-c", _BUILD, json.dumps(given)), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert [line for line in child.stdout.splitlines() if line.startswith("taken: ")] == [
        f"taken: {name}" for name in PLUGINS
    ]


@pytest.mark.parametrize("name", ["LowLevelZeroPlugin", "GeminiPlugin", "HybridParallelPlugin"])
def test_a_plugin_that_requires_cuda_is_not_run_without_it(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} requires CUDA"):
        ready_engine("colossalai", PLUGINS[name][0])


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (_plan(2, zero={"stage": 3}), "precision must be 'bf16'"),
        (_plan(2, zero={"stage": 1}), "must be a multiple"),
        (_plan(2, tensor_parallel={}), "must not be 'whole'"),
        (_plan(2, fsdp2={}), "fsdp2 is not supported by colossalai"),
    ],
)
def test_an_unsupported_plan_is_refused_with_the_reason(plan: Plan, why: str) -> None:
    assert why in "; ".join(ENGINE.refusals(plan))


# --- an environment of its own


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "environments_folder", lambda: tmp_path / "engines")
    return tmp_path


def test_without_an_environment_the_install_command_is_given(home: Path) -> None:
    probe = ENGINE.probe()
    assert (probe.problem, probe.fix) == ("not installed", "memfit doctor --install colossalai")


def test_a_deleted_environment_is_reported(home: Path) -> None:
    nowhere = str(home / "nowhere")
    store_environment(
        "colossalai",
        Environment(
            folder=nowhere,
            python=f"{nowhere}/bin/python",
            packages=nowhere,
            installed_bytes=1,
            took_s=1.0,
        ),
    )
    assert ENGINE.probe().problem == f"its environment {nowhere} is gone or lacks the package"
    launch = render(_spec(_plan(2, ddp={})))
    assert launch.argv[0] == f"{nowhere}/bin/python"
    assert Path(launch.env["PYTHONPATH"], "memfit").is_dir()


def _tiny(*requirements: str) -> Engine:
    return dataclasses.replace(ENGINE, name="tiny", requirements=requirements)


def test_installing_an_environment_measures_and_records_it(home: Path) -> None:
    told: list[str] = []
    found = install(_tiny("--help"), home / "own", told.append)  # pip only prints its help
    assert load_environment("tiny") == found
    assert Path(found.python).is_file()
    assert Path(found.packages, "pip").is_dir()
    assert found.installed_bytes > 1_000_000
    assert told
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        install(_tiny("--help"), home / "own", told.append)


def test_a_failed_installation_reports_the_error_of_pip(home: Path) -> None:
    with pytest.raises(RunError, match="no such option: --nonsense"):
        install(_tiny("--nonsense"), home / "own", lambda line: None)
    assert load_environment("tiny") is None


def test_engines_are_listed_and_one_without_an_environment_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--install", "megatron"]) == 2
    assert "needs no environment of its own" in capsys.readouterr().err
    assert main(["list", "engines", "--json"]) == 0
    names = [e["name"] for e in json.loads(capsys.readouterr().out)["engines"]]
    assert "colossalai" in names
