"""How much memory a script's evaluation needs that comes after the traced steps.

A fork of the script's process goes on with the script. The loader of the training gives it no further
batches, so that it soon gets to what follows an epoch. Training steps on the way, such as that with a batch
which was loaded before, compute no gradients: autograd does not run in a fork.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.source_location import user_line

_LIMIT_S = 10.0  # from the fork on
_MOST_EPOCHS = 256  # without batches: the script waits for one
_MOST_STEPS = 64  # forward passes of a training without a loader


class Evaluation:
    """The fork that looks for an evaluation, as its parent sees it. ``result`` may be called once."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid, self._pipe = pid, pipe
        self._end_s = time.monotonic() + _LIMIT_S

    def result(self) -> tuple[int, str]:
        """Wait for the end of the fork, until at most 10 s after its begin, and end it. Return the peak of
        live bytes in the script's evaluations and the place where the evaluation with this peak begins, such
        as "train.py:12"; (0, "") if none was over by then."""
        text = b""
        while select.select([self._pipe], [], [], max(0.0, self._end_s - time.monotonic()))[0]:
            part = os.read(self._pipe, 4096)
            if not part:
                break
            text += part
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        results = [line.split(" ", 1) for line in text.decode(errors="replace").split("\n")[:-1]]
        return max(((int(size), place) for size, place in results), default=(0, ""))


class EvaluationSearch:
    """The state of the fork: what `ScriptTrace` asks and tells while the script goes on. Each peak is written
    to ``pipe`` when its evaluation is over. The other arguments are as in `fork_search`."""

    def __init__(
        self,
        recorder: AllocationRecorder,
        region: Callable[[], contextlib.AbstractContextManager[None]],
        loader: Any,
        params: Sequence[torch.Tensor],
        pipe: int,
    ) -> None:
        self._recorder, self._region, self._loader, self._params = recorder, region, loader, params
        self._pipe = pipe
        self._epochs = self._steps = 0
        self._place = ""  # where the evaluation began that runs

    def skips(self, loader: Any) -> bool:
        """Return whether ``loader`` is the training's, which gives no further batches. If it is, the
        evaluation that ran is over, and after 256 such calls the process ends."""
        if loader is None or loader is not self._loader:
            return False
        self.write()
        self._epochs += 1
        if self._epochs > _MOST_EPOCHS:
            self.end()
        return True

    def note_forward(self, module: torch.nn.Module) -> bool:
        """Note that the outermost module ``module`` is about to run. Return whether that is a training step,
        which must then compute no gradients; after 64 of these the process ends. Anything else begins an
        evaluation, unless one runs already."""
        is_trained = any(p.requires_grad for p in module.parameters())
        if torch.is_grad_enabled() and module.training and is_trained:
            self.write()
            self._steps += 1
            if self._steps > _MOST_STEPS:
                self.end()
            return True
        if not self._place:
            self._recorder.restart()
            self._place = user_line() or "its code"
        return False

    def make_gradients(self) -> None:
        """Stands for a backward pass: let the parameters that had gradients have some again."""
        with self._region():
            for param in self._params:
                if param.grad is None:
                    param.grad = torch.empty_like(param)

    def end(self) -> NoReturn:
        """Write the peak of the evaluation that runs, and end the process."""
        self.write()
        os._exit(0)

    def write(self) -> None:
        """Write the peak of the evaluation that has run, if any."""
        if self._place:
            os.write(self._pipe, f"{self._recorder.restart()} {self._place}\n".encode())
            self._place = ""


def fork_search(
    recorder: AllocationRecorder,
    region: Callable[[], contextlib.AbstractContextManager[None]],
    loader: Any,
    params: Sequence[torch.Tensor],
) -> Evaluation | EvaluationSearch:
    """Fork this process. Return an `Evaluation` in this process, and in the fork, which is to go on with the
    script, an `EvaluationSearch`. The fork prints nothing, and ends itself after 8 s. ``region``: makes the
    context in which tensors are fake and recorded. ``loader``: that of the training, or None. ``params``:
    those that have gradients after a backward pass."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Evaluation(pid, reading)
    os.close(reading)
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    torch.set_num_threads(1)  # the other threads are not there
    evaluations = EvaluationSearch(recorder, region, loader, params, writing)
    signal.signal(signal.SIGALRM, lambda *_: evaluations.end())
    signal.setitimer(signal.ITIMER_REAL, 0.8 * _LIMIT_S)
    return evaluations
