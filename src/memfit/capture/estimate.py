"""Predict the memory of a training script by running it unmodified, in a child process, up to its first
steps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from memfit.capture.program import load_program
from memfit.capture.result import PlanSearch, ScriptAnswer, ScriptSpec
from memfit.capture.sandbox import remove_created
from memfit.files.temporary import temporary_folder
from memfit.runtime.child_process import CHILD_ENV, dying_with_parent
from memfit.types.errors import UserError
from memfit.types.serialization import dumps, loads

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SHOWN_LINES = 6  # of the script's output, in an error
_ROOT = str(Path(__file__).parents[2])  # memfit may lie in a folder that is on this process's path only


def estimate_script(
    command: Sequence[str],
    *,
    machine: str = "this",
    bound: int | float | Mapping[str, int | float] | None = None,
    search: PlanSearch | None = None,
    probe: bool = True,
    limit_s: float = 1800.0,
    show_output: bool = False,
    whole_trace: bool = False,
) -> ScriptAnswer:
    """Run the script of ``command`` in a child process, on fake parameters, until every optimizer has made
    two updates (`UpdateCycle`), and return the prediction for these steps on ``machine``. Nothing is trained.
    If the script ends after its first optimizer step, the prediction is for that one, and a note says so.

    If a step depends on values that are assumed, the script is run twice more, with lower and with higher
    values, and the interval covers those of these cases that run through. ``limit_s``: seconds after which a
    run is ended if its steps are not traced by then. ``show_output``: whether the output of the first run is
    shown, on standard error. The other arguments are as in `ScriptSpec`. Raises UserError as `load_program`
    does, if the script ends before its first optimizer step, and if it raises an error, dies or reaches
    ``limit_s`` before its second.
    """
    spec = ScriptSpec(
        command=tuple(command),
        machine=machine,
        bound=dict(bound) if isinstance(bound, Mapping) else bound,
        search=search,
        probe=probe,
        whole_trace=whole_trace,
    )
    answer = _answer(spec, limit_s, show_output=show_output)
    if answer.trace is None or not answer.trace.assumed:
        return answer
    return _with_other_cases(answer, dataclasses.replace(spec, search=None, probe=False), limit_s)


def _with_other_cases(answer: ScriptAnswer, spec: ScriptSpec, limit_s: float) -> ScriptAnswer:
    """Return the answer with its interval widened to the peaks under other assumed values, in two more runs
    of the script, and with a note on them, as for a job (`value_guess_retry.cover_assumed_cases`). A run that
    fails is left out: some values are impossible."""
    from memfit.cost.estimate import widened  # imports torch

    assert answer.estimate is not None and answer.trace is not None
    peak, peaks = answer.estimate.allocated_bytes, list[float]()
    for case in ("low", "high"):
        with contextlib.suppress(UserError):
            other = _answer(dataclasses.replace(spec, case=case), limit_s, show_output=False)
            peaks += [other.estimate.allocated_bytes.value] if other.estimate is not None else []
    low, high = (limit(peak.value, *peaks) / peak.value for limit in (min, max))
    note = (
        f"values at {' and '.join(answer.trace.assumed)} were assumed; the interval covers the peaks of "
        f"{len(peaks)} other cases"
    )
    estimate = widened(answer.estimate, low=peak.low * low, high=peak.high * high)
    return dataclasses.replace(answer, estimate=estimate, notes=(*answer.notes, note))


def _answer(spec: ScriptSpec, limit_s: float, *, show_output: bool) -> ScriptAnswer:
    """Return the answer of a child process that runs the script of ``spec``, and remove what the script has
    made. Raises UserError as `load_program` does, if the process ends without an answer or after
    ``limit_s``, and if the answer has a problem."""
    program = load_program(spec.command)
    with temporary_folder("memfit-script-") as folder:
        spec = dataclasses.replace(spec, answer=str(folder / "answer.json"), scratch=str(folder / "files"))
        Path(spec.scratch).mkdir()
        output = folder / "output.txt"
        try:
            how_it_ended = _run(spec, folder, output, limit_s, show_output=show_output)
        finally:
            remove_created(Path(spec.scratch))
        answer_file = Path(spec.answer)
        if not answer_file.exists():
            raise UserError(
                f"{program.name} {how_it_ended} before its second optimizer step{_last_lines(output)}",
                hint="--time-limit gives it more time" if how_it_ended.startswith("was ended") else "",
            )
        answer = loads(ScriptAnswer, answer_file.read_text(), what="the answer of the script's process")
        if answer.problem:
            raise UserError(f"{program.name}: {answer.problem}{_last_lines(output)}", hint=answer.hint)
        return answer


def traced_file(spec: ScriptSpec) -> Path:
    """Return the path of the empty file that the script's process makes when the steps are traced."""
    return Path(f"{spec.answer}.traced")


def _run(spec: ScriptSpec, folder: Path, output: Path, limit_s: float, *, show_output: bool) -> str:
    """Run the child process, and return how it ended, such as "was killed by signal 9". After ``limit_s``,
    kill it, unless its steps are traced; then wait for its prediction."""
    spec_file = folder / "spec.json"
    spec_file.write_text(dumps(spec))
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _ROOT)))
    with contextlib.ExitStack() as stack:
        sink = sys.stderr if show_output else stack.enter_context(output.open("wb"))
        process = subprocess.Popen(
            dying_with_parent([sys.executable, "-P", "-m", "memfit.capture", str(spec_file)]),
            env={**os.environ, **CHILD_ENV, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            if not traced_file(spec).exists():
                return f"was ended after {limit_s:g} s,"
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _last_lines(output: Path) -> str:
    """Return the last six lines of the script's output (at most 600 characters) as the end of an error's
    text; "" if there are none, or if the output was shown."""
    with contextlib.suppress(OSError):
        text = COLOURS.sub("", output.read_text(errors="replace"))
        lines = [" ".join(line.split()) for line in text.splitlines()]
        if lines := [line for line in lines if line][-_SHOWN_LINES:]:
            return f"; the end of its output: {' | '.join(lines)[-600:]}"
    return ""
