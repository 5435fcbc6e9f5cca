"""An autopsy names the cause of a death with its evidence, is never confidently wrong, and runs no code of
the files that it reads."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from allocator_snapshot import SnapshotWriter, train

from memfit.monitoring import plain_pickle
from memfit.monitoring.autopsy import combine, diagnose_log, diagnose_record, diagnose_snapshot
from memfit.monitoring.diagnosis import Certainty, DeathCause, Diagnosis
from memfit.monitoring.memory_snapshot import is_snapshot, parse_snapshot, read_snapshot
from memfit.monitoring.oom_text import AllocationFailure, allocation_failures
from memfit.monitoring.record import read_records
from memfit.monitoring.traceback_text import innermost_user_frame, read_tracebacks
from memfit.monitoring.training_log import NumberSeries, outlier_factor
from memfit.types.errors import UserError
from memfit.types.units import GIB

_DEATHS = Path(__file__).parents[1] / "data/deaths"
_LABELS: dict[str, dict[str, str]] = json.loads((_DEATHS / "labels.json").read_text())


def diagnosis_of(name: str) -> Diagnosis:
    return diagnose_log((_DEATHS / f"{name}.txt").read_text(encoding="utf-8"))


# -- prepared deaths --------------------------------------------------------------------------------------


def test_the_prepared_deaths_are_at_least_thirty_of_ten_kinds() -> None:
    causes = [label["cause"] for label in _LABELS.values()]
    assert len(causes) >= 30
    assert sum(causes.count(c) >= 3 for c in set(causes)) == 10
    assert {p.stem for p in _DEATHS.glob("*.txt")} == set(_LABELS)


@pytest.mark.parametrize("name", _LABELS)
def test_a_prepared_death_is_named_with_its_evidence(name: str) -> None:
    diagnosis, label = diagnosis_of(name), _LABELS[name]
    assert diagnosis.cause == label["cause"]
    assert diagnosis.evidence
    if "line" in label:
        assert diagnosis.line == label["line"]


@pytest.mark.parametrize("name", _LABELS)
def test_an_answer_that_is_not_certain_says_what_else_is_possible_or_what_to_record(name: str) -> None:
    diagnosis = diagnosis_of(name)
    if diagnosis.certainty is not Certainty.CERTAIN and diagnosis.is_out_of_memory:
        assert diagnosis.alternatives
        assert diagnosis.capture


@pytest.mark.parametrize("name", _LABELS)
def test_the_error_alone_without_its_log_is_not_wrong_with_certainty(name: str) -> None:
    """The last lines only: less evidence must not make another cause certain."""
    lines = (_DEATHS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    diagnosis = diagnose_log("\n".join(lines[-2:]))
    assert diagnosis.cause == _LABELS[name]["cause"] or diagnosis.certainty is not Certainty.CERTAIN


def test_the_module_is_read_from_the_calls_of_forward() -> None:
    assert diagnosis_of("too_large_unet_1").module == "up3"


# -- figures in messages ----------------------------------------------------------------------------------


def failure_of(text: str) -> AllocationFailure:
    (failure,) = allocation_failures(text.splitlines())
    return failure


_MESSAGES: list[dict[str, Any]] = json.loads((_DEATHS / "messages.json").read_text())


@pytest.mark.parametrize("message", _MESSAGES, ids=lambda m: m["of"])
def test_the_figures_of_a_message_are_read(message: dict[str, Any]) -> None:
    failure, fields = failure_of(message["text"]), message["fields"]
    assert failure.device == message["device"]
    assert {name: getattr(failure, name) for name in fields} == fields


def test_a_message_over_several_lines_is_read_whole() -> None:
    text = (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 88.00 MiB (GPU 0; 24.00 GiB total\n"
        "capacity; 22.00 GiB already allocated; 20.81 MiB free; 22.50 GiB reserved in total by PyTorch) If"
    )
    assert failure_of(text).unallocated_bytes == GIB // 2


# -- rules ------------------------------------------------------------------------------------------------

_FULL = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {request}. GPU 0 has a total capacity of "
    "80.00 GiB of which {free} is free. Including non-PyTorch memory, this process has {process} memory in "
    "use. Of the allocated memory {allocated} is allocated by PyTorch, and {unallocated} is reserved by "
    "PyTorch but unallocated."
)


def full(
    request: str = "1.00 GiB",
    free: str = "0.50 GiB",
    process: str = "79.50 GiB",
    allocated: str = "78.00 GiB",
    unallocated: str = "0.50 GiB",
) -> str:
    return _FULL.format(
        request=request, free=free, process=process, allocated=allocated, unallocated=unallocated
    )


def test_free_memory_above_the_request_is_not_called_a_lack_of_memory() -> None:
    text = full(request="2.00 MiB", free="60.00 GiB", process="20.00 GiB", allocated="19.00 GiB")
    diagnosis = diagnose_log(text)
    assert diagnosis.cause is DeathCause.UNKNOWN
    assert DeathCause.OUTSIDE_TORCH in diagnosis.alternatives


def test_libraries_of_this_process_are_told_from_other_processes() -> None:
    own = diagnose_log(full(free="0.10 GiB", process="79.90 GiB", allocated="40.00 GiB"))
    assert own.cause is DeathCause.OUTSIDE_TORCH
    assert any("libraries in this process" in e for e in own.evidence)
    other = diagnose_log(full(free="0.10 GiB", process="40.00 GiB", allocated="39.00 GiB"))
    assert other.cause is DeathCause.OUTSIDE_TORCH
    assert any("other processes" in e for e in other.evidence)


def test_a_limit_of_the_process_counts_as_its_memory() -> None:
    text = next(m["text"] for m in _MESSAGES if m["of"] == "XPU, a limit").replace("8.00 GiB", "8.30 GiB")
    diagnosis = diagnose_log(text)
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.TENSORS_TOO_LARGE, Certainty.CERTAIN)


def traceback(code: str, *, function: str = "train", error: str = "") -> str:
    return (
        "Traceback (most recent call last):\n"
        f'  File "/me/train.py", line 7, in {function}\n    {code}\n' + (error or full()) + "\n"
    )


def test_steps_that_fitted_before_make_the_growth_late_and_leave_its_reason_open() -> None:
    diagnosis = diagnose_log("step 1200 loss 2.1\nstep 1201 loss 2.0\n" + traceback("loss = model(x)"))
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.LATE_GROWTH, Certainty.LIKELY)
    assert {DeathCause.LEAK, DeathCause.LONGER_SAMPLE, DeathCause.FRAGMENTATION} <= {*diagnosis.alternatives}


def test_the_second_step_may_die_of_the_state_that_the_first_has_added() -> None:
    diagnosis = diagnose_log(" 10%|# | 1/10 [00:01<00:09]\n" + traceback("loss = model(x)"))
    assert diagnosis.cause is DeathCause.TENSORS_TOO_LARGE
    assert DeathCause.OPTIMIZER_STEP in diagnosis.alternatives


def test_a_forward_pass_in_the_closure_of_an_optimizer_is_no_optimizer_step() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "/me/fit.py", line 3, in fit\n    optimizer.step(closure)\n'
        '  File "/x/site-packages/torch/optim/adamw.py", line 197, in step\n    loss = closure()\n'
        '  File "/me/fit.py", line 9, in closure\n    return model(x)\n'
        '  File "/x/site-packages/torch/nn/modules/x.py", line 1, in _call_impl\n    f(x)\n'
        '  File "/me/net.py", line 5, in forward\n    return self.head(x)\n' + full()
    )
    diagnosis = diagnose_log(text)
    assert diagnosis.phase == "forward"
    assert diagnosis.cause is DeathCause.TENSORS_TOO_LARGE


def test_a_later_optimizer_step_is_not_called_the_first() -> None:
    text = "".join(f"step {n} loss 1\n" for n in range(50)) + traceback("optimizer.step()")
    assert diagnose_log(text).cause is DeathCause.LATE_GROWTH


def test_bars_of_downloads_and_loading_are_no_training_steps() -> None:
    log = "Loading checkpoint shards: 100%|##| 4/4 [00:02<00:00]\nMap: 100%|##| 900/900 [00:01<00:00]\n"
    assert diagnose_log(log + traceback("loss = model(x)")).cause is DeathCause.TENSORS_TOO_LARGE


@pytest.mark.parametrize(
    "line",
    [
        "  Total optimization steps = 375\n  0%|          | 0/375 [00:00<?, ?it/s]",
        "engine/trainer: task=detect, epochs=100, batch=16, imgsz=640",
        "Resuming from the checkpoint of step 5000",
    ],
)
def test_numbers_of_steps_in_settings_are_no_finished_steps(line: str) -> None:
    diagnosis = diagnose_log(f"{line}\n{traceback('loss = model(batch)')}")
    assert diagnosis.cause is DeathCause.TENSORS_TOO_LARGE


def test_steps_without_a_loss_count_if_their_numbers_differ() -> None:
    diagnosis = diagnose_log(f"step 1\nstep 2\n{traceback('loss = model(batch)')}")
    assert diagnosis.cause is DeathCause.LATE_GROWTH


def test_ranks_that_wait_in_vain_do_not_hide_the_cause() -> None:
    others = traceback("dist.barrier()", error="DistStoreError: Timed out after 1801 seconds")
    diagnosis = diagnose_log(f"{traceback('loss = model(batch)')}\n{others}")
    assert diagnosis.is_out_of_memory


def test_an_error_of_another_rank_that_follows_does_not_hide_the_cause() -> None:
    text = (
        "[rank1]: Traceback (most recent call last):\n"
        '[rank1]:   File "/me/train.py", line 7, in train\n[rank1]:     optimizer.step()\n'
        f"[rank1]: {full()}\n"
        "[rank0]: Traceback (most recent call last):\n"
        '[rank0]:   File "/me/train.py", line 6, in train\n[rank0]:     loss.backward()\n'
        "[rank0]: RuntimeError: [../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1\n"
        "Traceback (most recent call last):\n"
        '  File "/x/site-packages/torch/distributed/run.py", line 9, in run\n    elastic_launch(\n'
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )
    assert diagnose_log(text).cause is DeathCause.OPTIMIZER_STEP


def test_a_survived_error_does_not_explain_a_later_death() -> None:
    text = (
        full()
        + "\nskipping batch\nstep 7 loss 1\nstep 8 loss 1\nstep 9 loss 1\n"
        + traceback("x", error="ValueError: no")
    )
    assert diagnose_log(text).cause is DeathCause.NOT_MEMORY


_BUS_ERROR = (
    "RuntimeError: DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that "
    "dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
)


@pytest.mark.parametrize(
    ("text", "cause", "certainty"),
    [
        ("slurm_script: line 28:  8156 Killed                  python3 main.py", "host-killed", "likely"),
        ("Killed", "host-killed", "likely"),
        ("failed (exitcode: -9) local_rank: 0 (pid: 1322) of binary: /bin/python", "host-killed", "likely"),
        ("RuntimeError: DataLoader worker (pid 9) is killed by signal: Killed.", "host-killed", "likely"),
        ("  Last State:  Terminated\n    Reason:  OOMKilled\n    Exit Code: 137", "host-killed", "certain"),
        ("slurmstepd: error: Exceeded job memory limit at some point.", "host-killed", "certain"),
        ("Out of memory: Killed process 9 (mysqld) total-vm:9kB, anon-rss:9kB", "host-killed", "likely"),
        (_BUS_ERROR, "shared-memory", "certain"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "outside-torch", "likely"),
        ("slurmstepd: error: *** JOB 9 CANCELLED AT 2024 DUE TO TIME LIMIT ***", "not-memory", "likely"),
        ("Received signal 15: SIGTERM, shutting down", "not-memory", "likely"),
        ('"OOMKilled": false,\n"ExitCode": 1', "unknown", "unknown"),
        ("slurmstepd: error: *** STEP 9.0 ON gpu012 CANCELLED AT 2026 ***", "not-memory", "likely"),
        ("SignalException: Process 12 got signal: 15", "not-memory", "likely"),
        ("Your session crashed after using all available RAM.", "host-killed", "certain"),
        ("エポック 1 損失 0.5\n強制終了", "host-killed", "likely"),
        (
            "step 200 loss 2.0\ntorch.OutOfMemoryError: CUDA out of memory. Tried to al",
            "late-growth",
            "likely",
        ),
        ("RuntimeError: CUDA out of memory.", "tensors-too-large", "likely"),
        ("jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: 9.50G", "unknown", "unknown"),
        ("epoch 1 loss 0.3\nepoch 2 loss 0.2\ndone", "unknown", "unknown"),
        ("", "unknown", "unknown"),
    ],
)
def test_a_death_without_a_traceback_is_named_as_surely_as_the_text_allows(
    text: str, cause: str, certainty: str
) -> None:
    diagnosis = diagnose_log(text)
    assert (diagnosis.cause, diagnosis.certainty) == (cause, certainty)


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: Bad StatusOr access: RESOURCE_EXHAUSTED: Attempting to reserve 12.12G at the bottom",
        "tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when allocating tensor",
        "RuntimeError: level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "RuntimeError: Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 163840",
    ],
)
def test_an_error_that_speaks_of_full_memory_is_not_surely_another_one(error: str) -> None:
    diagnosis = diagnose_log(traceback("y = model(x)", error=error))
    assert diagnosis.cause is DeathCause.UNKNOWN
    assert DeathCause.TENSORS_TOO_LARGE in diagnosis.alternatives
    assert diagnosis.line == "/me/train.py:7"


def test_a_buffer_that_metal_refuses_is_a_lack_of_memory() -> None:
    diagnosis = diagnose_log(traceback("y = model(x)", error="RuntimeError: Invalid buffer size: 20.25 GB"))
    assert (diagnosis.cause, diagnosis.memory) == (DeathCause.TENSORS_TOO_LARGE, "device")
    assert diagnosis.figures["request_bytes"] == 20.25 * GIB


@pytest.mark.parametrize(
    ("progress", "cause"),
    [
        ("Epoch 5:   0%|          | 0/500 [00:00<?, ?it/s]", DeathCause.LATE_GROWTH),
        ("Epoch [3/10], Step [1/600], Loss: 0.1", DeathCause.LATE_GROWTH),
        ("Train Epoch: 1 [25600/60000 (43%)]\tLoss: 0.241", DeathCause.LATE_GROWTH),
        ("Epoch 4/9  ━━━━╸━━━━ 210/512 0:01:11 • 0:01:50 2.76it/s train_loss: 0.112", DeathCause.LATE_GROWTH),
        ("[7/100] train loss 1.2 val loss 1.3", DeathCause.LATE_GROWTH),
        ("iter 0: loss 10.9, time 20000ms", DeathCause.TENSORS_TOO_LARGE),  # of ten iterations, one is logged
        ("Continuing training from global step 4500\n  0%| | 0/9000 [00:00<?]", DeathCause.TENSORS_TOO_LARGE),
    ],
)
def test_what_a_log_leaves_out_makes_its_first_step_only_likely(progress: str, cause: DeathCause) -> None:
    diagnosis = diagnose_log(f"{progress}\n{traceback('y = model(x)', error=_CUDA)}")
    assert (diagnosis.cause, diagnosis.certainty) == (cause, Certainty.LIKELY)
    assert "the log shows no finished step" not in diagnosis.evidence


def test_a_function_that_evaluates_anything_else_is_not_surely_an_evaluation() -> None:
    log = "step 100 loss 2.0\nstep 200 loss 1.9\n"
    diagnosis = diagnose_log(log + _calls("train", "evaluate_energy", "forward"))
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.EVALUATION, Certainty.LIKELY)
    assert diagnosis.alternatives == (DeathCause.LATE_GROWTH,)


def test_a_training_that_a_search_evaluates_is_no_evaluation() -> None:
    log = "step 100 loss 2.0\nstep 200 loss 1.9\n"
    assert diagnose_log(log + _calls("search", "evaluate", "fit", "forward")).cause is DeathCause.LATE_GROWTH
    assert diagnose_log(log + _calls("fit", "evaluate", "forward")).cause is DeathCause.EVALUATION


def _calls(*functions: str) -> str:
    frames = "".join(f'  File "/w/train.py", line 10, in {f}\n    y = call(x)\n' for f in functions)
    return f"Traceback (most recent call last):\n{frames}{_CUDA}"


_CUDA = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "23.65 GiB of which 1.11 GiB is free. Of the allocated memory 21.64 GiB is allocated by PyTorch, and "
    "439.94 MiB is reserved by PyTorch but unallocated."
)


def test_a_code_that_many_faults_share_stays_unknown() -> None:
    error = "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"
    diagnosis = diagnose_log(traceback("y = conv(x)", error=error))
    assert diagnosis.cause is DeathCause.UNKNOWN
    assert DeathCause.OUTSIDE_TORCH in diagnosis.alternatives


def test_tracebacks_of_loggers_and_notebooks_are_read() -> None:
    logged = (
        "2023-09-14 21:27:58.000 [INFO] [Driver] Traceback (most recent call last):\n"
        '2023-09-14 21:27:58.000 [INFO] [Driver] File "/me/a.py", line 3, in main\n'
        "2023-09-14 21:27:58.000 [INFO] [Driver] ValueError: no\n"
    )
    notebook = (
        "ValueError      Traceback (most recent call last)\nCell In[3], line 2\n      1 x\n----> 2 fit(x)\n\n"
        "File /me/a.py:14, in Net.forward(self, x)\n     13 a\n---> 14 return self.up(x)\n\nValueError: no\n"
    )
    for text, place in ((logged, "/me/a.py:3"), (notebook, "/me/a.py:14")):
        (read,) = read_tracebacks(text.splitlines())
        assert read.error == "ValueError"
        frame = innermost_user_frame(read.frames)
        assert frame is not None
        assert frame.place == place


@pytest.mark.parametrize("part", ["a", "1", "a:", "1 ", "_1 ", "[a] ", "2024", " ", "/a", "GPU 0; "])
def test_long_lines_are_read_in_time(part: str) -> None:
    text = f"{part * 100_000}\n" * 20 + (_DEATHS / "leak_running_loss_1.txt").read_text()
    started = time.monotonic()
    assert diagnose_log(text).cause is DeathCause.LEAK
    assert time.monotonic() - started < 20


def test_broken_logs_get_an_answer_too() -> None:
    numbers = random.Random(1)
    logs = [p.read_text(encoding="utf-8") for p in sorted(_DEATHS.glob("*.txt"))]
    for _ in range(100):
        first, last = numbers.choices(logs, k=2)
        text = first[numbers.randrange(len(first)) :] + last[: numbers.randrange(len(last))]
        diagnosis = diagnose_log("".join(c for c in text if numbers.random() > 0.01))
        assert diagnosis.evidence


# -- snapshots --------------------------------------------------------------------------------------------


def diagnosis_of_snapshot(writer: SnapshotWriter) -> Diagnosis:
    return diagnose_snapshot(parse_snapshot(pickle.dumps(writer.snapshot()), what="it"))


def test_a_snapshot_shows_fragmentation() -> None:
    writer = SnapshotWriter(10_000)
    writer.free(writer.allocate(10_000))  # one segment, which the following blocks share
    blocks = [writer.allocate(500) for _ in range(20)]
    for block in blocks[::2]:
        writer.free(block)
    assert writer.allocate(800, line=77) is None
    diagnosis = diagnosis_of_snapshot(writer)
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.FRAGMENTATION, Certainty.CERTAIN)
    assert diagnosis.line == "/me/train.py:77"
    assert diagnosis.figures["largest_free_bytes"] == 500


def test_a_snapshot_shows_a_leak_and_its_line() -> None:
    writer = SnapshotWriter(4000)
    assert not train(writer, 40, leak=100)
    diagnosis = diagnosis_of_snapshot(writer)
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.LEAK, Certainty.CERTAIN)
    assert any("/me/train.py:31" in e and "between the steps" in e for e in diagnosis.evidence)


def test_a_snapshot_shows_a_longer_sample() -> None:
    writer = SnapshotWriter(2500)
    assert not train(writer, 8, sizes=[100, 90, 100, 95, 100, 90, 100, 400])
    diagnosis = diagnosis_of_snapshot(writer)
    assert diagnosis.cause is DeathCause.LONGER_SAMPLE


def test_a_snapshot_shows_the_first_step_of_the_optimizer() -> None:
    writer = SnapshotWriter(1100)
    assert not train(writer, 3, state=4000)
    assert diagnosis_of_snapshot(writer).cause is DeathCause.OPTIMIZER_STEP


def test_a_snapshot_of_a_first_step_shows_tensors_that_are_too_large() -> None:
    writer = SnapshotWriter(700)
    assert not train(writer, 3)
    diagnosis = diagnosis_of_snapshot(writer)
    assert diagnosis.cause is DeathCause.TENSORS_TOO_LARGE
    assert "/me/train.py:5 (400 B in 4 blocks)" in diagnosis.evidence[-1]


def test_steady_steps_are_no_leak() -> None:
    writer = SnapshotWriter(4000)
    assert train(writer, 30)
    assert diagnosis_of_snapshot(writer).cause is DeathCause.UNKNOWN


def test_a_trace_that_begins_in_the_middle_of_the_training_is_read() -> None:
    writer = SnapshotWriter(4000)
    assert not train(writer, 40, leak=100)
    value = writer.snapshot()
    value["device_traces"][0] = value["device_traces"][0][150:]
    assert diagnose_snapshot(parse_snapshot(pickle.dumps(value), what="it")).cause is DeathCause.LEAK


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_snapshots_of_all_protocols_and_as_json_are_equal(protocol: int) -> None:
    writer = SnapshotWriter(4000)
    train(writer, 9, leak=50)
    value = writer.snapshot()
    as_json = parse_snapshot(json.dumps(value).encode(), what="it")
    assert parse_snapshot(pickle.dumps(value, protocol=protocol), what="it") == as_json
    assert is_snapshot(pickle.dumps(value, protocol=protocol))
    assert is_snapshot(json.dumps(value).encode())


def test_a_list_of_segments_alone_is_a_snapshot() -> None:
    writer = SnapshotWriter(4000)
    train(writer, 2)
    (snapshot,) = parse_snapshot(json.dumps(writer.snapshot()["segments"]).encode(), what="it")
    assert snapshot.allocated_bytes == 800
    assert diagnose_snapshot([snapshot]).certainty is Certainty.UNKNOWN


def test_a_snapshot_that_memfit_explain_writes_is_read() -> None:
    """Its writer is independent of this test's."""
    from test_explain import PLAIN

    from memfit.report.explain_files import snapshot

    (device, *_) = parse_snapshot(snapshot(PLAIN), what="it")
    assert device.event_count > 0
    assert device.allocated_bytes == sum(a.size_bytes for a in PLAIN.trace.allocations if a.end is None)


# -- hostile files ----------------------------------------------------------------------------------------

_MARK = "AUTOPSY_RAN_CODE"


class _Attack:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _set_mark() -> str:
    return f"__import__('os').environ.__setitem__('{_MARK}', '1')"


def _memo(index: int) -> bytes:
    return b"\x80\x02}r" + struct.pack("<I", index) + b"."


_HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps(_Attack(os.system, "true")),
    "eval": pickle.dumps(_Attack(eval, _set_mark())),
    "eval of protocol 2": pickle.dumps(_Attack(eval, _set_mark()), protocol=2),
    "exec inside the segments": pickle.dumps({"segments": [_Attack(exec, _set_mark())], "device_traces": []}),
    "a function of a module": pickle.dumps(_Attack(os.putenv, _MARK, "1")),
    "GLOBAL": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "INST": b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x08builtins\x8c\x06object\x93)}\x92.",
    "BUILD": b"\x80\x02}}X\x01\x00\x00\x00aK\x01sb.",
    "REDUCE of data": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"\x80\x02Pabc\n.",
    "BINPERSID": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "a set": b"\x80\x04\x8f.",
    "a bytearray that claims 2**60 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
    "a text that claims 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.",
    "a frame that claims 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "a number of 2**31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "an unknown memo entry": b"\x80\x02h\x07.",
    "an unknown instruction": b"\x80\x02\xff.",
    "cut off": pickle.dumps({"segments": [1, 2, 3]})[:-4],
    "no end": b"\x80\x04",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "a list as a dictionary": b"\x80\x02]X\x01\x00\x00\x00aK\x01s.",
    "deeply nested": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "no snapshot": pickle.dumps({"weights": [1.0]}),
    "texts for numbers": pickle.dumps({"segments": [{"device": "0", "total_size": "x", "blocks": []}]}),
    "numbers for lists": pickle.dumps({"segments": 7}),
    "a huge memo index": _memo(2**31 - 1) ,
}  # fmt: skip


@pytest.mark.parametrize("name", _HOSTILE)
def test_a_hostile_file_runs_no_code_and_gives_one_clear_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "system", calls.append)
    monkeypatch.delenv(_MARK, raising=False)
    with pytest.raises(UserError) as caught:
        parse_snapshot(_HOSTILE[name], what="it")
    assert "\n" not in str(caught.value)
    assert not calls
    assert _MARK not in os.environ


def test_the_attacks_do_run_code_under_pickle_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would prove nothing."""
    monkeypatch.setenv(_MARK, "")
    pickle.loads(_HOSTILE["eval"])
    assert os.environ[_MARK] == "1"


def test_no_instruction_that_can_call_is_carried_out() -> None:
    names = set(plain_pickle._NAMES)
    assert not names & {
        "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2",
        "EXT4", "PERSID", "BINPERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "DUP",
    }  # fmt: skip


def test_a_list_that_refers_to_itself_again_and_again_is_refused_in_time() -> None:
    segment: dict[str, Any] = {"device": 0, "total_size": 1, "blocks": []}
    block = {"size": 1, "state": "active_allocated", "frames": []}
    segment["blocks"] = [block] * 100_000
    started = time.monotonic()
    with pytest.raises(UserError, match="more than"):
        parse_snapshot(pickle.dumps({"segments": [segment] * 100_000}), what="it")
    assert time.monotonic() - started < 60


def test_texts_are_not_made_of_nested_lists() -> None:
    value: Any = "a"
    for _ in range(60):
        value = [value, value]
    frames = [{"filename": value, "line": 1, "name": "f"}]
    block = {"size": 1, "state": "active_allocated", "frames": frames}
    snapshot = {"segments": [{"device": 0, "total_size": 1, "blocks": [block]}]}
    with pytest.raises(UserError, match="a text is expected"):
        parse_snapshot(pickle.dumps(snapshot), what="it")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.pickle"
    path.write_bytes(b"\x80\x04" + b" " * 100)
    monkeypatch.setattr("memfit.monitoring.memory_snapshot.LARGEST_BYTES", 50)
    with pytest.raises(UserError, match="at most 50"):
        read_snapshot(path)


# -- watched trainings ------------------------------------------------------------------------------------


def record_of(folder: Path, *lines: dict[str, Any]) -> Diagnosis:
    start = {
        "kind": "start", "rank": 0, "world_size": 1, "pid": 1, "host": "h", "time_s": 0.0, "device": "cuda:0",
        "device_name": "GPU", "total_bytes": 80 * GIB, "memory_source": "torch", "energy_boundary": "",
        "environment": {}, "prediction": {}, "limits": {},
    }  # fmt: skip
    path = folder / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (start, *lines)))
    return diagnose_record(read_records(path))


def step_line(step: int, allocated: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "time_s": float(step), "allocated_bytes": int(allocated * GIB)}


def test_the_record_of_a_watch_shows_a_leak(tmp_path: Path) -> None:
    steps = [step_line(n, 10 + n) for n in range(1, 60)]
    end = {"kind": "end", "time_s": 9.0, "error": "OutOfMemoryError", "message": full().partition(": ")[2]}
    diagnosis = record_of(tmp_path, *steps, end)
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.LEAK, Certainty.CERTAIN)
    assert diagnosis.figures["request_bytes"] == GIB


RESET = "[tcp/pair.cc:537] Read error [127.0.0.1]:62666: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "other_ended", "killed", "cause", "certainty"),
    [
        ((RESET, "RuntimeError"), False, 0, DeathCause.NOT_MEMORY, Certainty.LIKELY),
        ((RESET, "RuntimeError"), False, None, DeathCause.UNKNOWN, Certainty.UNKNOWN),
        (("NCCL communicator was aborted on rank 0", "DistBackendError"), False, 1,
         DeathCause.HOST_KILLED, Certainty.CERTAIN),
        (("bad label", "ValueError"), False, 0, DeathCause.NOT_MEMORY, Certainty.CERTAIN),
        ((RESET, "RuntimeError"), True, 0, DeathCause.NOT_MEMORY, Certainty.LIKELY),
        (None, False, 0, DeathCause.NOT_MEMORY, Certainty.LIKELY),
    ],
)  # fmt: skip
def test_a_lost_connection_of_one_rank_is_no_cause_if_another_has_no_record_of_its_end(
    tmp_path: Path,
    error: tuple[str, str] | None,
    other_ended: bool,
    killed: int | None,
    cause: DeathCause,
    certainty: Certainty,
) -> None:
    record_of(tmp_path, step_line(1, 1.0), *([{"kind": "end", "time_s": 8.0}] * other_ended))
    text = (tmp_path / "run.jsonl").read_text().replace('"rank": 0', '"rank": 1')
    (tmp_path / "run.1.jsonl").write_text(text)
    ends = [{"kind": "end", "time_s": 9.0, "error": error[1], "message": error[0]}] if error else []
    exit_line = {
        "kind": "exit", "time_s": 9.0, "code": 1, "oom_kills": killed, "free_bytes": 30 * GIB,
        "total_bytes": 40 * GIB,
    }  # fmt: skip
    record_of(tmp_path, step_line(1, 1.0), *ends, exit_line)
    path = tmp_path / "run.jsonl"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    diagnosis = diagnose_record(read_records(path))
    assert (diagnosis.cause, diagnosis.certainty) == (cause, certainty)
    if not other_ended and killed != 1 and (error is None or error[0] == RESET):
        assert "rank 1 has no record of its end, as after a signal" in diagnosis.evidence


def test_a_leak_on_the_host_is_certain_if_the_watch_has_alarmed(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"kind": "step", "step": n, "time_s": 1.0, "host_bytes": 1000 + 20 * n} for n in range(60)
    ]
    end = {"kind": "end", "time_s": 9.0, "error": "MemoryError", "message": ""}
    alone = record_of(tmp_path, *steps, end)
    assert (alone.cause, alone.certainty, alone.memory) == (DeathCause.LEAK, Certainty.LIKELY, "host")
    alarm = {
        "kind": "alarm", "alarm": "creep", "step": 50, "rank": 0, "quantity": "host_bytes", "value": 20.0,
        "limit": 1.0, "text": "the resident memory grows",
    }  # fmt: skip
    both = record_of(tmp_path, *steps, alarm, end)
    assert both.certainty is Certainty.CERTAIN
    assert any("the resident memory grows" in e for e in both.evidence)


def test_the_record_of_a_watch_names_the_device_also_by_a_message_that_cannot_be_read(tmp_path: Path) -> None:
    end = {"kind": "end", "time_s": 9.0, "error": "OutOfMemoryError", "message": "of another form"}
    diagnosis = record_of(tmp_path, step_line(1, 1), end)
    assert diagnosis.memory == "device"
    assert "memory of the device (cuda) ran out" in diagnosis.evidence


def test_the_record_of_a_watch_shows_a_step_that_needed_more(tmp_path: Path) -> None:
    steps = [step_line(n, 10) for n in range(1, 60)]
    end = {"kind": "end", "time_s": 9.0, "error": "OutOfMemoryError", "message": full().partition(": ")[2]}
    assert record_of(tmp_path, *steps, end).cause is DeathCause.LONGER_SAMPLE


def test_the_record_of_a_watch_shows_a_kill_by_the_kernel(tmp_path: Path) -> None:
    diagnosis = record_of(tmp_path, step_line(1, 1), exit_line(oom_kills=1))
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.HOST_KILLED, Certainty.CERTAIN)


def exit_line(**values: int) -> dict[str, Any]:
    return {"kind": "exit", "time_s": 9.0, "code": -9, **values}


@pytest.mark.parametrize(
    ("known", "cause", "certainty"),
    [
        ({}, "unknown", "unknown"),
        ({"free_bytes": 20 * GIB, "total_bytes": 64 * GIB}, "unknown", "unknown"),
        ({"free_bytes": 20 * GIB, "total_bytes": 64 * GIB, "oom_kills": 0}, "not-memory", "likely"),
        ({"free_bytes": GIB, "total_bytes": 64 * GIB, "oom_kills": 0}, "unknown", "unknown"),
        ({"free_bytes": GIB, "total_bytes": 64 * GIB}, "host-killed", "likely"),
        ({"free_bytes": 20 * GIB, "total_bytes": 64 * GIB, "machine_oom_kills": 1}, "host-killed", "likely"),
    ],
)
def test_a_bare_kill_is_judged_by_the_kernels_counts_and_the_free_memory(
    known: dict[str, int], cause: str, certainty: str, tmp_path: Path
) -> None:
    diagnosis = record_of(tmp_path, step_line(1, 1), exit_line(**known))
    assert (diagnosis.cause, diagnosis.certainty) == (cause, certainty)
    assert any("it is not known by whom" in e for e in diagnosis.evidence)


def test_the_record_of_another_error_is_no_death_of_memory(tmp_path: Path) -> None:
    end = {"kind": "end", "time_s": 9.0, "error": "ValueError", "message": "no"}
    assert record_of(tmp_path, step_line(1, 1), end).cause is DeathCause.NOT_MEMORY


# -- several pieces of evidence ---------------------------------------------------------------------------


def test_a_snapshot_decides_what_the_log_leaves_open() -> None:
    writer = SnapshotWriter(4000)
    assert not train(writer, 40, leak=100)
    log = diagnose_log("step 1200 loss 2.1\nstep 1201 loss 2.0\n" + traceback("loss = model(x)"))
    both = combine([log, diagnosis_of_snapshot(writer)])
    assert (both.cause, both.certainty) == (DeathCause.LEAK, Certainty.CERTAIN)
    assert {*log.evidence} <= {*both.evidence}


def test_the_kernels_log_explains_a_log_that_only_says_killed() -> None:
    kernel = diagnosis_of("host_killed_dmesg_1")
    both = combine([diagnose_log("step 3 loss 1\nKilled"), kernel])
    assert (both.cause, both.certainty) == (DeathCause.HOST_KILLED, Certainty.CERTAIN)


def test_two_certain_causes_make_an_answer_that_is_only_likely() -> None:
    both = combine([diagnosis_of("optimizer_state_1"), diagnosis_of("host_killed_dmesg_1")])
    assert both.certainty is Certainty.LIKELY
    assert {both.cause, *both.alternatives} >= {DeathCause.OPTIMIZER_STEP, DeathCause.HOST_KILLED}


def test_an_error_after_one_of_memory_is_not_surely_the_reason() -> None:
    text = (
        "step 10 loss 2.0\nTraceback (most recent call last):\n"
        '  File "train.py", line 40, in <module>\n    loss.backward()\n'
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has "
        "a total capacity of 23.64 GiB of which 1.00 GiB is free.\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n"
        '  File "train.py", line 60, in <module>\n    save_checkpoint(state)\n'
        "FileNotFoundError: [Errno 2] No such file or directory: 'out/last.pt'\n"
    )
    diagnosis = diagnose_log(text)
    assert diagnosis.is_out_of_memory or diagnosis.certainty is not Certainty.CERTAIN


@pytest.mark.parametrize(
    ("values", "factor"),
    [
        ((2.0, 2.0, 2.0, 2.0, 3.0), 1.5),
        ((2.0, 2.0, 2.0, 2.0, 2.5), None),
        ((2.0, 2.0, 2.0, 3.0), None),
        ((0.0, 0.0, 0.0, 0.0, 0.0), None),
        ((0.0, 0.0, 0.0, 0.0, 7.0), None),
        ((1.0,), None),
        ((1.0, 2.0, 3.0, 4.0, 9.0), None),  # a counter
    ],
)
def test_the_last_sample_is_an_outlier_above_what_was_logged_before(
    values: tuple[float, ...], factor: float | None
) -> None:
    series = NumberSeries(key="tokens", values=values, rows=tuple(range(len(values))))
    assert outlier_factor(series, len(values)) == factor
