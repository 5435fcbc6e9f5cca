"""Measure the time or memory of single operators in a separate process, where the allocator that counts bytes
counts nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from memfit.runtime.progress_events import tell
from memfit.types import serialization
from memfit.types.launch import OperatorRequest
from memfit.types.result import Measurement, OutcomeKind


def main(path: Path) -> None:
    """Measure the operators of each request that is a line of standard input, and report results as events on
    standard output. For a request of memory only, one event "workspace" per operator reports the memory that
    it takes inside. Otherwise one event "calibration" reports the times and peaks of all operators and, if
    asked for, the machine's rates. The last event is "result", with the outcome OK. An error is raised,
    without a result. The JSON file ``path`` has the number of threads and the kind of device."""
    import torch

    from memfit.runtime.devices import use_device
    from memfit.runtime.memory import peak_counter
    from memfit.runtime.op_benchmark import calibrate, workspaces

    settings = json.loads(path.read_text())
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = use_device(settings["device"])
    counter = peak_counter(device)
    for line in sys.stdin:
        request = serialization.loads(OperatorRequest, line, what="request")
        for package in request.packages:
            __import__(package)  # registers the package's operators
        if request.memory_only:
            probes = workspaces(request.signatures, timing_s=request.timing_s, counter=counter)
            # Reported one by one, because the next one may crash this process.
            for index, (_, usage) in enumerate(probes):
                tell("workspace", index=index, usage=usage)
            continue
        result = calibrate(
            request.signatures,
            timing_s=request.timing_s,
            counter=counter,
            rates=request.rates,
            device=device,
        )
        tell("calibration", calibration=result)
    tell("result", measurement=Measurement(outcome=OutcomeKind.OK))
