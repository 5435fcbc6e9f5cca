"""Training steps on an accelerator: everything is there, and takes what was predicted.

The device is the simulated accelerator. It rounds sizes as CUDA's allocator does and computes with the CPU's
kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cuda_jobs
import pytest
from child_ranks import run_script

import simulated_accelerator

_MISSING = simulated_accelerator.missing()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
_SCRIPT, _ON_DEVICE = (Path(__file__).with_name(f"{n}_the_device.py") for n in ("steps_on", "on"))
_LIMIT_S = 300
WORST_RATIO = 0.005

HOST_OFFLOAD = "activation-offload to host"
GROUPS = (
    ("plain", "gradient-accumulation", "bf16-autocast", "fp16-autocast", "activation-offload", HOST_OFFLOAD),
    ("activation-checkpointing", "selective-checkpointing", "optimal-checkpointing", "bf16-parameters"),
    ("adafactor", "sgd", "adamw-fused", "adamw-single", "optimizer", "optimizer-in-backward", "lora"),
    ("chunked-cross-entropy", "chunking", "zero 2 offloaded", "zero 3 offloaded"),
    (*cuda_jobs.RECURRENT, *cuda_jobs.PACKED),  # with the cells that torch has for devices without cuDNN
)
ZERO = GROUPS[3][-2:]  # of one rank; much of their step is on the host
NAMES = [name for group in GROUPS for name in group if name not in ZERO]
# These need kernels of bitsandbytes, which has none for this device.
NOT_RUN = {"adamw-8bit", "qlora"}
_VIEWS = {"aten.view.dtype", "aten.view.default", "aten.detach.default"}  # of what is copied
_COPIES = _VIEWS | {f"aten.{n}" for n in ("_to_copy.default", "copy_.default", "empty_like.default")}
_COPIES |= {"aten.empty.memory_format"}
_LENGTHS = {"aten._pack_padded_sequence.default", "aten.arange.start_step", "aten.empty.memory_format"}
# To host memory or to disk. Lengths of sequences are on the host.
MOVED = {"activation-offload": _COPIES, HOST_OFFLOAD: _COPIES}
MOVED |= {name: {*_LENGTHS, "aten.select.int"} for name in cuda_jobs.PACKED}


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the steps of a technique showed. The techniques of a group run in one process."""
    simulated_accelerator.build()
    results: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in results:
            folder = tmp_path_factory.mktemp("device")
            group = next(g for g in GROUPS if name in g)
            environment = simulated_accelerator.environment(folder)
            child = run_script(
                _ON_DEVICE, _SCRIPT, folder / "seen.json", *group, env=environment, limit_s=_LIMIT_S
            )
            assert child.returncode == 0, child.stderr[-2000:]
            results.update(json.loads((folder / "seen.json").read_text()))
        if "failed" in results[name]:
            pytest.fail(results[name]["failed"], pytrace=False)
        return results[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_the_predicted_peak_is_the_devices(name: str, seen: Any) -> None:
    found = seen(name)
    assert found["predicted"] == pytest.approx(found["measured"], rel=WORST_RATIO)
    for phase in ("forward", "backward", "optimizer"):
        assert found["predicted_phases"][phase] == pytest.approx(
            found["measured_phases"][phase], rel=WORST_RATIO
        ), phase


@pytest.mark.parametrize("name", ZERO)
def test_offloaded_state_takes_what_was_predicted_also_in_set_up(name: str, seen: Any) -> None:
    found = seen(name)
    for phase in ("setup", "forward", "backward", "optimizer"):
        assert found["predicted_phases"][phase] == pytest.approx(
            found["measured_phases"][phase], rel=WORST_RATIO
        ), phase


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_no_tensor_on_the_host_but_what_the_plan_moves_there(name: str, seen: Any) -> None:
    assert set(seen(name)["host_operators"]) <= MOVED.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_of_the_processor(name: str, seen: Any) -> None:
    found = seen(name)
    # Autocast on a device keeps other operators in float32 than on a CPU; dropout draws other numbers.
    differs = "16" in name or name in ("chunking", "lstm")  # the lstm has dropout
    assert found["losses"] == pytest.approx(found["losses_on_the_host"], rel=2e-2 if differs else 1e-5)


def test_every_technique_of_one_device_is_run_here_or_cannot_be() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
    from test_prediction import LOWERS  # type: ignore[import-not-found]

    assert set(LOWERS) <= {*NAMES, *NOT_RUN}
