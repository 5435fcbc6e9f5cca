"""The simulated accelerator behaves as an accelerator does and computes as the CPU does.

A backend of PyTorch changes its whole process, so every scenario runs in a child process
(simulated_accelerator_scenarios.py), several in one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from child_ranks import run_children

import simulated_accelerator

_SCENARIOS = Path(__file__).with_name("simulated_accelerator_scenarios.py")
_MISSING = simulated_accelerator.missing()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))


def run(folder: Path, *names: str, ranks: int = 1) -> list[dict[str, Any]]:
    simulated_accelerator.build()
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    run_children(_SCENARIOS, [[file, *names] for file in files], limit_s=120)
    return [json.loads(file.read_text()) for file in files]


class Results:
    """What the scenarios of one child process returned."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results

    def __getitem__(self, name: str) -> Any:
        result = self._results[name]
        if isinstance(result, dict) and "failed" in result:
            pytest.fail(result["failed"], pytrace=False)
        return result


@pytest.fixture(scope="module")
def computing(tmp_path_factory: pytest.TempPathFactory) -> Results:
    names = (
        "training",
        "convolutions",
        "operators",
        "autocast",
        "composite_kernels",
        "host_tensors_in_a_step",
        "fake_tensors",
        "peak",
    )
    return Results(run(tmp_path_factory.mktemp("computing"), *names)[0])


@pytest.fixture(scope="module")
def behaving(tmp_path_factory: pytest.TempPathFactory) -> Results:
    names = (
        "sizes",
        "out_of_memory",
        "offload",
        "streams_and_events",
        "pinned",
        "random_numbers",
        "save_and_load",
    )
    more = ("module_on_the_device", "two_devices")
    return Results(run(tmp_path_factory.mktemp("behaving"), *names, *more)[0])


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return [Results(r)["ranks"] for r in run(tmp_path_factory.mktemp("ranks"), "ranks", ranks=2)]


# -- computing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["foreach", "single tensors", "fused"])
def test_a_transformer_has_the_losses_of_the_cpu_with_each_kind_of_adamw(
    computing: Results, variant: str
) -> None:
    on_cpu, on_device = computing["training"][variant]
    assert on_device == on_cpu
    assert len(set(on_cpu)) == 3


@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        "dropout",
        "checkpointing",
        "reentrant checkpointing",
        "dropout and checkpointing",
        "dropout and reentrant checkpointing",
    ],
)
def test_dropout_and_checkpointing_keep_the_losses_of_the_cpu(computing: Results, variant: str) -> None:
    on_cpu, on_device = computing["training"][variant]
    assert on_device == on_cpu


def test_checkpointing_restores_the_random_state_of_the_device(computing: Results) -> None:
    training = computing["training"]
    for variant in ("dropout and checkpointing", "dropout and reentrant checkpointing"):
        assert training[variant][1] == training["dropout"][1] != training["plain"][1]


def test_convolutions_and_norms_have_the_losses_of_the_cpu(computing: Results) -> None:
    on_cpu, on_device = computing["convolutions"]
    assert on_device == on_cpu


def test_operators_on_views_storages_and_lists_agree_with_the_cpu(computing: Results) -> None:
    assert [name for name, agrees in computing["operators"].items() if not agrees] == []


def test_fused_kernels_of_the_cpu_stay_fused_on_the_device(computing: Results) -> None:
    """A composite kernel in their place would need more memory."""
    assert [name for name, same in computing["composite_kernels"].items() if not same] == []


def test_a_training_step_has_no_tensor_on_the_host(computing: Results) -> None:
    assert computing["host_tensors_in_a_step"] == []


def test_fake_tensors_of_the_device_train_without_its_memory(computing: Results) -> None:
    result = computing["fake_tensors"]
    assert result["device"] == "sim:0"
    assert result["memory"] == 0
    assert len(result["fused attention"]) == 2  # forward and backward


def test_autocast_casts_as_on_cuda(computing: Results) -> None:
    result = computing["autocast"]
    assert result["dtypes"] == {
        "linear": "torch.float16",  # of the last pass
        "norm": "torch.float32",
        "softmax": "torch.float32",
        "promoted": "torch.float32",
    }
    assert result["bf16"] != result["fp32"]
    assert result["bf16"] == pytest.approx(result["fp32"], rel=0.01)


def test_a_gradient_scaler_trains_in_fp16_and_skips_infinite_gradients(computing: Results) -> None:
    result = computing["autocast"]
    assert result["fp16"][-1] < result["fp16"][0]
    assert result["skipped"]
    assert result["scale"] == 2.0**7  # halved once


@pytest.mark.parametrize("model", ["plain", "checkpointing"])
def test_the_devices_peak_is_the_counted_one_of_the_cpu_within_rounding(
    computing: Results, model: str
) -> None:
    """The CPU's blocks are multiples of 64 bytes, the device's of 512."""
    peak = computing["peak"][model]
    assert abs(peak["requested"] - peak["cpu"]) <= 64 * peak["blocks"]
    assert 0 <= peak["allocated"] - peak["requested"] <= 512 * peak["blocks"]


# -- memory ------------------------------------------------------------------------------------------


def test_sizes_are_rounded_to_512_bytes(behaving: Results) -> None:
    result = behaving["sizes"]
    assert result["allocated"] == 512 + 512 + 1024 + 2**20 + 512
    assert result["freed"] == 0
    assert result["peak"] >= result["allocated"]
    assert result["reset"] == 0


def test_freed_memory_stays_reserved_until_the_cache_is_emptied(behaving: Results) -> None:
    result = behaving["sizes"]
    assert result["reserved"] == result["allocated"]
    assert result["reserved when emptied"] == 0


def test_the_capacity_is_the_devices_total_memory(behaving: Results) -> None:
    result = behaving["sizes"]
    assert result["total"] == result["capacity"] == 2**28
    assert 0 < result["free"] <= result["total"] - result["reserved"]
    assert result["name"] == "Simulated accelerator"


@pytest.mark.parametrize("phase", ["forward", "backward", "limited"])
def test_too_little_memory_raises_torchs_error_in_each_phase(behaving: Results, phase: str) -> None:
    message = behaving["out_of_memory"][phase]
    assert message.startswith("torch.OutOfMemoryError: sim out of memory. Tried to allocate ")


def test_a_backward_pass_can_need_more_than_the_forward_pass_that_fitted(behaving: Results) -> None:
    assert behaving["out_of_memory"]["forward fits"] == ""


def test_training_recovers_after_it_ran_out_of_memory(behaving: Results) -> None:
    result = behaving["out_of_memory"]
    assert result["left"] == 0
    assert result["ooms"] == 2
    assert result["released"] == ""  # the limit is lifted
    assert result["fraction"] == pytest.approx(0, abs=1)
    on_cpu, on_device = result["recovered"]
    assert on_device == on_cpu


def test_a_size_beyond_any_memory_is_out_of_memory_too(behaving: Results) -> None:
    assert behaving["out_of_memory"]["huge"].startswith("torch.OutOfMemoryError: ")


# -- host memory, streams and events -------------------------------------------------------------------


def test_offloaded_tensors_return_unchanged_where_the_program_synchronizes(behaving: Results) -> None:
    result = behaving["offload"]
    assert result["at once"] == result["waits"] == result["save_on_cpu"] == result["plain"]


def test_tensors_offloaded_to_disk_return_to_the_device(behaving: Results) -> None:
    result = behaving["offload"]
    assert result["bytes on disk"] > 0
    assert result["disk"] == result["plain"]


def test_late_copies_show_a_reload_on_a_stream_that_did_not_wait(behaving: Results) -> None:
    assert behaving["offload"]["does not wait"] != behaving["offload"]["does not wait"]  # NaN


def test_late_copies_arrive_where_the_host_synchronizes(behaving: Results) -> None:
    reads = behaving["offload"]["reads"]
    arrived = {how: value == 300 for how, value in reads.items()}
    assert arrived == {
        "at once": False,
        "too early": False,
        "event": True,
        "stream": True,
        "device": True,
        "other stream": False,
        "item": True,
    }
    assert behaving["offload"]["blocking"] == behaving["offload"]["late no more"] == 300


def test_pinned_memory_is_counted_and_freed(behaving: Results) -> None:
    result = behaving["offload"]
    assert result["pinned"] > 0
    assert result["pinned after"] == 0


def test_only_pinned_memory_says_that_it_is(behaving: Results) -> None:
    assert behaving["pinned"] == {"pageable": False, "pinned": True, "slice": True, "loader": [True, True]}


def test_streams_nest_and_events_measure_time(behaving: Results) -> None:
    result = behaving["streams_and_events"]
    assert result.pop("milliseconds") > 0
    assert result.pop("done") == [True, True, True]
    assert all(result.values()), result


# -- the rest of a device --------------------------------------------------------------------------------


def test_the_devices_random_numbers_have_a_state_of_their_own(behaving: Results) -> None:
    assert [name for name, holds in behaving["random_numbers"].items() if not holds] == []


def test_saved_tensors_load_on_each_location(behaving: Results) -> None:
    result = behaving["save_and_load"]
    assert result == {
        "default": {"devices": ["sim:0"], "equal": True},
        "cpu": {"devices": ["cpu"], "equal": True},
        "sim": {"devices": ["sim:0"], "equal": True},
        "copy": True,
    }


def test_programs_find_the_device_as_they_find_others(behaving: Results) -> None:
    assert [name for name, holds in behaving["module_on_the_device"].items() if not holds] == []


def test_devices_have_their_own_memory_and_do_not_mix(behaving: Results) -> None:
    result = behaving["two_devices"]
    assert result["count"] == 2
    assert result["allocated"] == [0, 4096]
    assert result["inside"] == [1, 1]
    assert result["after"] == 0
    assert result["moved"]
    assert "same device" in result["mixed"]
    assert "sim:2" in result["missing"]


# -- two ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "ddp, views", "fsdp2", "offloaded"])
def test_two_ranks_train_as_one_process(by_ranks: list[Any], way: str) -> None:
    for rank in by_ranks:
        assert rank[way] == pytest.approx(rank["alone"], rel=1e-6)


def test_fsdp2_trains_in_bf16(by_ranks: list[Any]) -> None:
    for rank in by_ranks:
        assert rank["bf16"] != rank["fsdp2"]
        assert rank["bf16"] == pytest.approx(rank["alone"], rel=0.02)


def test_fsdp2_keeps_shards_on_the_device_or_on_the_host(by_ranks: list[Any]) -> None:
    for rank in by_ranks:
        assert rank["local devices"] == ["sim"]
        assert rank["offloaded devices"] == ["cpu"]


def test_the_full_state_is_gathered_on_the_host_of_the_first_rank(by_ranks: list[Any]) -> None:
    first, second = by_ranks
    assert first["full state"] == ["cpu"]
    assert first["full sizes"] > 0
    assert second["full sizes"] == 0


def test_tensor_parallel_layers_compute_what_whole_ones_do(by_ranks: list[Any]) -> None:
    for rank in by_ranks:
        whole, split = rank["tensor parallel"]
        assert split == pytest.approx(whole, rel=1e-6)


def test_pipeline_stages_have_the_gradients_of_one_process(by_ranks: list[Any]) -> None:
    for rank in by_ranks:
        by_stages, alone = rank["pipeline"]
        assert by_stages == pytest.approx(alone, rel=1e-6)


def test_collectives_reach_the_other_rank(by_ranks: list[Any]) -> None:
    for index, rank in enumerate(by_ranks):
        assert rank["gathered"] == [[0, 1], [0, 1]]
        assert rank["sent"] == [10, [index, index + 2], [{"rank": 0}, {"rank": 1}]]


def test_tensors_of_the_host_have_no_backend_beside_the_devices(by_ranks: list[Any]) -> None:
    for rank in by_ranks:
        assert "No backend type associated with device type cpu" in rank["host"]


# -- the process that activates nothing ------------------------------------------------------------------


def test_importing_the_package_changes_nothing() -> None:
    import torch

    assert not hasattr(torch, "sim")
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
