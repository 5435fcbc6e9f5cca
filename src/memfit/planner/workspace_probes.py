"""Probe kernel workspaces, memory that a kernel uses only while it runs, on this machine.

Operators that could move a plan's peak run once, alone, in a child process, on made-up tensors of their
shapes. The results are stored on disk, so that each operator is probed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import platformdirs
import torch

from memfit.cost.workspaces import bound_bytes, input_bytes, unprobed_signatures
from memfit.engines import native
from memfit.files.replace import write_whole
from memfit.planner.evaluate import Predictor
from memfit.runtime import local_machine
from memfit.runtime.child_process import start
from memfit.store.environment import digest, fingerprint
from memfit.techniques.rank_mesh import layout
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import OperatorRequest, RunSpec
from memfit.types.plan import Plan

_TIMING_S: Final = 2.0  # in which operators are begun, beside the start of the process
_LIMIT_S: Final = 60.0  # time limit of the process, for a busy machine
_MOST_FLOPS: Final = 10**11  # of one operator: about five seconds on two slow cores
_FREE_RATIO: Final = 0.25  # share of free memory that one operator may take
_ATTEMPTS: Final = 3  # an operator that kills the process is left out of the next attempt
_MOST_KEPT: Final = 50_000
_FILE_FACTS: Final = ("processor", "torch", "env ONEDNN_MAX_CPU_ISA", "env ATEN_CPU_CAPABILITY")

Workspace = tuple[int, int] | None
"""(bytes at the operator's own peak, bytes kept for backward); None: it cannot be run alone."""


def probe_workspaces(predictor: Predictor, plan: Plan) -> None:
    """Add to the calibration of ``predictor`` the workspaces of those operators of the plan that could move
    its peak.

    They are read from the results stored on disk; operators without a stored result are probed in a child
    process, and the results are stored. The calibration's number of threads becomes that of torch in this
    process. Workspaces that cannot be probed stay unknown; the upper end of the predicted peak then has an
    upper bound of them. Raises UserError if the plan cannot be traced.
    """
    predictor.recalibrate(dataclasses.replace(predictor.calibration, threads=torch.get_num_threads()))
    stored_probes = _StoredProbes.of(predictor.calibration.threads)
    for _ in range(_ATTEMPTS):
        signatures = _signatures_to_probe(predictor, plan)
        _add_to_calibration(
            predictor,
            {s: stored_probes.results[k] for s in signatures if (k := _key(s)) in stored_probes.results},
        )
        unknown_signatures = [
            s for s in _signatures_to_probe(predictor, plan) if _key(s) not in stored_probes.results
        ]
        results = _probe(unknown_signatures, predictor.calibration.threads)
        if not results:
            return
        stored_probes.add({_key(s): workspace for s, workspace in results.items()})


def _signatures_to_probe(predictor: Predictor, plan: Plan) -> list[str]:
    """Return the signatures of the plan's operators whose workspaces are not in the calibration and could
    move its peak, those of the first distinct rank first, and for each rank the largest effect first.
    Operators that are too large to be run are left out: more than 1e11 FLOPs, or more than a quarter of the
    free memory.
    """
    most_bytes = _FREE_RATIO * local_machine.free_bytes()
    signatures: dict[str, None] = {}
    for rank in layout(predictor.resolve(plan)).distinct_ranks():
        trace = predictor.trace(plan, rank)
        ops = {op.signature: op for op in trace.ops}
        for signature in unprobed_signatures(trace, predictor.calibration):
            bound = bound_bytes(signature, "cpu", predictor.calibration.threads)
            is_small = input_bytes(signature) + bound <= most_bytes
            if is_small and ops[signature].flops <= _MOST_FLOPS:
                signatures[signature] = None
    return list(signatures)


def _add_to_calibration(predictor: Predictor, workspaces: Mapping[str, Workspace]) -> None:
    peak_bytes = {s: t[0] for s, t in workspaces.items() if t}
    kept_bytes = {s: t[1] for s, t in workspaces.items() if t and t[1]}
    if peak_bytes:
        calibration = predictor.calibration
        predictor.recalibrate(
            dataclasses.replace(
                calibration,
                op_peak_bytes={**calibration.op_peak_bytes, **peak_bytes},
                op_kept_bytes={**calibration.op_kept_bytes, **kept_bytes},
            )
        )


def _probe(signatures: Sequence[str], threads: int) -> dict[str, Workspace]:
    """Return the workspaces of operators by their signature, as a child process measured them; empty if no
    process can be started. It begins operators for 2 seconds and is stopped after 60.

    The value is None for an operator that cannot run alone and for the one at which the process was killed.
    Operators that were not reached are absent.
    """
    if not signatures:
        return {}
    results: dict[str, Workspace] = {}

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "workspace":
            workspace = event["usage"]
            results[signatures[event["index"]]] = workspace and (workspace[0], workspace[1])

    spec = RunSpec(
        name="workspaces",
        role="calibration",
        job=JobRef(spec=""),
        plan=Plan(),
        seed=0,
        steps=0,
        threads=threads,
        timeout_s=_LIMIT_S,
    )
    namespaces = {json.loads(s)[0].split(".")[0] for s in signatures} - {"aten"}
    request = OperatorRequest(
        signatures=tuple(signatures),
        timing_s=_TIMING_S,
        packages=tuple(sorted(namespaces & sys.modules.keys())),
        memory_only=True,
    )
    with contextlib.suppress(OSError):  # if no process can be started, nothing is probed
        with start(native.render_calibration(spec), takes_input=True) as running:
            running.write_line(serialization.dumps(request))
            running.end_input()
            for event in running.events():
                listen(event)
        ending = running.measurement()
        crashed = ending.outcome.value == "failed" and len(results) < len(signatures)
        if crashed and (results or "killed by" in ending.reason):
            results[signatures[len(results)]] = None
    return results


@dataclasses.dataclass
class _StoredProbes:
    """Results of workspace probes (``results``), by key of the operator's signature, as stored in the file
    ``path``. There is one file for each processor, instruction set, torch version, use of oneDNN and number
    of threads.
    """

    path: Path
    results: dict[str, Workspace]

    @classmethod
    def of(cls, threads: int) -> _StoredProbes:
        facts = {name: value for name, value in fingerprint().items() if name in _FILE_FACTS}
        facts |= {"threads": str(threads), "simd": torch.backends.cpu.get_cpu_capability(), "format": "1"}
        facts["onednn"] = str(torch.backends.mkldnn.enabled)
        path = platformdirs.user_cache_path("memfit") / f"workspaces-{digest(facts)}.json"
        return cls(path, _read(path))

    def add(self, fresh: Mapping[str, Workspace]) -> None:
        """Add results to this object and to the file, which keeps the 50,000 that were added last.

        The file is replaced by renaming. If two processes add at once, the file stays valid; results of one
        that are lost are probed again later. If the file cannot be written, nothing is raised.
        """
        self.results |= fresh
        merged = [*{**_read(self.path), **self.results}.items()][-_MOST_KEPT:]
        # if the folder cannot be written, the operator is probed again next time
        with contextlib.suppress(UserError):
            write_whole(self.path, json.dumps(dict(merged)).encode(), durable=False, make_folder=True)


def _read(path: Path) -> dict[str, Workspace]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, IndexError):
        return {k: v and (int(v[0]), int(v[1])) for k, v in json.loads(path.read_text()).items()}
    return {}


def _key(signature: str) -> str:
    return hashlib.sha256(signature.encode()).hexdigest()[:20]
