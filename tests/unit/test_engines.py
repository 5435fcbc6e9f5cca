"""Engine declarations: they are consistent, and the engines' documentation page agrees with them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from memfit import catalog
from memfit.cost.memory import live_peak_bytes
from memfit.engines.base import Engine
from memfit.engines.registry import ENGINES, engine, ready_engine, render, supporting_engine
from memfit.export.script_steps import CLIP
from memfit.jobs.registry import load
from memfit.report.plan_words import in_words
from memfit.report.words import load_words
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.trace.tracer import trace, use_step
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.worker.train import step_maker

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
TENSOR = Plan(uses=(make_use("tensor-parallel", {}),), ranks=2)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_names_only_existing_techniques(name: str) -> None:
    found = ENGINES[name]
    assert found.carries | found.applied_by_memfit | found.unsaved <= set(TECHNIQUES)
    assert found.applied_by_files - {CLIP} <= found.known
    assert not found.carries & found.applied_by_memfit


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_page_has_the_versions_that_each_engine_accepts(name: str) -> None:
    row = next((line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")), "")
    assert row, f"the table of docs/engines.md has no row for {name}"
    low, high = ENGINES[name].tested
    assert not low or f"| {low} to below {high} |" in row


@pytest.mark.parametrize("name", [n for n in ENGINES if n != "replay"])
def test_facts_about_an_engine_have_a_source_and_a_date(name: str) -> None:
    facts = catalog.engine_facts(name)
    assert {"release", "torch", "licence", "status", "builds"} <= set(facts)
    assert all(source and re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, source, date in facts.values())


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_each_engine_with_a_package_has_a_name_in_words(lang: str) -> None:
    texts = load_words(lang).texts
    named = {name for name, e in ENGINES.items() if e.distribution}
    assert not {name for name in named if f"engine.{name}" not in texts}
    assert in_words("deepspeed or megatron", load_words("en")) == "DeepSpeed or Megatron-LM"


def test_an_unsupported_technique_is_refused_with_the_engines_that_support_it() -> None:
    with pytest.raises(
        UserError, match=r"tensor-parallel is not supported by accelerate.*engines that support it: native"
    ):
        supporting_engine("accelerate", TENSOR)
    with pytest.raises(UserError, match="did you mean 'deepspeed'"):
        engine("deepsped")


def test_a_probe_reports_an_untested_version_and_a_missing_package_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probed = Engine(
        name="x",
        summary="",
        applied_by_files=frozenset(),
        distribution="numpy",
        tested=("0.1", "0.2"),
        install="pip install x",
    )
    assert "is untested" in probed.probe().problem
    missing = dataclasses.replace(probed, distribution="no-such-thing")
    assert (missing.probe().problem, missing.probe().fix) == ("not installed", "pip install x")
    inside = dataclasses.replace(probed, tested=("1", "99"))
    assert not inside.probe().problem
    monkeypatch.setitem(ENGINES, "x", missing)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not installed; install a tested version: pip install x"):
        ready_engine("x", Plan())


def test_fsdp2_replicas_that_leave_nothing_to_shard_are_refused() -> None:
    with pytest.raises(UserError, match="leave nothing to shard; use ddp"):
        trace(load(JobRef(spec="char-lm")), Plan(uses=(make_use("fsdp2", {"replicas": 2}),), ranks=2))


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_state_that_fsdp2_offloads_is_in_host_memory_under_accelerate_too() -> None:
    job, plan = load(JobRef(spec="char-lm")), Plan(uses=(make_use("fsdp2", {"offload": True}),), ranks=2)
    found = {}
    for name in ("native", "accelerate"):
        with use_step(step_maker(name, None)):
            traced = trace(job, plan, device="cuda")
        found[name] = traced.host_step_bytes, live_peak_bytes(traced)
    assert found["accelerate"][0] == found["native"][0]
    assert found["native"][0] > 2 * 4 * traced.parameter_count  # half of what is 16 bytes per parameter
    assert found["accelerate"][1] == pytest.approx(found["native"][1], rel=0.01)


def test_accelerate_gets_the_path_of_deepspeeds_file_as_from_its_launcher(tmp_path: Path) -> None:
    """Without it, an Accelerator on a GPU trains with its own default settings of DeepSpeed."""
    from memfit.engines import accelerate
    from memfit.engines.accelerate import step

    content = accelerate.config(Plan(uses=(make_use("zero", {"stage": 3}),)))
    variables = step._variables(content, tmp_path)
    assert variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(tmp_path / "deepspeed.json")
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in step._variables(content)


def test_the_engines_configuration_is_written_beside_the_run_file() -> None:
    plan = Plan(uses=(make_use("fsdp2", {}),), ranks=2)
    spec = RunSpec(
        name="t", role="t", job=JobRef(spec="char-lm"), plan=plan, engine="accelerate", seed=0, steps=1
    )
    launch = render(spec)
    assert set(launch.files) == {"run.json", "accelerate.yaml"}
    assert "distributed_type: FSDP" in launch.files["accelerate.yaml"]


def test_accelerate_supports_autocast_without_fsdp2_and_fp16_only_on_gpus() -> None:
    half = Plan(uses=(make_use("fp16-autocast", {}), make_use("ddp", {})), ranks=2)
    spec = RunSpec(
        name="t", role="t", job=JobRef(spec="char-lm"), plan=half, engine="accelerate", seed=0, steps=1
    )
    assert "mixed_precision: fp16" in render(spec).files["accelerate.yaml"]
    assert supporting_engine("accelerate", half)
    with pytest.raises(
        UserError,
        match="cannot train this plan on the CPU ranks of memfit's runs: fp16-autocast requires CUDA",
    ):
        ready_engine("accelerate", half)
    assert not ENGINES["accelerate"].asks_cuda(half.without("fp16-autocast"))
    for kind in ("fp16", "bf16"):
        sharded = Plan(uses=(make_use(f"{kind}-autocast", {}), make_use("fsdp2", {})), ranks=2)
        with pytest.raises(
            UserError, match=f"{kind}-autocast: with FSDP2, Accelerate's {kind} setting casts parameters"
        ):
            supporting_engine("accelerate", sharded)


def test_accelerate_ignores_fp16_on_a_cpu() -> None:
    """This is why memfit refuses such a run on a CPU."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # state left by earlier tests
    made = accelerate.Accelerator(cpu=True, mixed_precision="fp16")
    assert (made.mixed_precision, made.native_amp, made.scaler) == ("fp16", False, None)
    made.state._reset_state(reset_partial_state=True)
