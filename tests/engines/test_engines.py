"""Rows of benchmarks/engines.py on two gloo ranks: losses over 8 steps, and the peak of every rank."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

from memfit.runtime.counting_allocator import available

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORST_RATIO, WORST_REST_RATIO = 0.02, 0.05


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("engines_benchmark", BENCHMARKS / "engines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ENGINES = _load()
ENGINES.STEPS = 8
ROWS = [row for row in ENGINES.rows() if row.short]


@pytest.fixture(scope="module")
def bench() -> Any:
    if available() is not None:
        pytest.skip(f"no counting allocator: {available()}")
    return ENGINES.Bench()


@pytest.mark.quick_cases(
    "*1 rank: zero(stage=3*",
    "accelerate, mlp*",
    "deepspeed, mlp*stage=3*",
    "accelerate, gpt*fsdp2*",
    "fairscale*",
    "colossalai*",
    "megatron*sequence=True*",
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_losses_match_the_reference_and_peaks_the_prediction(
    row: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row.engine != "fairscale":  # which keeps tensors longer in a forked worker, for a reason not known
        workers = forked.processes("memfit.worker ")
        monkeypatch.setattr("memfit.runtime.child_process.subprocess", workers)
    record = bench.record(row)
    if (why := record.get("why_not", "")).endswith("not installed"):
        pytest.skip(f"{row.engine}: {why}")
    assert not why
    assert ENGINES.agrees(record), (record["losses"], record["reference"])
    whole, rest = ENGINES.errors(record)
    assert abs(whole) <= WORST_RATIO
    assert abs(rest) <= WORST_REST_RATIO


@pytest.mark.parametrize(
    "uses", [{"ddp": {}}, {"fsdp2": {"precision": "bf16", "reshard": False}}, {"zero": {"stage": 2}}], ids=str
)
def test_accelerate_reads_the_rendered_configuration(uses: dict[str, Any], tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    from memfit.engines.registry import render

    row = ENGINES.Row("accelerate", "mlp", uses)
    path = tmp_path / "accelerate.yaml"
    path.write_text(render(ENGINES.spec_of(row)).files["accelerate.yaml"])
    read = config_args.load_config_from_file(str(path))
    assert read.num_processes == 2
    sharding = read.fsdp_config
    kinds = {"fsdp2": ("FSDP", "bf16"), "zero": ("DEEPSPEED", None), "ddp": ("MULTI_GPU", "no")}
    assert (read.distributed_type.value, read.mixed_precision) == kinds[next(iter(uses))]
    assert read.deepspeed_config.get("deepspeed_config_file") == (
        "deepspeed.json" if "zero" in uses else None
    )
    assert not sharding or (sharding["fsdp_version"], sharding["fsdp_reshard_after_forward"]) == (2, False)
