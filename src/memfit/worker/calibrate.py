"""Measure the time or memory of single operators in a separate process, where the allocator that counts bytes
counts nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from memfit.runtime.progress_events import tell
from memfit.types.result import Measurement, OutcomeKind


def main(path: Path) -> None:
    """Run the operators in the JSON file ``path`` and report results as events on standard output. If
    ``memory_only`` is true in the file, one event "workspace" per operator reports the memory that it takes
    inside. Otherwise one event "calibration" reports the times and peaks of all operators and, if ``rates``
    is true, the machine's rates, such as the speed of copies. The last event is "result", with the outcome
    OK. An error is raised, without a result."""
    import torch

    from memfit.runtime.devices import use_device
    from memfit.runtime.memory import peak_counter
    from memfit.runtime.op_benchmark import calibrate, workspaces

    request = json.loads(path.read_text())
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    for package in request["packages"]:
        __import__(package)  # registers the package's operators
    device = use_device(request["device"])
    counter = peak_counter(device)
    if request["memory_only"]:
        probes = workspaces(request["signatures"], timing_s=request["timing_s"], counter=counter)
        # Reported one by one, because the next one may crash this process.
        for index, (_, usage) in enumerate(probes):
            tell("workspace", index=index, usage=usage)
        tell("result", measurement=Measurement(outcome=OutcomeKind.OK))
        return
    result = calibrate(
        request["signatures"],
        timing_s=request["timing_s"],
        counter=counter,
        rates=request["rates"],
        device=device,
    )
    tell("calibration", calibration=result)
    tell("result", measurement=Measurement(outcome=OutcomeKind.OK))
