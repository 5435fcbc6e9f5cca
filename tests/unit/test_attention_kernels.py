"""Traces for CUDA run the kernel of attention that torch chooses by the tensors and the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attention_calls
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from memfit import catalog
from memfit.catalog import machine_file
from memfit.cost.memory import memory_profile
from memfit.cost.workspaces import bound_bytes
from memfit.planner.evaluate import Predictor
from memfit.techniques.base import JobFacts
from memfit.trace import attention_kernels
from memfit.trace.attention_kernels import AttentionCall, choose_kernel
from memfit.trace.device_kernels import use_device_kernels
from memfit.trace.tracer import trace
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.machine import Calibration
from memfit.types.plan import Plan

RECORD: dict[str, Any] = json.loads(attention_calls.RECORD.read_text(encoding="utf-8"))
TARGETS = [key for key in RECORD if key.startswith("sm_")]
BLOCK_BYTES = 512  # traces round sizes up to multiples of this, the record does not
CASES = attention_calls.cases()


@pytest.fixture
def _rules_of_2_15(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_IS_2_15", True)


def call_of(case: dict[str, Any]) -> AttentionCall:
    (query, key, value), options = attention_calls.arguments(case, "meta")
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=options["attn_mask"],
        dropout_p=options["dropout_p"],
        is_causal=options["is_causal"],
        enable_gqa=options["enable_gqa"],
    )
    return call.with_batch() if case.get("dims") == 3 else call


def choice(target: str, call: AttentionCall) -> str:
    try:
        return attention_calls.LETTERS[choose_kernel(device_kind(f"cuda:{target}"), call)]
    except RuntimeError:
        return attention_calls.LETTERS["error"]


@pytest.mark.usefixtures("_rules_of_2_15")
def test_every_kind_of_call_has_the_kernel_that_torch_chooses_on_each_device() -> None:
    calls = [call_of(case) for case in CASES]
    for target in TARGETS:
        chosen = [choice(target, call) for call in calls]
        rows = zip(CASES, chosen, RECORD[target]["choices"], strict=True)
        assert [row for row in rows if row[1] != row[2]] == [], target


@pytest.mark.usefixtures("_rules_of_2_15")
def test_with_cudnn_alone_every_kind_of_call_has_its_kernel_or_none() -> None:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for target in ("sm_75", "sm_80", "sm_89", "sm_120"):  # others take larger heads in some versions
            rows = zip(CASES, RECORD[target]["cudnn"], strict=True)
            assert [(case, true) for case, true in rows if choice(target, call_of(case)) != true] == []


def test_before_torch_2_15_no_fused_kernel_takes_three_dimensions_and_only_flash_grouped_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_kernels, "_IS_2_15", False)
    grouped = {"dtype": "float16", "key_heads": 2, "value_heads": 2, "grouped": True}
    assert choice("sm_80", call_of(grouped)) == "f"
    assert choice("sm_80", call_of(grouped | {"mask": "bool"})) == "m"
    assert choice("sm_80", call_of({"dtype": "float16", "key_heads": 1, "value_heads": 1})) == "m"
    with FakeTensorMode(), use_device_kernels("cuda:sm_80"):
        rows = torch.empty(4, 8, 16, dtype=torch.float16, requires_grad=True)
        name = functional.scaled_dot_product_attention(rows, rows, rows).grad_fn.name()  # type: ignore[union-attr]
    assert "ScaledDotProduct" not in name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", attention_calls.JOBS)
def test_a_training_takes_what_torch_takes_on_the_device(name: str, target: str) -> None:
    """What fused kernels allocate while they run is unknown; it is within the bound of the prediction."""
    if name.startswith(("grouped", "unbatched")) and not attention_kernels._IS_2_15:
        pytest.skip("before torch 2.15, matrix products run")
    traced = trace(attention_calls.job_of(name), Plan(), device=f"cuda:{target}")
    true = RECORD[target]["bytes"][name]
    inside = max(bound_bytes(op.signature, traced.device, 1) for op in traced.ops)
    peak = max(memory_profile(traced, Calibration()).phase_peak_bytes.values())
    assert peak - 32 * BLOCK_BYTES <= true <= peak + inside
    if not any("scaled_dot_product" in op.op for op in traced.ops):
        assert peak == pytest.approx(true, rel=0.001)


# -- the device of a trace ---------------------------------------------------------------------------------


def assumptions_on(device: str, name: str = "causal, bfloat16, 64") -> tuple[str, ...]:
    return trace(attention_calls.job_of(name), Plan(), device=device).assumptions


def test_the_answer_says_where_the_choice_of_the_kernel_is_not_known() -> None:
    assert assumptions_on("cuda:sm_80") == ()
    assert assumptions_on("cuda:gfx942") == (attention_kernels.UNTESTED_ON_ROCM,)
    assert assumptions_on("cuda") == (attention_kernels.UNKNOWN_CAPABILITY,)
    assert assumptions_on("cuda", "transposed, bfloat16, 64") == ()  # the same kernel on all devices


def test_the_answer_says_that_cudnn_may_take_less_than_matrix_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_kernels, "_IS_2_15", False)
    assert assumptions_on("cuda:sm_90", "grouped, bfloat16, 64") == (attention_kernels.MATH_FOR_CUDNN,)
    assert assumptions_on("cuda:sm_89", "grouped, bfloat16, 64") == ()
    assert assumptions_on("cuda:sm_90", "transposed, bfloat16, 64") == ()  # cuDNN takes none of these


def test_a_call_that_no_enabled_kernel_takes_fails_as_in_torch() -> None:
    call = call_of({"dtype": "float32"})
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        choose_kernel(device_kind("cuda:sm_80"), call)


def test_every_device_of_the_catalog_has_the_target_of_its_kernels() -> None:
    targets = {name: catalog.device(name).gpu_target for name in catalog.device_names()}
    assert [name for name, target in targets.items() if not target] == []
    expected = {"T4": "sm_75", "A100-80GB-SXM": "sm_80", "A10G": "sm_86", "H20": "sm_90", "B300": "sm_103"}
    assert {name: targets[name] for name in expected} == expected
    assert targets["MI300X"] == "gfx942"


def test_a_device_of_a_machine_file_has_the_target_of_its_architecture_or_its_own(tmp_path: Path) -> None:
    text = """
        name = "test"
        [device]
        name = "Card"
        kind = "cuda"
        memory_bytes = {value = 8e9, source = "test", date = "2026-11-30"}
    """
    file = tmp_path / "machine.toml"
    targets = {}
    for line in ("", 'architecture = "Turing"', 'architecture = "turing"\ngpu_target = "sm_61"'):
        file.write_text(text + line, encoding="utf-8")
        targets[line] = machine_file.from_toml(file).device.trace_kind
    assert list(targets.values()) == ["cuda", "cuda:sm_75", "cuda:sm_61"]
    file.write_text(text + 'gpu_target = "7.5"', encoding="utf-8")
    with pytest.raises(UserError, match=r"device\.gpu_target: '7.5', but sm_ with the compute capability"):
        machine_file.from_toml(file)


def test_a_stored_trace_of_one_architecture_is_not_used_for_another() -> None:
    facts = JobFacts(batch_size=2, block_count=0, vocabulary=0, device_kind="cuda")
    job = attention_calls.job_of("causal, bfloat16, 64")
    predictors = {
        name: Predictor(job=job, machine=catalog.machine(name), job_facts=facts)
        for name in ("T4", "V100-32GB-SXM2", "A100-80GB-SXM", "A100-40GB-SXM")
    }
    keys = {name: predictor._facts(Plan(), 0) for name, predictor in predictors.items()}
    assert keys["T4"] != keys["A100-80GB-SXM"] == keys["A100-40GB-SXM"]
    peaks = {name: predictor.whole(Plan()).allocated_bytes.value for name, predictor in predictors.items()}
    assert peaks["T4"] > 2 * peaks["A100-80GB-SXM"]
