"""torchtitan's TOML and arguments: known keys, accepted by its config managers, readable back as a plan."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from test_export import handover

from memfit.export.targets import bundle
from memfit.export.write import write
from memfit.lint import to_plan
from memfit.lint.check import check
from memfit.lint.parse import read
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.plan import Plan

# Fields of torchtitan/config/job_config.py (v0.2.2) that are written.
TRAINING = {
    "local_batch_size",
    "global_batch_size",
    "enable_cpu_offload",
    "dtype",
    "mixed_precision_param",
    "mixed_precision_reduce",
}
PARALLELISM = {
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "fsdp_reshard_after_forward",
    "disable_loss_parallel",
    "pipeline_parallel_schedule",
    "pipeline_parallel_microbatch_size",
}
KEYS = {
    "training": TRAINING,
    "parallelism": PARALLELISM,
    "activation_checkpoint": {"mode", "selective_ac_option"},
    "optimizer": {"implementation", "early_step_in_backward"},
    "compile": {"enable", "components"},
}
# What v0.3.0 adds and lacks (torchtitan/config/configs.py, components/optimizer/optimizer.py, 2026-11-25):
NEW = "--training.disable-cuda-graphs"
GONE = {("parallelism", "disable_loss_parallel"), ("optimizer", "early_step_in_backward")}

ENDS = {"units": "ends"}
CUT = {"sequence": True, "vocabulary": "parallel-loss"}


def plan(ranks: int = 1, **uses: dict[str, Any]) -> Plan:
    named = {name.replace("_", "-"): knobs for name, knobs in uses.items()}
    return Plan(uses=tuple(make_use(n, k) for n, k in named.items()), ranks=ranks)


PLANS = {
    "plain": plan(),
    "bf16": plan(bf16_autocast={}, activation_checkpointing={}, adamw_fused={}),
    "fsdp": plan(8, fsdp2={**ENDS, "precision": "bf16", "reshard": False}, activation_checkpointing={}),
    "hsdp": plan(8, fsdp2={**ENDS, "replicas": 2, "offload": True}, adamw_single={}, compile={}),
    "every": plan(4, fsdp2=ENDS, activation_checkpointing={"every": 2}, gradient_accumulation={}),
    "op": plan(2, fsdp2=ENDS, selective_checkpointing={"keep": "every-second-matmul"}),
    "tensor": plan(4, tensor_parallel={"degree": 2, **CUT}, fsdp2={**ENDS, "precision": "bf16"}),
    "gathered": plan(2, tensor_parallel={"sequence": True, "vocabulary": "gathered"}),
    "pipeline": plan(
        4, pipeline={"stages": 2, "micro_batches": 2}, fsdp2={**ENDS, "sync": "last", "reshard": False}
    ),
    "interleaved": plan(2, pipeline={"schedule": "interleaved", "virtual": 2, "micro_batches": 8}),
    "context": plan(4, context_parallel={"degree": 2}, fsdp2=ENDS),
    "early": plan(optimizer_in_backward={}),
    "float8": plan(8, fsdp2={**ENDS, "precision": "bf16"}, compile={}, float8_linear={"scaling": "rowwise"}),
}
LOW = {"model": {"converters"}, "quantize": {"linear"}}  # tables of the float8 plan only
NEWER = [
    name for name in PLANS if name not in {"every", "op", "gathered", "early", "float8"}
]  # v0.3 can express these
PARSERS = Path(__file__).parents[2] / ".parsers"


def exported(given: Plan) -> dict[str, str]:
    return dict(bundle("torchtitan", handover(given)))


@pytest.mark.parametrize("name", PLANS)
def test_exported_keys_are_known_to_torchtitan(name: str) -> None:
    files = exported(PLANS[name])
    tables = tomllib.loads(files["torchtitan.toml"])
    keys = KEYS | (LOW if name == "float8" else {})
    assert tables.keys() == keys.keys()
    for table, options in tables.items():
        assert options.keys() <= keys[table]
    degrees = [v for k, v in tables["parallelism"].items() if k.endswith("_degree") and "expert" not in k]
    product = 1
    for degree in degrees:
        product *= degree
    assert product == PLANS[name].ranks
    for word in shlex.split(files.get("torchtitan.args", "")):
        if word.startswith("--") and word != NEW:
            table, _, option = word[2:].partition(".")
            assert (table, option) not in GONE
            assert option.removeprefix("no-").replace("-", "_") in KEYS[table]


# torchtitan's foreach implementation of the optimizer is the job's own AdamW.
@pytest.mark.parametrize("name", sorted(PLANS.keys()))
def test_the_toml_reads_back_as_the_same_plan(tmp_path: Path, name: str) -> None:
    write(tmp_path / "out", bundle("torchtitan", handover(PLANS[name])))
    setup = read([tmp_path / "out" / "torchtitan.toml"], ranks=PLANS[name].ranks)
    carried = to_plan.convert(setup)
    assert carried.plan == PLANS[name]
    assert carried.batch == 8
    assert not [f for f in check(setup) if f.severity == "error"]


def its_own(release: str, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What the config manager of that release makes of command lines, by case."""
    package = PARSERS / f"torchtitan-{release}"
    if not package.is_dir():
        pytest.skip(f"bash scripts/parsers.sh puts torchtitan {release} there")
    child = subprocess.run(
        (sys.executable, Path(__file__).parent / "parse_torchtitan.py"),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(package)},
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def by_toml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("toml")
    for name, given in PLANS.items():
        (folder / f"{name}.toml").write_text(exported(given)["torchtitan.toml"], encoding="utf-8")
    return its_own("0.2", {name: ["--job.config_file", str(folder / f"{name}.toml")] for name in PLANS})


@pytest.fixture(scope="module")
def by_arguments() -> dict[str, dict[str, Any]]:
    chosen = ["--module", "llama3", "--config", "llama3_debugmodel"]
    cases = {n: [*chosen, *exported(PLANS[n])["torchtitan.args"].split()] for n in NEWER}
    return its_own("0.3", {**cases, "unknown": [*chosen, "--parallelism.no-such-degree", "2"]})


@pytest.mark.parametrize("name", PLANS)
def test_the_config_manager_of_torchtitan_0_2_accepts_the_toml(
    name: str, by_toml: dict[str, dict[str, Any]]
) -> None:
    found = by_toml[name]
    assert "refused" not in found, found
    tables = tomllib.loads(exported(PLANS[name])["torchtitan.toml"])
    low = tables.pop("quantize", {"linear": {"float8": {}}})["linear"]["float8"]
    assert low.items() <= found["sections"]["float8"].items()
    for table, options in tables.items():
        assert options.items() <= found["sections"][table].items()


@pytest.mark.parametrize("name", NEWER)
def test_the_config_manager_of_torchtitan_0_3_accepts_the_arguments(
    name: str, by_arguments: dict[str, dict[str, Any]]
) -> None:
    found = by_arguments[name]
    assert "refused" not in found, found
    told = tomllib.loads(exported(PLANS[name])["torchtitan.toml"])
    kind = {"none": "NoneType", "full": "FullAC.Config"}[told.pop("activation_checkpoint")["mode"]]
    assert found["sections"]["activation_checkpoint"]["class"] == kind
    assert found["sections"]["training"]["disable_cuda_graphs"]
    for table, options in told.items():
        kept = {option: value for option, value in options.items() if (table, option) not in GONE}
        assert kept.items() <= found["sections"][table].items()


def test_the_config_manager_of_torchtitan_0_3_refuses_an_unknown_argument(
    by_arguments: dict[str, dict[str, Any]],
) -> None:
    assert "no-such-degree" in by_arguments["unknown"]["refused"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (plan(2, fsdp2={}), 'units must be "ends"'),
        (plan(2, ddp={}), "bucket_mib must be 100"),
        (plan(2, fsdp2={**ENDS, "sync": "last"}), 'sync must be "every"'),
        (plan(4, pipeline={"stages": 2}, fsdp2=ENDS), 'sync must be "last" and reshard false'),
        (plan(2, zero={}), "zero is not supported"),
        (plan(2, tensor_parallel={"vocabulary": "gathered"}), "sequence must be true"),
        (plan(2, pipeline={"schedule": "zero-bubble", "virtual": 3}), "virtual must be 2"),
        (
            plan(gradient_accumulation={"micro_batches": 3}),
            "a batch of 8 samples cannot be split equally over 3 micro-batches",
        ),
    ],
)
def test_plans_that_torchtitan_cannot_run_are_refused(given: Plan, said: str) -> None:
    with pytest.raises(UserError, match=said):
        exported(given)


def test_the_readme_names_what_the_newer_torchtitan_release_lacks() -> None:
    files = exported(PLANS["every"])
    assert "torchtitan.args" not in files
    assert "v0.3 does not support recomputing every k-th block" in files["README.md"]
    assert "torchtitan.args" in exported(PLANS["fsdp"])
