"""Host memory: the need of a plan is predicted, compared with what the host has, and part of `fits`."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import catalog
from memfit.cost.host import HostTensors, host_holds, host_line, host_memory, known_host, with_host_memory
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.machine import Fact
from memfit.types.plan import Plan
from memfit.types.result import Interval

pytestmark = pytest.mark.usefixtures("independent_samples")
GIB = 2**30
PROCESS_BYTES = 5 * GIB // 2
_PATH = Path(__file__).parents[2] / "benchmarks" / "host_memory.py"
_SPEC = importlib.util.spec_from_file_location("host_memory_benchmark", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
by_hand = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(by_hand)

ALL_AWAY = {"zero": {"stage": 3, "offload": "parameters", "precision": "bf16"}}


def test_a_70b_model_on_one_4090_does_not_fit_as_its_host_would_need_a_terabyte() -> None:
    """A reported case that used to fit because the memory needed on its host was unknown."""
    width, depth = 8192, 130
    assert by_hand.parameters(width, depth) > 68e9
    found = memfit.estimate(by_hand.job(width, depth, 1), plan=ALL_AWAY, machine="RTX-4090")
    assert found.device_bytes is not None
    assert found.device_bytes.high < found.cap_bytes  # the card itself is large enough
    assert found.host_bytes is not None
    assert 1.0e12 < found.host_bytes.value < 2.0e12
    assert not found.fits
    assert "does not fit" in found.host
    assert "--host-memory" in found.host
    assert found.host in str(found)
    roomy = dataclasses.replace(found, machine=with_host_memory(found.machine, 4 * 2**40))
    assert roomy.fits


def test_host_memory_adds_up_over_ranks_of_one_host_and_not_over_hosts() -> None:
    one = HostTensors(kept_bytes=10 * GIB, building_bytes=0, model_bytes=4 * GIB, batch_bytes=GIB)
    allocated = Interval(value=GIB, low=GIB, high=GIB)

    def of(spec: str, plan: Plan, workers: int = 0) -> dict[str, int]:
        found = host_memory(one, plan, catalog.machine(spec), allocated=allocated, workers=workers)
        return dict(found.parts_bytes)

    assert of("8xH100-SXM", Plan(ranks=8))["offload"] == 80 * GIB
    assert of("2x4xH100-SXM@IB-NDR", Plan(ranks=8))["offload"] == 40 * GIB
    assert of("8xH100-SXM", Plan(ranks=8))["loading"] == 4 * GIB  # one copy for each host
    assert of("8xH100-SXM", Plan(ranks=8), workers=2)["workers"] > 8 * 2 * 2 * GIB


def test_offloaded_parameters_gradients_and_optimizer_states_count_as_host_memory() -> None:
    """Counted by hand: all shards together keep at least 16 bytes of each parameter on the host."""
    count = by_hand.parameters(896, 4)
    for techniques, least in (
        ({"fsdp2": {"offload": True}}, 16),
        ({"zero": {"stage": 2, "offload": "optimizer"}}, 16),
        ({"zero": {"stage": 3, "offload": "parameters"}}, 20),
    ):
        found = memfit.estimate(by_hand.job(896, 4, 4), plan=techniques, machine="4xH100-SXM")
        offload = found.estimate.host_parts_bytes["offload"]
        assert least * count <= offload < 1.9 * least * count, techniques
        assert found.fits


@pytest.mark.parametrize("kind", ["assumed", "published"])
def test_host_memory_of_a_cpu_is_assumed_if_the_device_memory_is(kind: str) -> None:
    machine = catalog.machine("H100-SXM")
    memory = Fact(value=64 * GIB, source="a test", date="2026-01-01", kind=kind)
    cpu = dataclasses.replace(machine.device, kind="cpu", memory_bytes=memory)
    assert known_host(dataclasses.replace(machine, device=cpu)) == (64 * GIB, kind == "assumed")


def test_unknown_host_memory_is_reported_and_an_offloading_plan_does_not_fit() -> None:
    job = by_hand.job(512, 3, 2)
    plain = memfit.estimate(job, machine="MI300A")
    assert plain.machine.host is None
    assert plain.fits
    assert "host memory unknown: not checked" in str(plain)
    away = memfit.estimate(job, plan={"activation-offload": {"to": "host"}}, machine="MI300A")
    assert not away.fits
    assert "unknown" in away.host
    assert "unknown" in away.explain()
    known = memfit.estimate(
        job, plan={"activation-offload": {"to": "host"}}, machine="MI300A", host_memory="64GiB"
    )
    assert known.fits


def test_activations_offloaded_to_disk_take_no_host_memory() -> None:
    job = by_hand.job(512, 3, 8)
    parts = {
        to: memfit.estimate(job, plan={"activation-offload": {"to": to}}, machine="H100-SXM")
        for to in ("disk", "host")
    }
    assert "offload" not in parts["disk"].estimate.host_parts_bytes
    assert parts["host"].estimate.host_parts_bytes["offload"] > 0
    assert parts["host"].host_bytes is not None
    assert parts["host"].host_bytes.high > parts["host"].host_bytes.value  # pinned blocks are rounded up


@pytest.mark.parametrize("more", [{}, {"activation-checkpointing": {}}])
def test_frozen_weights_under_lora_are_cast_before_they_are_on_the_device(more: dict[str, Any]) -> None:
    blocks = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(6)]
    plan = {"lora": {"outside": "frozen"}, "bf16-parameters": {}} | more
    found = memfit.estimate(
        nn.Sequential(*blocks),
        torch.randn(2, 1024),
        loss=lambda model, batch: model(batch).square().mean(),
        plan={"techniques": plan},
        machine="RTX-4090",
    ).estimate
    weights_bytes = 6 * 1024 * 1025 * 4
    assert found.phase_peak_bytes["setup"] < 0.75 * weights_bytes
    assert found.host_bytes is not None
    assert found.host_parts_bytes["loading"] >= weights_bytes


def test_loader_workers_add_to_host_memory() -> None:
    job = by_hand.job(512, 2, 8)
    few, many = (memfit.estimate(job, machine="8xH100-SXM", workers=n, plan="ddp") for n in (0, 16))
    assert few.host_bytes is not None
    assert many.host_bytes is not None
    assert many.host_bytes.value > few.host_bytes.value + 8 * 16 * 2**20
    small = memfit.estimate(job, machine="8xH100-SXM", workers=16, plan="ddp", host_memory="24GiB")
    assert few.fits
    assert not small.fits


def test_no_random_plan_fits_where_its_host_tensors_exceed_the_host_memory() -> None:
    """A few smaller cases of the 500 of benchmarks/host_memory.py, checked against sums made by hand."""
    asked = list(itertools.islice(by_hand.questions(14, seed=5, widest=2048), 14))
    scaled = [
        dataclasses.replace(
            one, host_bytes=one.host_bytes and PROCESS_BYTES * one.devices + one.host_bytes // 2048
        )
        for one in asked
    ]
    found = [by_hand.answer(one) for one in scaled]
    assert not [one for one, answer in zip(scaled, found, strict=True) if by_hand.mistaken(one, answer)]
    for one, answer in zip(scaled, found, strict=True):
        assert answer.host_bytes is not None
        assert answer.host_bytes.value >= by_hand.at_least(one)[0]
    verdicts = [answer.fits for answer in found]
    assert any(verdicts)
    assert not all(verdicts)


def test_sketches_and_traces_agree_on_the_host_memory_that_a_plan_needs() -> None:
    from memfit.planner.capacity import fits_under
    from memfit.planner.request import Request, make_predictor
    from memfit.types.job import JobRef

    plan = memfit.Plan(uses=(make_use("activation-offload", {"to": "host"}),))
    roomy = with_host_memory(catalog.machine("H100-SXM"), 64 * GIB)
    _, predictor = make_predictor(Request(job_ref=JobRef(spec=f"{_PATH}:long"), machine=roomy))
    sketch, whole = predictor.sketch(plan), predictor.whole(plan)
    away = [e.host_parts_bytes["offload"] for e in (sketch, whole)]
    assert away[0] == pytest.approx(away[1], rel=0.1)
    tight = with_host_memory(roomy, 5 * GIB + GIB // 4)
    for estimate in (sketch, whole):
        assert fits_under(80 * GIB, roomy)(estimate)
        assert not fits_under(80 * GIB, tight)(estimate)
    assert fits_under(80 * GIB, tight)(predictor.sketch(memfit.Plan()))


def test_assert_fits_raises_when_the_host_memory_is_too_small() -> None:
    with pytest.raises(AssertionError, match="host memory"):
        memfit.assert_fits(
            by_hand.job(512, 3, 8),
            "80GiB",
            plan={"activation-offload": {"to": "host"}},
            machine="H100-SXM",
            host_memory="1GiB",
        )


def test_host_memory_on_a_cpu_is_the_tensors_and_the_process_itself() -> None:
    found = memfit.estimate(by_hand.job(256, 2, 4))
    assert found.host_bytes is not None
    more = found.host_bytes.value - found.allocated_bytes.value
    assert 200 * 2**20 < more < 500 * 2**20
    assert found.host == ""


def test_a_machine_file_sets_the_memory_of_its_host(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text(
        'name = "desk"\ndevice = "RTX-4090"\n[host]\nname = "desk"\n'
        'memory_bytes = {value = 6e9, source = "free -b", date = "2026-11-01", kind = "measured"}\n'
    )
    plan = {"activation-offload": {"to": "host"}}
    found = memfit.estimate(by_hand.job(2048, 4, 2048), plan=plan, machine=str(path))
    assert not host_holds(found.estimate, found.machine)
    assert "assumed" not in host_line(found.estimate, found.machine)


def test_host_memory_cannot_be_given_for_a_cpu() -> None:
    with pytest.raises(UserError, match="whose own memory is the memory of the host"):
        memfit.estimate(by_hand.job(64, 2, 2), host_memory="64GiB")


def test_an_estimate_takes_host_memory_and_lists_what_is_not_included(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from memfit.cli import main

    plan = tmp_path / "away.yaml"
    plan.write_text("techniques:\n  activation-offload: {to: host}\n")
    words = ["estimate", f"{_PATH}:long", "--plan", str(plan), "--on", "H100-SXM", "--host-memory", "3GiB"]
    assert main(words) in (0, None)
    out = " ".join(capsys.readouterr().out.split())
    assert "The host has 3 GiB, and this plan may need" in out
    assert "Give your host's memory" not in out  # it was given
    assert "Not included: learning-rate schedulers" in out


# -- the host is judged as the device is ----------------------------------------------------------


def _away(host_gib: float) -> memfit.Prediction:
    """Activations of two sizes, 3 x 2^k and 2^k bytes, offloaded to pinned memory of the host."""
    return memfit.estimate(
        by_hand.job(768, 4, 64),
        plan={"activation-offload": {"to": "host"}},
        machine="H100-SXM",
        host_memory=int(host_gib * GIB),
    )


def test_pinned_blocks_count_as_the_power_of_two_that_torch_allocates() -> None:
    """Counted by hand: of each block of the model, the inputs of both matrices, of the norm and of the GELU,
    with 768 (3 x 2^8) or 3072 (3 x 2^10) floats per token, and rounded up by a third."""
    found = _away(64)
    tensor_bytes = 4 * 64 * by_hand.TOKENS * 768
    # In each block: inputs of the norm and of `up` (768), of the GELU and of `down` (4 x 768); the head's.
    kept_bytes = 4 * (2 * tensor_bytes + 2 * 4 * tensor_bytes) + tensor_bytes
    assert found.host_bytes is not None
    rounded_bytes = found.estimate.host_parts_bytes["offload"]
    assert rounded_bytes == pytest.approx(kept_bytes * 4 / 3, rel=0.01)
    assert found.host_bytes.value - found.host_bytes.low == pytest.approx(
        kept_bytes / 3 + 1.5 * GIB, rel=0.01
    )


def test_a_plan_fits_only_a_host_that_has_the_upper_end_of_its_need() -> None:
    need = _away(64).host_bytes
    assert need is not None
    between = _away((need.value + need.high) / 2 / GIB)
    assert not between.fits
    assert "does not fit the host" in str(between)
    assert f"up to {need.high / GIB:.4g} GiB" in between.host
    assert "expected" in between.host
    assert _away(need.high / GIB + 0.01).fits


def test_the_chance_that_a_plan_does_not_fit_includes_the_host() -> None:
    need = _away(64).host_bytes
    assert need is not None
    chances = [
        _away(size / GIB).estimate.oom_probability
        for size in (need.low / 2, (need.value + need.high) / 2, 2 * need.high)
    ]
    assert chances[0] is not None
    assert chances[0] > 0.99
    assert chances[1] is not None
    assert 0.02 < chances[1] < 0.5
    assert chances[2] == pytest.approx(0.0, abs=1e-6)
    unknown = _away(64)
    machine = dataclasses.replace(unknown.machine, host=None)
    again = memfit.estimate(unknown.job, plan=unknown.plan, machine=machine)
    assert again.estimate.oom_probability is None


def test_extrapolated_traces_round_pinned_blocks_as_whole_ones_do() -> None:
    from memfit.trace.unroll import _blocks_on_a_line

    shallow, deeper = ((1000, 6), (7000, 1)), ((1000, 8), (9000, 1))  # the model's blocks, and a flat buffer
    assert _blocks_on_a_line(shallow, deeper, 4) == ((1000, 14), (15_000, 1))
    assert _blocks_on_a_line(shallow, deeper[:1], 4) == ()


@pytest.mark.parametrize("stage", [2, 3])
def test_blocks_that_an_engine_cuts_itself_count_with_the_largest_rounding(stage: int) -> None:
    """Stage 3 of DeepSpeed pins gradients in sub-groups of its own; optimizer state is not pinned."""
    techniques = {"zero": {"stage": stage, "offload": "optimizer"}}
    found = memfit.estimate(by_hand.job(896, 4, 1), plan=techniques, machine="H100-SXM", host_memory="64GiB")
    assert found.host_bytes is not None
    offload, kept_bytes = found.estimate.host_parts_bytes["offload"], found.host_bytes.low - GIB
    width = found.host_bytes.high - found.host_bytes.value
    if stage == 2:
        assert kept_bytes < offload < 2 * kept_bytes
        assert width == pytest.approx(2.5 * GIB)  # of the process alone
    else:
        assert offload == pytest.approx(kept_bytes)
        assert 0.2 * kept_bytes < width - 2.5 * GIB < 0.8 * kept_bytes
