"""Time operators on this machine in a worker process, which is kept from one measurement to the next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Final

from memfit.engines import native
from memfit.runtime.child_process import Event, RunningChild, start
from memfit.types import serialization
from memfit.types.errors import RunError
from memfit.types.job import JobRef
from memfit.types.launch import OperatorRequest, RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan

_LIMIT_S: Final = 900.0  # of one measurement on a busy machine; it is short by itself


class OperatorTimer:
    """Measures operators on this machine, on a device of the kind ``device`` ("cpu", "cuda") and with
    ``threads`` threads. ``job`` names the process. The process starts at the first measurement, unless
    `start` has started it before, and serves all later ones until `close`: importing torch takes a second."""

    def __init__(self, *, job: JobRef, device: str, threads: int) -> None:
        self._spec = RunSpec(
            name="calibration",
            role="calibration",
            job=job,
            plan=Plan(),
            seed=0,
            steps=0,
            device=device,
            threads=threads,
            timeout_s=_LIMIT_S,
        )
        self._context = contextlib.ExitStack()
        self._running: tuple[RunningChild, Iterator[Event]] | None = None

    def measure(self, signatures: Sequence[str], timing_s: float, rates: bool) -> Calibration:
        """Measure the operators with these signatures, in the given order, and with ``rates`` also the
        machine's rates of computing and copying. No operator is begun after ``timing_s`` seconds. The process
        is stopped after 900 seconds. Raises RunError if it ends without a result."""
        request = OperatorRequest(
            signatures=tuple(signatures),
            timing_s=timing_s,
            packages=("bitsandbytes",) if any('"bitsandbytes.' in s for s in signatures) else (),
            rates=rates,
        )
        running, events = self._send(request)
        for event in events:
            if event["event"] == "calibration":
                text = json.dumps(event["calibration"])
                return serialization.loads(Calibration, text, what="calibration")
        self.close()
        ending = running.measurement()
        raise RunError(
            "the calibration of this machine, in which operators are timed, ended without a result: "
            f"{ending.reason or ending.outcome.value}"
        )

    def start(self) -> None:
        """Start the process unless it runs, so that it has imported torch when the first measurement comes.
        Raises OSError if no process can be started."""
        self._started()

    def _started(self) -> tuple[RunningChild, Iterator[Event]]:
        if self._running is None:
            config = native.render_calibration(self._spec)
            running = self._context.enter_context(start(config, takes_input=True))
            self._running = running, running.events()
        return self._running

    def _send(self, request: OperatorRequest) -> tuple[RunningChild, Iterator[Event]]:
        """Send the request to the process, which is started if it does not run, and return the process and
        the events that follow."""
        line = serialization.dumps(request)
        try:
            self._started()[0].write_line(line)
        except OSError:  # it has died since the last measurement
            self.close()
            with contextlib.suppress(OSError):  # it ends without a result
                self._started()[0].write_line(line)
        return self._started()

    def close(self) -> None:
        """End the process. A later measurement starts another one."""
        self._running = None
        self._context.close()
