"""Find out why a training ran out of memory, from its log, a memory snapshot or the record of a watch.

Every answer names its evidence. If the evidence allows several causes, all of them are given; if it does not
say, the answer is "unknown" with what to record next time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Final

from memfit.monitoring.diagnosis import Certainty, DeathCause, Diagnosis
from memfit.monitoring.host_kill import HostKill, host_kills
from memfit.monitoring.memory_snapshot import LiveStack, MemorySnapshot, user_frame
from memfit.monitoring.oom_text import AllocationFailure, allocation_failures
from memfit.monitoring.phases import PhaseOfDeath, phase_of
from memfit.monitoring.record import CommandExit, RankRecord, WatchRecord
from memfit.monitoring.remedies import advice_for, capture_for
from memfit.monitoring.traceback_text import (
    StackFrame,
    TracebackText,
    innermost_user_frame,
    read_tracebacks,
)
from memfit.monitoring.training_log import NumberSeries, TrainingLog, outlier_factor, read_training_log
from memfit.types.device_kind import HOST
from memfit.types.peer_errors import PEER_ERRORS, is_peer_error
from memfit.types.units import GIB, format_bytes

_LONGEST_LINE: Final = 4000  # characters
_LARGE_SHARE: Final = 0.1  # of the memory: below it, free parts do not matter
_OUTSIDE_SHARE: Final = 0.25
_USUAL_OUTSIDE_BYTES: Final = 2 * GIB  # context, libraries, a desktop
_ROUNDING: Final = 0.95  # the allocator asks for a little more than a tensor needs

# Errors of other ranks and of launchers, which follow from the death of a process.
_CONSEQUENCE: Final = re.compile(
    r"ChildFailedError|ProcessRaisedException|ProcessExitedException|CalledProcessError|exited unexpectedly|"
    r"Caught \w+ in (?:DataLoader|replica)|KeyboardInterrupt|SystemExit|EOFError|killed by signal|"
    + PEER_ERRORS
)
_LIBRARY: Final = re.compile(
    r"\bNCCL\b.*out of memory|NCCL WARN Failed to CUDA [cm]alloc|CU\w+_STATUS_ALLOC_FAILED|"
    r"(?:CUDA|HIP)(?: driver)? error: out of memory|[Cc]uda failure '?(?:2 )?'?out of memory|"
    r"cudaErrorMemoryAllocation|hipErrorOutOfMemory"
)
_NCCL: Final = re.compile(r"NCCL.*(?:out of memory|Failed to CUDA [cm]alloc)|[Cc]uda failure .*out of memory")
_AMBIGUOUS: Final = re.compile(
    r"CU\w+_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)|unable to find an engine to execute|"
    r"GET was unable to find an engine"
)
# Words for full memory in errors that are not of torch's allocators: XLA, TensorFlow, SYCL, engines.
_FULL: Final = re.compile(
    r"out of (?:\w+ )?memory|\bOOM\b|OUT_OF(?:_\w+)?_(?:MEMORY|RESOURCES)|RESOURCE_?EXHAUSTED|"
    r"(?:no available|not enough|insufficient) (?:\w+ )?memory|OutOf(?:\w*Memory|Resources)",
    re.IGNORECASE,
)
_RECORD: Final = re.compile(rb'\s*\{"kind": ?"(?:command|start|step|values|alarm|end|exit)"')
_SKIPPED: Final = re.compile(r"skip\w*|retry\w*|retrying|attempting to recover", re.IGNORECASE)
_OTHER_ENDS: Final = (
    (re.compile(r"[Ww]atchdog caught collective operation timeout"), "a collective operation timed out"),
    (re.compile(r"DUE TO TIME LIMIT|TIMEOUT|time limit exceeded", re.IGNORECASE), "it reached a time limit"),
    (re.compile(r"\bSIGTERM\b|signal:? 15\b|Terminated\s*$|PREEMPTION"), "it was told to stop (SIGTERM)"),
    (re.compile(r"\bCANCELLED\b"), "it was cancelled"),
    (re.compile(r"^\W*KeyboardInterrupt"), "it was interrupted (Ctrl-C)"),
    (re.compile(r"Segmentation fault|SIGSEGV"), "it crashed (segmentation fault)"),
    (re.compile(r"No space left on device"), "a disk was full"),
    (re.compile(r"illegal memory access|device-side assert"), "a kernel made an invalid access"),
)


# -- logs -------------------------------------------------------------------------------------------------


def diagnose_log(text: str) -> Diagnosis:
    """Return why a training ended, judged by the end of its log, an error message, or the kernel's log."""
    lines = [_shorten(line) for line in re.split(r"\r\n|\r|\n", text)]
    kills = list(host_kills(lines))
    stated = [k for k in kills if k.kind != "sigkill"]
    tracebacks = [t for t in read_tracebacks(lines) if not _CONSEQUENCE.search(f"{t.error}: {t.message}")]
    last = tracebacks[-1] if tracebacks else None
    last_frames = last.frames if last else ()
    failure = _fatal_failure(lines, last)
    if stated and failure is None:
        return _diagnose_kill(stated[-1], read_training_log(lines[: stated[-1].row]))
    if failure is not None:
        start = min(failure.row, last.start if last else failure.row)
        diagnosis = judge(failure, phase_of(last_frames), read_training_log(lines[:start]))
        diagnosis = _with_place(diagnosis, last_frames)
        return combine([diagnosis, _diagnose_kill(stated[-1], None)]) if stated else diagnosis
    if library := _library_failure(lines, last):
        return _with_place(library, last_frames)
    if kills and (last is None or kills[-1].row >= last.start):
        return _diagnose_kill(kills[-1], read_training_log(lines[: kills[-1].row]))
    return _with_place(_other_end(lines, last), last_frames)


def _shorten(line: str) -> str:
    """Return a line; of one with more than 4,000 characters, such as printed data, the first and last 2,000
    with " ... " between them."""
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def _fatal_failure(lines: Sequence[str], last: TracebackText | None) -> AllocationFailure | None:
    """Return the allocation failure that ended the training, None if none did. One that the training survived
    is followed by an error of another kind, or by progress."""
    failures = list(allocation_failures(lines))
    if not failures:
        return None
    if last is not None:
        own = [f for f in failures if last.start <= f.row <= last.end + 3]
        return own[-1] if own else None
    final = failures[-1]
    rest = lines[final.row + 1 :]
    is_survived = _SKIPPED.search(" ".join([lines[final.row], *rest[:2]])) and len(rest) > 2
    if is_survived or len(read_training_log(rest).progress_rows) >= 2:
        return None
    return final


def _with_place(diagnosis: Diagnosis, frames: Sequence[StackFrame]) -> Diagnosis:
    """Return the diagnosis with the line of the user's code and the module that the frames of a traceback
    show and, if it has no phase, the phase. Unchanged without frames."""
    if not frames:
        return diagnosis
    frame, phase = innermost_user_frame(frames), phase_of(frames)
    return dataclasses.replace(
        diagnosis,
        line=frame.place if frame else "",
        module=phase.module,
        phase=diagnosis.phase or ("evaluation" if phase.in_evaluation else phase.name),
    )


def _diagnose_kill(kill: HostKill, log: TrainingLog | None) -> Diagnosis:
    """Return the diagnosis of a process that was killed from outside."""
    if kill.kind == "shared-memory":
        return _diagnosis(
            DeathCause.SHARED_MEMORY,
            Certainty.CERTAIN,
            [f"the log says that shared memory (/dev/shm) was too small: {kill.text[:200]}"],
            memory="host",
        )
    evidence, figures = [], {}
    if kill.kind == "kernel":
        group = (
            "a control group (container or job) had reached its limit"
            if kill.in_group
            else "the host was full"
        )
        evidence.append(f"the kernel killed the process {kill.process!r} because {group}")
    elif kill.kind == "stated":
        evidence.append(f"the scheduler or container runtime says that memory ran out: {kill.text[:200]}")
    else:
        evidence.append(f"a process died of SIGKILL, which the log does not explain: {kill.text[:200]}")
    if kill.resident_bytes:
        figures["resident_bytes"] = kill.resident_bytes
        evidence.append(f"it had {format_bytes(kill.resident_bytes)} of resident memory")
    if kill.limit_bytes:
        figures["limit_bytes"] = kill.limit_bytes
        evidence.append(f"the limit of the group was {format_bytes(kill.limit_bytes)}")
    if (
        log is not None
        and log.memory is not None
        and log.memory.is_growing
        and "rss" in log.memory.key.lower()
    ):
        evidence.append(_growth_text(log.memory))
    if not kill.is_training:
        evidence.append(f"this evidence does not say whether {kill.process!r} belongs to the training")
    is_certain = kill.kind != "sigkill" and kill.is_training
    return _diagnosis(
        DeathCause.HOST_KILLED,
        Certainty.CERTAIN if is_certain else Certainty.LIKELY,
        evidence,
        memory="host",
        figures=figures,
        alternatives=[] if is_certain else [DeathCause.NOT_MEMORY],
    )


def _library_failure(lines: Sequence[str], last: TracebackText | None) -> Diagnosis | None:
    """Return the diagnosis if a library outside torch's allocator found no memory; one of unknown cause if it
    failed in a way that lack of memory or another fault can cause; otherwise None."""
    message = f"{last.error}: {last.message}" if last else ""
    own = [message] if last and _LIBRARY.search(message) else []
    if last is None or "NCCL" in message or "DistBackendError" in message:
        own += [line for line in lines if _LIBRARY.search(line)]
    if own:
        text = " ".join(own[0].split())[:200]
        is_nccl = any(_NCCL.search(line) for line in own)
        evidence = [f"memory outside torch's allocator could not be allocated: {text}"]
        if not is_nccl:
            evidence.append("the message has no figures and does not say what holds the memory")
        return _diagnosis(
            DeathCause.OUTSIDE_TORCH,
            Certainty.CERTAIN if is_nccl else Certainty.LIKELY,
            evidence,
            memory="device",
            alternatives=[] if is_nccl else [DeathCause.TENSORS_TOO_LARGE],
        )
    if _AMBIGUOUS.search(message):
        return _diagnosis(
            DeathCause.UNKNOWN,
            Certainty.UNKNOWN,
            [f"a library failed in a way that lack of memory and other faults can cause: {message[:200]}"],
            alternatives=[DeathCause.OUTSIDE_TORCH, DeathCause.NOT_MEMORY],
        )
    return _foreign_failure(message) if _FULL.search(message) else None


def _foreign_failure(message: str) -> Diagnosis:
    """Return the diagnosis of an error that speaks of full memory, but is of none of torch's allocators."""
    text = " ".join(message.split())[:200]
    return _diagnosis(
        DeathCause.UNKNOWN,
        Certainty.UNKNOWN,
        [f"the last error speaks of full memory, in words of none of torch's allocators: {text}"],
        alternatives=[DeathCause.TENSORS_TOO_LARGE, DeathCause.OUTSIDE_TORCH, DeathCause.NOT_MEMORY],
    )


def _other_end(lines: Sequence[str], last: TracebackText | None) -> Diagnosis:
    """Return the diagnosis of a log whose last error is not one of memory."""
    if last is not None:
        text = f"the training ended with {last.error}: {last.message}"[:240].rstrip(": ")
        earlier = [f for f in allocation_failures(lines) if f.row < last.start]
        if not earlier or len(read_training_log(lines[earlier[-1].row : last.start]).progress_rows) >= 2:
            return _diagnosis(DeathCause.NOT_MEMORY, Certainty.CERTAIN, [text])
        evidence = [text, f"before that, memory ran out: {' '.join(lines[earlier[-1].row].split())[:200]}"]
        others = [DeathCause.TENSORS_TOO_LARGE]
        return _diagnosis(DeathCause.NOT_MEMORY, Certainty.LIKELY, evidence, alternatives=others)
    for line in reversed(lines[-200:]):
        for pattern, meaning in _OTHER_ENDS:
            if pattern.search(line):
                evidence = [f"{meaning}: {line.strip()[:200]}"]
                return _diagnosis(DeathCause.NOT_MEMORY, Certainty.LIKELY, evidence)
    if not any(line.strip() for line in lines):
        return _diagnosis(DeathCause.UNKNOWN, Certainty.UNKNOWN, ["the text is empty"])
    if (full := next(filter(_FULL.search, reversed(lines[-200:])), None)) is not None:
        return _foreign_failure(full)
    evidence = [
        "this text has no error of an allocator, no kill and no traceback but those that another death causes"
    ]
    return _diagnosis(DeathCause.UNKNOWN, Certainty.UNKNOWN, evidence)


_Judgement = tuple[DeathCause, Certainty, list[str], list[DeathCause]]


# -- rules ------------------------------------------------------------------------------------------------


def judge(failure: AllocationFailure, phase: PhaseOfDeath, log: TrainingLog) -> Diagnosis:
    """Return why an allocation failed. The figures of the message (``failure``) are judged first, then what
    ran (``phase``), then how far the training had come (``log``)."""
    cause, certainty, evidence, alternatives = _merge(
        failure, _by_figures(failure), _by_phase(phase, log) or _by_progress(log) or _by_start(log)
    )
    return _diagnosis(
        cause,
        certainty,
        [_figures_text(failure), *evidence],
        memory="host" if failure.on_host else "device",
        phase="evaluation" if phase.in_evaluation else phase.name,
        figures=failure.figures(),
        alternatives=[a for a in dict.fromkeys(alternatives) if a is not cause],
    )


def _merge(failure: AllocationFailure, figures: _Judgement | None, time: _Judgement) -> _Judgement:
    """Return one judgement from that of the message's figures and that of what ran and when."""
    if figures is None:
        return _with_free_blocks(failure, time)
    cause, certainty, evidence, alternatives = figures
    evidence = [*evidence, *time[2]]
    if cause is DeathCause.TENSORS_TOO_LARGE and time[0] in _TIMES:
        return time[0], time[1], evidence, time[3]
    if certainty is not Certainty.CERTAIN:
        return cause, certainty, evidence, [time[0], *alternatives]
    return cause, certainty, evidence, [time[0]] if time[0] in _TIMES else alternatives


# Causes that say when more memory was needed than in the steps before.
_TIMES: Final = (
    DeathCause.LEAK,
    DeathCause.LONGER_SAMPLE,
    DeathCause.EVALUATION,
    DeathCause.OPTIMIZER_STEP,
    DeathCause.CHECKPOINT,
)


def _with_free_blocks(failure: AllocationFailure, time: _Judgement) -> _Judgement:
    """Return ``time`` with fragmentation as an alternative, or in place of late growth as the likely cause,
    if the allocator holds at least twice the memory that was asked for, and 2 % of the limit, in no tensor.
    Otherwise, and if another cause is certain, return ``time`` unchanged."""
    request, unallocated, limit = failure.request_bytes, failure.unallocated_bytes, failure.limit_bytes
    if (
        request is None
        or unallocated is None
        or limit is None
        or unallocated < max(2 * request, 0.02 * limit)
    ):
        return time
    text = f"{format_bytes(unallocated)} is reserved but in no tensor, more than was asked for"
    cause, certainty, evidence, alternatives = time
    if cause is DeathCause.LATE_GROWTH:
        return DeathCause.FRAGMENTATION, Certainty.LIKELY, [*evidence, text], [cause, *alternatives]
    if certainty is Certainty.CERTAIN:
        return time
    return cause, certainty, [*evidence, text], [*alternatives, DeathCause.FRAGMENTATION]


def _by_figures(failure: AllocationFailure) -> _Judgement | None:
    """Return what the figures of the message alone say. None if they say only that memory is full, if they
    are missing, and for memory of the host."""
    request, limit = failure.request_bytes, failure.limit_bytes
    if request is None or limit is None or failure.on_host:
        return None
    if request >= limit:
        text = f"the request alone is larger than the memory of {format_bytes(limit)}"
        if request >= 16 * limit:
            text += ", many times: a wrong size, such as of an unintended broadcast, is likely"
        return DeathCause.TENSORS_TOO_LARGE, Certainty.CERTAIN, [text], []
    outside, free = failure.outside_bytes, failure.free_bytes or 0
    unallocated = failure.unallocated_bytes or 0
    is_much = outside is not None and outside >= max(_OUTSIDE_SHARE * limit, _USUAL_OUTSIDE_BYTES)
    if outside is not None and is_much and request <= outside + free + unallocated:
        return _outside(failure, outside)
    if unallocated >= max(request, _LARGE_SHARE * limit):
        text = (
            f"{format_bytes(unallocated)} is reserved but in no tensor, more than the "
            f"{format_bytes(request)} asked for: no free block that can be used is large enough"
        )
        return DeathCause.FRAGMENTATION, Certainty.CERTAIN, [text], []
    if request <= _ROUNDING * free and failure.allowed_bytes is None:
        text = (
            f"the device had {format_bytes(free)} free, more than the {format_bytes(request)} asked for: by "
            "these figures memory was not short. Another process may have held it for a moment, or a limit "
            "of the driver applies"
        )
        return DeathCause.UNKNOWN, Certainty.UNKNOWN, [text], [DeathCause.OUTSIDE_TORCH]
    if unallocated + free >= request and unallocated >= _LARGE_SHARE * limit:
        text = f"{format_bytes(unallocated)} is reserved but in no tensor; it and the free memory are enough"
        return DeathCause.FRAGMENTATION, Certainty.LIKELY, [text], []
    return None


def _outside(failure: AllocationFailure, outside_bytes: int) -> _Judgement:
    text = f"{format_bytes(outside_bytes)} in use on the device is not held by this process's torch allocator"
    if failure.other_processes:
        text += f"; the message names {failure.other_processes} other process(es)"
        return DeathCause.OUTSIDE_TORCH, Certainty.CERTAIN, [text], []
    if failure.device == "mps":
        return DeathCause.OUTSIDE_TORCH, Certainty.CERTAIN, [text], []
    if failure.process_bytes is not None:
        own = failure.process_bytes - (failure.allocated_bytes or 0) - (failure.unallocated_bytes or 0)
        if own >= 0.8 * outside_bytes:
            text += " but by libraries in this process (communication, kernels, CUDA graphs)"
            return DeathCause.OUTSIDE_TORCH, Certainty.CERTAIN, [text], []
        text += " but by other processes or containers"
        return DeathCause.OUTSIDE_TORCH, Certainty.CERTAIN, [text], []
    text += " but by other processes or by libraries in this one"
    return DeathCause.OUTSIDE_TORCH, Certainty.CERTAIN, [text], []


def _by_phase(phase: PhaseOfDeath, log: TrainingLog) -> _Judgement | None:
    """Return what the calls of the traceback say: a checkpoint, an evaluation or the optimizer's step was the
    cause. None if memory ran out in none of these, or in a late optimizer's step, which has another cause."""
    if phase.name in ("save", "load"):
        action = "saving" if phase.name == "save" else "loading"
        return DeathCause.CHECKPOINT, Certainty.CERTAIN, [f"it died while {action} a checkpoint"], []
    if phase.in_evaluation or (log.in_evaluation and not phase.in_training):
        evidence = ["it died in an evaluation, not in a training step"]
        if phase.in_training or log.in_evaluation or log.epochs or log.progress_rows:
            return DeathCause.EVALUATION, Certainty.CERTAIN, evidence, []
        evidence.append("the log shows no training before it")
        return DeathCause.EVALUATION, Certainty.LIKELY, evidence, [DeathCause.TENSORS_TOO_LARGE]
    if phase.evaluating_function:
        text = f"it died in {phase.evaluating_function}, which by its name evaluates something"
        others = [DeathCause.LATE_GROWTH if log.is_late else DeathCause.TENSORS_TOO_LARGE]
        return DeathCause.EVALUATION, Certainty.LIKELY, [text], others
    if phase.name == "optimizer":
        if phase.adds_state:
            text = "it died while the optimizer made its state, which the first step does"
            return DeathCause.OPTIMIZER_STEP, Certainty.CERTAIN, [text], []
        if not log.is_late:
            text = "it died in the optimizer's step"
            if log.is_surely_first_step:
                return DeathCause.OPTIMIZER_STEP, Certainty.CERTAIN, [f"{text}, the first by the log"], []
            return DeathCause.OPTIMIZER_STEP, Certainty.LIKELY, [text], [DeathCause.LATE_GROWTH]
    return None


def _by_progress(log: TrainingLog) -> _Judgement | None:
    """Return what the log says if steps had fitted before memory ran out, None if none had."""
    memory = log.memory
    growing_sample = next((s for s in log.samples if s.is_growing), None)
    row_count = max((s.rows[-1] for s in log.samples), default=0) + 1
    row_count = max([row_count, *log.progress_rows, *([memory.rows[-1] + 1] if memory else [])])
    factors = [(f, s) for s in log.samples if (f := outlier_factor(s, row_count)) is not None]
    if factors:
        factor, series = max(factors, key=lambda item: item[0])
        text = f"the last value of {series.key!r} in the log is {factor:.2g} times the highest before it"
        is_certain = memory is None or not memory.is_growing
        others = [] if is_certain else [DeathCause.LEAK]
        return DeathCause.LONGER_SAMPLE, Certainty.CERTAIN if is_certain else Certainty.LIKELY, [text], others
    if memory is not None and memory.is_growing:
        evidence = [_growth_text(memory)]
        if growing_sample is not None:
            evidence.append(f"{growing_sample.key!r} grows as well")
            return DeathCause.LONGER_SAMPLE, Certainty.LIKELY, evidence, [DeathCause.LEAK]
        is_certain = memory.is_current and len(memory.values) >= 8
        others = [] if is_certain else [DeathCause.LONGER_SAMPLE]
        return DeathCause.LEAK, Certainty.CERTAIN if is_certain else Certainty.LIKELY, evidence, others
    if not log.is_late:
        return None
    evidence = [f"at least {log.last_step or 'one epoch of'} steps had fitted before"]
    if memory is not None and memory.is_flat:
        evidence.append(f"{memory.key!r} did not grow until then, so this step needed more than those before")
        return DeathCause.LONGER_SAMPLE, Certainty.LIKELY, evidence, [DeathCause.FRAGMENTATION]
    others = [DeathCause.LEAK, DeathCause.LONGER_SAMPLE, DeathCause.FRAGMENTATION]
    return DeathCause.LATE_GROWTH, Certainty.LIKELY, evidence, others


def _by_start(log: TrainingLog) -> _Judgement:
    if log.is_first_step:
        text = "no more than one step was finished by the log"
        others = [DeathCause.OPTIMIZER_STEP] if log.last_step == 1 else []
        others += [DeathCause.CHECKPOINT] if log.is_resumed else []
        others += [] if log.is_surely_first_step else [DeathCause.LATE_GROWTH]
        certainty = Certainty.LIKELY if others else Certainty.CERTAIN
        return DeathCause.TENSORS_TOO_LARGE, certainty, [text], others
    text = "the log shows no finished step"
    return DeathCause.TENSORS_TOO_LARGE, Certainty.LIKELY, [text], [DeathCause.LATE_GROWTH]


def _growth_text(series: NumberSeries) -> str:
    first, last = series.values[0], series.values[-1]
    values = (format_bytes(first), format_bytes(last)) if series.has_unit else (f"{first:g}", f"{last:g}")
    return f"{series.key!r} grows over {len(series.values)} values, from {values[0]} to {values[1]}"


def _figures_text(failure: AllocationFailure) -> str:
    parts = []
    if failure.request_bytes is not None:
        parts.append(f"{format_bytes(failure.request_bytes)} was asked for")
    names = (
        ("capacity_bytes", "{} device"),
        ("allowed_bytes", "{} allowed"),
        ("allocated_bytes", "{} in tensors"),
        ("unallocated_bytes", "{} reserved but in no tensor"),
        ("free_bytes", "{} free"),
    )
    parts += [t.format(format_bytes(v)) for n, t in names if (v := getattr(failure, n)) is not None]
    where = "memory of the host" if failure.on_host else f"memory of the device ({failure.device})"
    return f"{where} ran out: {', '.join(parts)}" if parts else f"{where} ran out"


# -- snapshots --------------------------------------------------------------------------------------------


def diagnose_snapshot(snapshots: Sequence[MemorySnapshot]) -> Diagnosis:
    """Return why an allocation failed, judged by the devices of a memory snapshot. The device with a failed
    request counts, or else the one with most memory."""
    if not snapshots:
        evidence = ["the snapshot has no memory of any device"]
        return _diagnosis(DeathCause.UNKNOWN, Certainty.UNKNOWN, evidence)
    snapshot = max(snapshots, key=lambda s: (s.request_bytes is not None, s.reserved_bytes))
    cause, certainty, evidence, alternatives = _by_snapshot(snapshot)
    phase = phase_of(snapshot.failed_stack)
    frame = user_frame(snapshot.failed_stack)
    names = ("request_bytes", "reserved_bytes", "allocated_bytes", "free_bytes", "largest_free_bytes")
    values = {n: getattr(snapshot, n) for n in (*names, "device_free_bytes", "leak_bytes")}
    stacks = [_stack_text(s) for s in snapshot.stacks[:3]]
    return _diagnosis(
        cause,
        certainty,
        [*evidence, *([f"most live memory: {'; '.join(stacks)}"] if stacks else [])],
        memory="device",
        phase="evaluation" if phase.in_evaluation else phase.name,
        line=frame.place if frame else "",
        figures={n: v for n, v in values.items() if v is not None},
        alternatives=alternatives,
    )


def _by_snapshot(snapshot: MemorySnapshot) -> _Judgement:
    request = snapshot.request_bytes
    if request is None and not snapshot.leak_bytes:
        evidence = ["the snapshot records no request that failed"]
        return DeathCause.UNKNOWN, Certainty.UNKNOWN, evidence, []
    if request is not None and snapshot.free_bytes >= max(request, _LARGE_SHARE * snapshot.reserved_bytes):
        text = (
            f"{format_bytes(request)} was asked for; {format_bytes(snapshot.free_bytes)} is free in "
            f"{snapshot.free_block_count} blocks, the largest of {format_bytes(snapshot.largest_free_bytes)}"
        )
        is_certain = snapshot.largest_free_bytes < request
        if not is_certain:
            text += ": a block that is large enough belongs to another stream or pool"
        return DeathCause.FRAGMENTATION, Certainty.CERTAIN if is_certain else Certainty.LIKELY, [text], []
    request_text = f"{format_bytes(request)} was asked for" if request is not None else "no request failed"
    evidence = [f"{request_text}; {format_bytes(snapshot.allocated_bytes)} is in tensors"]
    if snapshot.leak_bytes:
        lines = "; ".join(_stack_text(s) for s in snapshot.survivors[:3])
        text = f"memory between the steps grew by {format_bytes(snapshot.leak_bytes)}"
        evidence.append(f"{text}, allocated at {lines}" if lines else text)
        return DeathCause.LEAK, Certainty.CERTAIN, evidence, []
    steps = len(snapshot.peak_bytes)
    log = TrainingLog(
        last_step=steps, epochs=0, in_evaluation=False, progress_rows=(), memory=None, samples=()
    )
    if by_phase := _by_phase(phase_of(snapshot.failed_stack), log):
        return (*by_phase[:2], [*evidence, *by_phase[2]], by_phase[3])
    if steps >= 2 and snapshot.last_rise_bytes >= 1.05 * max(snapshot.peak_bytes):
        evidence.append(
            f"the last step needed {format_bytes(snapshot.last_rise_bytes)}, the {steps} before at most "
            f"{format_bytes(max(snapshot.peak_bytes))}; between the steps memory did not grow"
        )
        return DeathCause.LONGER_SAMPLE, Certainty.LIKELY, evidence, []
    if steps >= 2:
        evidence.append(f"{steps} steps of the trace had fitted before")
        others = [DeathCause.FRAGMENTATION, DeathCause.OUTSIDE_TORCH]
        return DeathCause.LATE_GROWTH, Certainty.LIKELY, evidence, others
    if snapshot.event_count == 0:
        evidence.append("the snapshot has no trace of what was allocated before")
        return DeathCause.TENSORS_TOO_LARGE, Certainty.LIKELY, evidence, [DeathCause.LATE_GROWTH]
    evidence.append("its trace shows no two steps that had fitted before")
    others = [DeathCause.OPTIMIZER_STEP] if steps else []
    return DeathCause.TENSORS_TOO_LARGE, Certainty.LIKELY, evidence, others


def _stack_text(stack: LiveStack) -> str:
    frame = user_frame(stack.stack)
    place = frame.place if frame else "lines that were not recorded"
    return f"{place} ({format_bytes(stack.size_bytes)} in {stack.block_count} blocks)"


# -- watched trainings ------------------------------------------------------------------------------------


def is_record(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is the record of a watched training."""
    return _RECORD.match(head) is not None


def diagnose_record(record: WatchRecord) -> Diagnosis:
    """Return why a watched training ended. It is judged by the ranks that ended with an error of memory and,
    if memfit ran the command, by how the command was killed. If there is neither and a rank ended with
    another error, the cause is not memory. If a rank is lost (`WatchRecord.lost_ranks`), errors of other
    ranks that say that a connection ended do not count, and without another error the lost rank is judged as
    killed. Otherwise the cause is unknown, and the evidence is the least free memory."""
    diagnoses = [d for r in record.ranks if (d := _diagnose_rank(r)) is not None]
    if record.exit is not None and (killed := _diagnose_exit(record.exit)) is not None:
        diagnoses.append(killed)
    if diagnoses:
        return combine(diagnoses)
    ends = [(r.rank, r.end) for r in record.ranks if r.end is not None and r.end.error]
    texts = {rank: f"rank {rank} ended with {end.error}: {end.message[:200]}" for rank, end in ends}
    own = [rank for rank, end in ends if not is_peer_error(f"{end.error}: {end.message}")]
    if own or (ends and not record.lost_ranks):
        certainty = Certainty.CERTAIN if own else Certainty.LIKELY
        return _diagnosis(DeathCause.NOT_MEMORY, certainty, [texts[(own or list(texts))[0]]])
    if record.lost_ranks:
        evidence = [f"rank {rank} has no record of its end, as after a signal" for rank in record.lost_ranks]
        evidence += [f"{text}, which follows from that" for text in texts.values()]
        return _diagnose_killed(record.exit, evidence)
    return _diagnosis(
        DeathCause.UNKNOWN, Certainty.UNKNOWN, ["no rank ended with an error of memory", *_headroom(record)]
    )


_SHORT_SHARE: Final = 0.1  # of the host's memory: with less free, or less than 1 GiB, it may have run out


def _diagnose_exit(end: CommandExit) -> Diagnosis | None:
    """Return the diagnosis of a command if it, or a process of it, was killed; None for any other end. The
    kernel counts its own kills. Those by others, such as a person or a daemon that watches the memory, leave
    no trace."""
    if end.oom_kills:
        evidence = [f"the kernel killed {end.oom_kills} process(es) of the command because memory ran out"]
        return _diagnosis(DeathCause.HOST_KILLED, Certainty.CERTAIN, evidence, memory="host")
    if not end.is_killed:
        return None
    return _diagnose_killed(end, ["the command was killed by signal 9, and it is not known by whom"])


def _diagnose_killed(end: CommandExit | None, evidence: list[str]) -> Diagnosis:
    """Return the diagnosis of a process that was killed, by the kernel's counts and the free memory before
    the ``end`` of the command; None: memfit did not run it. ``evidence`` shows that it was killed."""
    evidence = list(evidence)
    if end is None:
        diagnosis = _diagnosis(
            DeathCause.UNKNOWN,
            Certainty.UNKNOWN,
            evidence,
            memory="host",
            alternatives=[DeathCause.HOST_KILLED, DeathCause.NOT_MEMORY],
        )
        return dataclasses.replace(diagnosis, capture=capture_for(DeathCause.HOST_KILLED, "host"))
    is_short = None
    if end.free_bytes is not None and end.total_bytes is not None:
        is_short = end.free_bytes < max(_SHORT_SHARE * end.total_bytes, GIB)
        free, total = format_bytes(end.free_bytes), format_bytes(end.total_bytes)
        evidence.append(f"{free} of the host's {total} was free just before")
    if end.machine_oom_kills:
        evidence.append(
            f"the kernel killed {end.machine_oom_kills} process(es) of this machine meanwhile because memory "
            "ran out"
        )
    elif end.oom_kills is not None:
        evidence.append("the kernel killed no process of its control group because memory ran out")
    causes = (DeathCause.HOST_KILLED, DeathCause.NOT_MEMORY)
    cause, certainty = DeathCause.UNKNOWN, Certainty.UNKNOWN
    if end.machine_oom_kills or (is_short and end.oom_kills is None):
        cause, certainty = DeathCause.HOST_KILLED, Certainty.LIKELY
    elif end.oom_kills is not None and is_short is False:
        cause, certainty = DeathCause.NOT_MEMORY, Certainty.LIKELY
    diagnosis = _diagnosis(
        cause, certainty, evidence, memory="host", alternatives=[c for c in causes if c is not cause]
    )
    return dataclasses.replace(diagnosis, capture=capture_for(DeathCause.HOST_KILLED, "host"))


def _headroom(record: WatchRecord) -> list[str]:
    rank = record.fullest
    if rank is None or rank.least_headroom_bytes is None:
        return []
    return [f"the least free memory was {format_bytes(rank.least_headroom_bytes)}, on rank {rank.rank}"]


def _diagnose_rank(record: RankRecord) -> Diagnosis | None:
    """Return the diagnosis of a rank that ended with an error of memory, None for another. A leak is certain
    if the watch has raised an alarm of kind "creep" as well."""
    if record.end is None or not record.end.error:
        return None
    text = f"{record.end.error}: {record.end.message}"
    failure = next(iter(allocation_failures(text.splitlines())), None)
    if failure is None:
        on_device = _LIBRARY.search(text) or "OutOfMemory" in record.end.error  # torch's error for devices
        if on_device or record.end.error == "MemoryError":
            trained_on = record.start.device.partition(":")[0] if record.start is not None else HOST
            failure = AllocationFailure(device=trained_on if on_device else HOST, row=0, text=text)
        else:
            return None
    frames = record.end.frames
    diagnosis = _with_place(judge(failure, phase_of(frames), _log_of(record)), frames)
    if diagnosis.cause is DeathCause.LEAK and any(a.kind == "creep" for a in record.alarms):
        diagnosis = dataclasses.replace(diagnosis, certainty=Certainty.CERTAIN, alternatives=(), capture=())
    alarms = tuple(f"alarm at step {a.step}: {a.text}" for a in record.alarms if a.kind in _ALARMS)
    return dataclasses.replace(diagnosis, evidence=(*diagnosis.evidence, *alarms[-3:]))


_ALARMS: Final = ("creep", "maximum", "above-prediction", "fragmentation", "headroom", "retries")


def _log_of(record: RankRecord) -> TrainingLog:
    """Return what a log of the rank would tell: its steps, and the memory after each."""
    quantities = ("allocated_bytes", "heap_bytes", "host_bytes")  # of a device, of the C library, resident
    quantity = next((q for q in quantities if record.peak(q) is not None), quantities[-1])
    values = [(row, v) for row, s in enumerate(record.steps) if (v := getattr(s, quantity)) is not None]
    memory = NumberSeries(
        key=quantity,
        values=tuple(float(v) for _, v in values),
        rows=tuple(row for row, _ in values),
        has_unit=True,
    )
    return TrainingLog(
        last_step=max((s.step for s in record.steps), default=None),
        epochs=0,
        in_evaluation=False,
        progress_rows=tuple(range(len(record.steps))),
        memory=memory if values else None,
        samples=(),
        counts_each_step=True,
    )


def diagnose_run(reason: str, steps_done: int, *, message: str = "", device: str = HOST) -> Diagnosis:
    """Return why a run of memfit ran out of memory. ``reason``: what its worker reported. ``steps_done``:
    optimizer steps that it finished. ``message``: of the allocator, with the error's class; "" if unknown.
    ``device``: the kind on which the run trained; its memory ran out if torch's error for devices was raised,
    also where the message cannot be read."""
    kills = list(host_kills([reason]))
    if kills:
        return _diagnose_kill(kills[-1], None)
    failure = next(iter(allocation_failures([message or reason])), None)
    if failure is None:
        on = device if message.startswith("OutOfMemoryError") else HOST
        failure = AllocationFailure(device=on, row=0, text=message or reason)
    log = TrainingLog(
        last_step=steps_done,
        epochs=0,
        in_evaluation=False,
        progress_rows=(),
        memory=None,
        samples=(),
        counts_each_step=True,
    )
    return judge(failure, _phase_in(reason), log)


_RUN_PHASE: Final = re.compile(r"out of memory in (\w+) (?:of step|after) ")


def _phase_in(reason: str) -> PhaseOfDeath:
    """Return what ran when a run of memfit ran out of memory, by what its worker reported."""
    match = _RUN_PHASE.match(reason)
    name = match[1] if match is not None else ""
    if name == "evaluation":
        return PhaseOfDeath(name="forward", in_evaluation=True)
    return PhaseOfDeath(name={"setup": "build", "resume": "load", "between": ""}.get(name, name))


# -- several pieces of evidence ---------------------------------------------------------------------------

_GENERAL: Final = (
    DeathCause.UNKNOWN,
    DeathCause.NOT_MEMORY,
    DeathCause.LATE_GROWTH,
    DeathCause.TENSORS_TOO_LARGE,
)
_ORDER: Final = (Certainty.CERTAIN, Certainty.LIKELY, Certainty.UNKNOWN)


def combine(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """Return one diagnosis from ``diagnoses``, at least one, of the same training: the most certain and most
    specific, with the evidence of all. If two that are certain differ, the result is only likely, and its
    ``alternatives`` have the other cause unless that is a general one (`_GENERAL`)."""
    assert diagnoses
    ranked = sorted(
        diagnoses,
        key=lambda d: (
            d.cause is DeathCause.UNKNOWN,
            _ORDER.index(d.certainty),
            d.cause is DeathCause.NOT_MEMORY,
            d.cause in _GENERAL,
        ),
    )
    main, *others = ranked
    rivals = [
        d.cause for d in others if d.certainty is Certainty.CERTAIN and d.cause not in (main.cause, *_GENERAL)
    ]
    is_disputed = main.certainty is Certainty.CERTAIN and any(
        d.certainty is Certainty.CERTAIN and d.cause is not main.cause for d in others
    )
    alternatives = [a for a in (*rivals, *main.alternatives) if a is not main.cause]
    return dataclasses.replace(
        main,
        certainty=Certainty.LIKELY if is_disputed else main.certainty,
        alternatives=tuple(dict.fromkeys(alternatives)),
        evidence=tuple(dict.fromkeys(e for d in ranked for e in d.evidence)),
        memory=next((d.memory for d in ranked if d.memory), ""),
        phase=next((d.phase for d in ranked if d.phase), ""),
        line=next((d.line for d in ranked if d.line), ""),
        module=next((d.module for d in ranked if d.module), ""),
        figures={n: v for d in reversed(ranked) for n, v in d.figures.items()},
    )


def _diagnosis(
    cause: DeathCause,
    certainty: Certainty,
    evidence: Sequence[str],
    *,
    alternatives: Sequence[DeathCause] = (),
    memory: str = "",
    phase: str = "",
    line: str = "",
    figures: dict[str, int] | None = None,
) -> Diagnosis:
    return Diagnosis(
        cause=cause,
        certainty=certainty,
        evidence=tuple(evidence),
        alternatives=tuple(alternatives),
        memory=memory,
        phase=phase,
        line=line,
        figures=figures or {},
        advice=advice_for(cause, memory),
        capture=() if certainty is Certainty.CERTAIN else capture_for(cause, memory),
    )
