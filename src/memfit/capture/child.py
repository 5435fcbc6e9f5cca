"""The process that runs a user's script on fake parameters, traces its first steps and predicts their memory.

``python -m memfit.capture SPEC.json`` reads a `ScriptSpec` and writes a `ScriptAnswer` to the file that
it names. The process ends as soon as the steps are traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import runpy
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memfit.capture.batch_sizes import ALIKE_RATIO
from memfit.capture.device_redirect import DeviceRedirect, device_patches
from memfit.capture.estimate import COLOURS, traced_file
from memfit.capture.evaluation import Evaluation, EvaluationSearch, fork_search
from memfit.capture.kept_memory import peak_growth_bytes
from memfit.capture.program import load_program
from memfit.capture.result import PlanSearch, ScriptAnswer, ScriptSpec
from memfit.capture.sandbox import Sandbox, sandboxed
from memfit.capture.script_patches import script_patches
from memfit.capture.script_ranks import ScriptRanks, script_ranks
from memfit.capture.script_trace import LoopMode, ScriptTrace
from memfit.capture.update_cycle import UpdateCycle, params_of
from memfit.cost.estimate import peak_with_batch, widened
from memfit.inputs import machine_of
from memfit.jobs.optimizer_groups import PlanOptimizer
from memfit.jobs.registry import add_job
from memfit.model.tensors import tensor_leaves
from memfit.planner.evaluate import Predictor
from memfit.planner.parallelism_grid import DIVIDING_TECHNIQUES
from memfit.planner.request import Request
from memfit.planner.search import search
from memfit.planner.workspace_probes import probe_workspaces
from memfit.report.explain import traced_estimate
from memfit.techniques.base import JobFacts
from memfit.techniques.optimizers import innermost
from memfit.techniques.registry import make_use
from memfit.trace.assumed_values import AssumedCase, assume_case
from memfit.trace.fake_process_group import own_groups_set_aside
from memfit.trace.sample_dependence import remember_dependence, sample_dependence
from memfit.trace.tracer import fake_patches, recording_patches
from memfit.types.dependence import DependenceCause, DependenceKind
from memfit.types.errors import MemfitError, UserError, first_line
from memfit.types.gc_pause import collect_as_usual
from memfit.types.job import Job, JobRef
from memfit.types.machine import Machine
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate, Interval
from memfit.types.serialization import dumps, loads
from memfit.types.trace import Category, Trace
from memfit.types.units import format_bytes

# Dispatch modes belong to a thread: what other threads send to a device would not be seen.
_ONE_THREAD = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
_THREAD_LIMIT_S = 10.0
# Its plan names operators by their order in the script's step, which an edit of the script changes.
_NOT_FOR_SCRIPTS = ("optimal-checkpointing",)
_IMPOSSIBLE = (DependenceCause.WEIGHTS, DependenceCause.SIZE)  # to divide such a batch is wrong or fails
_SPARSE_ERROR = 0.15  # of the peak of steps with sparse gradients: the largest of three scripts was 0.11
_ADAM_RATIO = 2.0  # bytes of optimizer state by those of parameters
_LINE_SEARCH_GRADIENTS = 3  # those of both ends of its bracket, and the last one while the next is made
_NODE_BYTES = 512  # of a node of autograd's graph, in host memory
_MOST_LINES = 3
_RANK_NAME = re.compile(r"raised KeyError\b.*'(LOCAL_RANK|RANK|WORLD_SIZE|LOCAL_WORLD_SIZE)'")
_PACKAGE = str(Path(__file__).parents[1])


class _Session:
    """The run of one script that is predicted: its `ScriptSpec`, its trace, and the writing of the
    `ScriptAnswer`, after which the process ends."""

    def __init__(self, spec: ScriptSpec) -> None:
        self.spec = spec
        self.program = load_program(spec.command)
        self.machine = machine_of(spec.machine)
        self.trace = ScriptTrace(self.machine.device.trace_kind, bound=spec.bound, on_traced=self.end)
        self.redirect: DeviceRedirect | None = None
        self.ranks: ScriptRanks | None = None
        self.sandbox: Sandbox | None = None
        self.notes: list[str] = []
        self.thread_problem = ""  # what ended a thread of the script
        self.largest_batch_ratio = 1.0  # as in `Job`
        self.stack = contextlib.ExitStack()

    def run(self) -> NoReturn:
        """Run the script until its steps are traced; write the answer and end the process."""
        hint = ""
        try:
            self._set_arguments()
            collect_as_usual()
            threading.excepthook = self._note_thread
            with self.stack:
                self._patch()
                if self.program.module:
                    runpy.run_module(self.program.module, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(self.program.script, run_name="__main__")
            _await_threads()
            problem = self.thread_problem or "the script ended"
        except SystemExit as ending:
            said = f"code {ending.code}" if isinstance(ending.code, int) else str(ending.code)
            problem = f"the script ended with {said}" if ending.code else "the script ended"
        except BaseException as error:  # noqa: BLE001  whatever the script raises is told in one line
            problem = self._describe(error)
            if isinstance(error, UserError):
                hint = "; ".join(filter(None, (error.allowed and f"allowed: {error.allowed}", error.hint)))
        self.fail(problem, hint)

    def _note_thread(self, failure: Any) -> None:
        self.thread_problem = (
            f"{self._describe(failure.exc_value)}, in a thread that the script started; memfit follows only "
            "the main one"
        )

    def _set_arguments(self) -> None:
        program = self.program
        sys.argv = [program.script or program.module, *program.arguments]
        sys.dont_write_bytecode = True
        os.environ.update({**_ONE_THREAD, **program.environment})
        # As for python itself, the folder of a script, or for a module the current one, comes first.
        sys.path.insert(0, str(Path(program.script).resolve().parent if program.script else Path.cwd()))

    def end(self, *, goes_on: bool = True) -> None:
        """Predict the traced steps, search plans if they are asked for, write the answer and end the process.
        ``goes_on``: whether a fork of the process goes on with the script, to look for an evaluation
        (`evaluation`). Only in that fork, this returns. With values assumed low or high, there is none."""
        with _disable_current_modes():
            self._leave()
            traced_file(self.spec).touch()
            forked = self._fork() if goes_on and self.spec.case == "usual" else None
            if isinstance(forked, EvaluationSearch):
                self.trace.evaluation = forked
                return
            answer = self._answer()
            if forked is not None:
                answer = self._with_evaluation(answer, *forked.result())
            if self.spec.search is not None:
                self._unpatch()
                answer = self._with_plans(answer, self.spec.search)
            self._write(answer)

    def _fork(self) -> Evaluation | EvaluationSearch:
        trace = self.trace
        forked = fork_search(
            trace.recorder, trace.region, trace.batches.loader, trace.parameters_with_gradients()
        )
        if isinstance(forked, EvaluationSearch) and self.sandbox is not None:
            self.sandbox.active = True
        return forked

    def _with_evaluation(self, answer: ScriptAnswer, peak_bytes: int, place: str) -> ScriptAnswer:
        """Return the answer with ``peak_bytes``, the peak of an evaluation that begins at ``place``, and with
        a note on it, if that is more than the upper end of a step's peak; otherwise unchanged."""
        if answer.estimate is None or peak_bytes <= answer.estimate.allocated_bytes.high:
            return answer
        note = (
            f"the evaluation at {place} needs about {format_bytes(peak_bytes)}, more than a training "
            "step; a smaller batch there needs less"
        )
        return dataclasses.replace(answer, evaluation_bytes=peak_bytes, notes=(*answer.notes, note))

    def _patch(self) -> None:
        enter = self.stack.enter_context
        enter(fake_patches(self.trace.fake))
        enter(recording_patches(self.trace.recorder))
        self.sandbox = enter(sandboxed(Path(self.spec.scratch)))
        enter(script_patches(self.trace))
        enter(LoopMode(self.trace))
        self.redirect = enter(device_patches(self.trace, self.machine))
        self.ranks = enter(script_ranks(self.trace, self.redirect, self.program.ranks))

    def _unpatch(self) -> None:
        """Undo the patches of torch, although the script has not returned."""
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        with contextlib.suppress(Exception):  # a mode is left that was popped just now
            self.stack.close()
        torch.set_grad_enabled(True)

    def _with_plans(self, answer: ScriptAnswer, plan_search: PlanSearch) -> ScriptAnswer:
        """Return the answer with plans for the script's step, or, in ``no_plans``, with the reason why there
        are none."""
        name, trace = self.program.name, self.trace
        try:
            if len(trace.cycle.optimizers) > 1:
                raise UserError(
                    f"no plan can be searched for {name}: more than one optimizer makes updates in its step",
                    hint="if each has a model of its own, apply a plan to each by memfit.apply(plan, model, "
                    "optimizer), and predict the script again; if they share one model, give the parameters "
                    "to the groups of one optimizer",
                )
            if trace.trains_loose:
                raise UserError(
                    f"no plan can be searched for {name}: its optimizer trains tensors that are in no module",
                    hint="make them parameters (torch.nn.Parameter) of a torch.nn.Module",
                )
            cap_bytes = plan_search.cap_bytes or int(self.machine.device.memory_bytes.value)
            if answer.before_training_bytes > cap_bytes:
                needed_before = format_bytes(answer.before_training_bytes)
                raise UserError(
                    f"no plan lets {name} fit {format_bytes(cap_bytes)}: before its first training step, "
                    f"where plans change nothing, it needs {needed_before}"
                )
            if answer.shared_bytes:
                cap_bytes = max(1, cap_bytes - answer.shared_bytes)
            if answer.ranks > 1:
                _check_ranks(name, answer.ranks, trace, self.machine)
            (optimizer,) = trace.cycle.optimizers.values()
            job = trace.calls.job(
                name,
                optimizer,
                trace.accumulated * answer.ranks,
                clip=trace.clip,
                workers=trace.workers,
                other_bytes=trace.other_bytes,
            )
            if trace.calls.is_later:
                note = (
                    "plans run what the step calls before the trained model, such as a teacher, for each "
                    "micro-batch, too: in a loop with memfit.apply it belongs inside fit.split"
                )
                answer = dataclasses.replace(answer, notes=(*answer.notes, note))
            job = dataclasses.replace(job, largest_batch_ratio=self.largest_batch_ratio)
            add_job(name, job)
            without = (*_NOT_FOR_SCRIPTS, *plan_search.without)
            own = Plan()
            if trace.accumulated > 1:
                own = own.with_use(make_use("gradient-accumulation", {"micro_batches": trace.accumulated}))
            request = Request(
                job_ref=JobRef(spec=name),
                machine=self.machine,
                threads=torch.get_num_threads(),  # as in the estimate, since workspaces depend on them
                bounds=Bounds(without=without),
                within_s=plan_search.within_s,
                cap_bytes=cap_bytes if answer.shared_bytes else plan_search.cap_bytes,
                own=dataclasses.replace(answer.estimate, plan=own)
                if answer.estimate is not None and answer.ranks == 1
                else None,
                goal=plan_search.goal,
                accuracy=plan_search.accuracy,
            )
            with own_groups_set_aside():
                if answer.ranks > 1 and _divides_dependent_samples(job):
                    bounds = Bounds(without=(*without, *DIVIDING_TECHNIQUES))
                    request = dataclasses.replace(request, bounds=bounds)
                planning = search(request, lambda *progress: None)
        except MemfitError as error:
            _print_traceback(error)
            return dataclasses.replace(answer, no_plans=str(error))
        return dataclasses.replace(answer, plans=planning.result, batch_size=job.batch_size)

    def _answer(self) -> ScriptAnswer:
        trace = self.trace
        if trace.is_host and trace.foreign_bytes:
            self.notes.append(
                f"{format_bytes(trace.foreign_bytes)} of weights are mapped from files, as safetensors does; "
                "they are no memory that torch allocates, and are not in the peak"
            )
        job = Job(
            name=self.program.name,
            build_model=_not_built,
            make_batch=_not_built,
            loss=_not_built,
            batch_size=1,
            workers=trace.workers,
        )
        if not trace.cycle.created:
            self.notes.append(
                "the script makes no optimizer of torch: two forward and backward passes are predicted"
            )
        assert self.ranks is not None
        assert self.redirect is not None
        pinned = (make_use("activation-offload", {"to": "host"}),) if self.redirect.pins else ()
        plan = Plan(uses=(*self.ranks.uses, *pinned), ranks=self.ranks.count)
        predictor = Predictor(
            job=job,
            machine=self.machine,
            job_facts=JobFacts(
                batch_size=1, block_count=0, vocabulary=0, device_kind=trace.recorder.kind.name
            ),
            traces={(plan, 0): trace.finish(plan.ranks)},
        )
        if self.spec.probe and self.machine.is_here and self.machine.device.is_host:
            probe_workspaces(predictor, plan)
        # the script's own ranks split no batch that it does not split anyway
        estimate = dataclasses.replace(predictor.whole(plan), dependence=None)
        if self.machine.device.is_host:
            estimate = _with_late_collective(estimate, predictor.trace(plan))
        estimate = self._with_other_batches(self._with_sparse_rows(estimate))
        estimate = self._with_untraced_updates(estimate, trace.cycle)
        estimate = self._with_later_iterations(estimate, trace.cycle.optimizers.values())
        if trace.setup_peak_bytes > estimate.allocated_bytes.high:
            self.notes.append(
                f"before its first training step, the script needs {format_bytes(trace.setup_peak_bytes)}, "
                "more than a training step: it evaluates the model, or builds it"
            )
        growth_bytes = self._note_growth(trace, peak_growth_bytes(predictor.trace(plan)))
        shared_bytes = self._note_shared_batches(trace) if trace.is_host else 0
        estimate = _with_shared_batches(estimate, shared_bytes)
        explained = traced_estimate(estimate, predictor.trace(plan, estimate.rank), predictor.calibration)
        full_trace = explained.trace
        if not self.spec.whole_trace:
            live = full_trace.live_at(explained.peak_clock)
            full_trace = dataclasses.replace(full_trace, allocations=live, ops=())
        return ScriptAnswer(
            program=self.program.name,
            estimate=explained.estimate,
            trace=full_trace,
            peak_clock=explained.peak_clock,
            model=type(trace.model).__name__ if trace.model is not None else "",
            optimizers=_names(trace.cycle.optimizers.values()),
            steps=trace.cycle.count,
            micro_batches=trace.accumulated,
            ranks=plan.ranks,
            notes=tuple(dict.fromkeys(self.notes)),
            before_training_bytes=trace.setup_peak_bytes,
            shared_bytes=shared_bytes,
            growth_bytes=growth_bytes,
        )

    def _note_growth(self, trace: ScriptTrace, peak_bytes: int) -> int:
        """Add a note on what the script collects from step to step. Return the bytes by which its need of
        device memory grows with each step, at least; 0 if it collects nothing there. ``peak_bytes``: bytes
        by which the peak of the traced steps grows with each step."""
        kept = trace.kept
        if kept is None or not kept.grows:
            return 0
        rates = kept.rates()
        lines = [line for line, _ in rates.most_common(_MOST_LINES) if line] or kept.holders[:_MOST_LINES]
        parts = [format_bytes(rates.total())] if rates else []
        if kept.nodes:
            parts.append(
                f"{kept.nodes} nodes of autograd's graph (some {format_bytes(kept.nodes * _NODE_BYTES)})"
            )
        places = ", ".join(Path(line).name for line in lines) or "no line of yours"
        if peak_bytes > rates.total():
            parts.append(f"the peak of a step by {format_bytes(peak_bytes)}, since steps compute with it")
        self.notes.append(
            f"memory grows with each step, by at least {' and '.join(parts)}: what {places} makes is kept "
            "after its step. If a loss or an output is collected, collect loss.item() or "
            "output.detach().cpu(); the prediction is that of the first steps"
        )
        return max(rates.total(), peak_bytes)

    def _note_shared_batches(self, trace: ScriptTrace) -> int:
        """Return the bytes of shared memory that the batches of worker processes take, and add a note on it;
        0 without workers. Torch's allocator does not make this memory, and none of it is in the trace."""
        count, batch_bytes = trace.batches.shared()
        if count * batch_bytes:
            self.notes.append(
                f"batches of {trace.workers} worker processes lie in shared memory: up to {count} of "
                f"{format_bytes(batch_bytes)}, {format_bytes(count * batch_bytes)} in all; they are in the "
                "memory that the script needs, not in the peak of tensors that torch allocates"
            )
        return count * batch_bytes

    def _with_untraced_updates(self, estimate: Estimate, cycle: UpdateCycle) -> Estimate:
        """Return the estimate with its upper end raised by what later updates may need: of optimizers that
        made no update or only one in the traced steps, and of a training that may follow. Add a note on
        each."""
        states = [(o, _state_bytes(o)) for o in cycle.optimizers.values()]
        params_bytes = sum(_bytes(params_of(o)) for o, _ in states)
        ratio = sum(size for _, size in states) / params_bytes if params_bytes else 0.0
        more_bytes = 0.0
        if len(cycle.optimizers) > 1:
            for optimizer in cycle.once():
                more_bytes += _state_bytes(optimizer)
                self.notes.append(f"{_optimizer_text(optimizer)} made one update only in the traced steps")
        passes = (Category.ACTIVATION, Category.TEMPORARY)
        passes_bytes = sum(estimate.at_peak_bytes.get(str(category), 0) for category in passes)
        if cycle.later:
            more_bytes += max(0.0, _ADAM_RATIO - ratio) * params_bytes + passes_bytes
            self.notes.append(
                f"the script may train again at {cycle.later}, after its first {cycle.count} updates: what "
                "that training needs is not known, and the upper end of the peak is a guess"
            )
        for optimizer in cycle.awaited():
            more_bytes += (1 + max(ratio, _ADAM_RATIO)) * _bytes(params_of(optimizer)) + passes_bytes
            self.notes.append(
                f"{_optimizer_text(optimizer)} made no update in the first {cycle.count} of the script: what "
                "its step needs is not known, and the upper end of the peak is a guess"
            )
        return widened(estimate, high=estimate.allocated_bytes.high + more_bytes)

    def _with_later_iterations(self, estimate: Estimate, optimizers: Iterable[Any]) -> Estimate:
        """Return the estimate with its upper end raised by the gradients that line searches of LBFGS may keep
        in later steps. Add notes on these and on its history, which still grows."""
        more_bytes = 0
        for optimizer in (o for o in optimizers if isinstance(o, torch.optim.LBFGS)):
            if growth := _history_growth(optimizer):
                self.notes.append(f"LBFGS keeps more directions in later steps: {format_bytes(growth)} more")
            if optimizer.param_groups[0]["line_search_fn"]:
                more_bytes += _LINE_SEARCH_GRADIENTS * _bytes(params_of(optimizer))
                self.notes.append(
                    f"a line search of LBFGS may keep up to {_LINE_SEARCH_GRADIENTS} gradients more than the "
                    "traced step, which the upper end of the peak includes"
                )
        return widened(estimate, high=estimate.allocated_bytes.high + more_bytes)

    def _with_sparse_rows(self, estimate: Estimate) -> Estimate:
        """Return the estimate; if the step makes sparse gradients, with its interval widened by 15 % to both
        sides and with a note: their number of rows is only estimated."""
        if not self.trace.recorder.sparse_seen:
            return estimate
        self.notes.append(
            "the step makes sparse gradients, whose rows are estimated only: the true peak may differ by "
            f"{_SPARSE_ERROR:.0%}"
        )
        peak_bytes = estimate.allocated_bytes.value
        return widened(estimate, low=peak_bytes * (1 - _SPARSE_ERROR), high=peak_bytes * (1 + _SPARSE_ERROR))

    def _with_other_batches(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its interval widened to other batches: from a loader, down to one of
        median size and up to the largest; made by the script's loop, up to the largest. If the batches differ
        by less than 2 %, the estimate is unchanged. If the largest is not in the prediction, or a later one
        may be larger, add a note and set ``largest_batch_ratio``. Note, too, if not all could be compared.
        """
        batches = self.trace.batches
        typical, most, count = batches.ratios()
        if batches.problem:
            self.notes.append(f"not all batches could be compared in size: {batches.problem}")
        if batches.loop_ratio > ALIKE_RATIO:
            self.notes.append(
                f"batches that the script's loop makes differ in size: the largest of the first "
                f"{len(batches.step_bytes) - 1} steps is in the prediction, and a later one may be larger"
            )
            self.largest_batch_ratio = batches.loop_ratio
            largest_bytes = max(step.total() for step in batches.step_bytes)
            return widened(estimate, high=peak_with_batch(estimate, batches.loop_ratio, largest_bytes))
        if most < ALIKE_RATIO and typical * ALIKE_RATIO > 1:
            return estimate
        typical_bytes = peak_with_batch(estimate, typical, batches.traced_bytes)
        most_bytes = peak_with_batch(estimate, most, batches.traced_bytes)
        if most >= ALIKE_RATIO:
            self.largest_batch_ratio = most
            self.notes.append(
                f"batches of the script differ in size: of {count} in an epoch, the largest is {most:.2f} "
                "times as large as those of the traced steps; the peak with it is about "
                f"{format_bytes(most_bytes)}"
            )
        return widened(estimate, low=max(0.0, typical_bytes), high=most_bytes)

    def fail(self, problem: str, hint: str = "") -> NoReturn:
        if self.trace.evaluation is not None:
            self.trace.evaluation.end()
        self._leave()
        steps = self.trace.cycle.count
        has_ended = problem.startswith("the script ended")
        if self.trace.begun and (steps > 1 or (steps and has_ended)):
            if steps == 1:
                self.notes.append("the script made 1 optimizer step only: a later one may need more memory")
            elif not has_ended:
                self.notes.append(f"{problem}, after {steps} optimizer steps; these are predicted")
            self.end(goes_on=False)
        if problem.startswith("the script raised EOFError"):
            hint = "the script reads its standard input, which is empty here: give what it asks as arguments"
        if _RANK_NAME.search(problem):
            hint = (
                "the script reads what its launcher sets: put that before it, as in `torchrun "
                f"--nproc-per-node 2 {self.program.name}`, and as many devices after --on"
            )
        if has_ended and (assumptions := self.trace.recorder.guesses.assumptions):
            hint = (
                f"it may have ended by a value that is assumed: {'; '.join([*assumptions][:_MOST_LINES])}. "
                "--bound FILE.py:LINE=N gives the true one"
            )
        if not self.trace.begun and problem == "the script ended":
            hint = (
                "no backward pass and update of a module's parameters, or of tensors that an optimizer of "
                "torch.optim holds, was seen: give other tensors to such an optimizer"
            )
        before = (
            "before its first forward pass with gradients"
            if not self.trace.begun
            else ("before its first optimizer step" if not steps else "before its second optimizer step")
        )
        self._write(
            ScriptAnswer(
                program=self.program.name, problem=f"{problem}, {before}", hint=hint, notes=tuple(self.notes)
            )
        )

    def _leave(self) -> None:
        """End the sandbox, so that this process can write to any file, and add its notes to ``notes``. Add a
        note if the script names an accelerator, but the prediction is for a CPU."""
        if self.sandbox is not None and self.sandbox.active:
            self.sandbox.active = False
            self.notes += self.sandbox.notes()
        if self.redirect is not None and self.trace.is_host and self.redirect.redirected:
            self.notes.append(
                f"the script trains on {', '.join(self.redirect.redirected)}, but the prediction is for a "
                "CPU: name the device with --on, such as --on H100-SXM"
            )

    def _write(self, answer: ScriptAnswer) -> NoReturn:
        draft = Path(f"{self.spec.answer}.draft")
        draft.write_text(dumps(answer))
        draft.replace(self.spec.answer)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _describe(self, error: BaseException) -> str:
        """Return a line that says what the script raised, and where in the user's code. Of a UserError, it
        has neither what is allowed nor the hint."""
        _print_traceback(error)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_PACKAGE)]
        own = [f for f in frames if "/lib/python" not in f.filename and not f.filename.startswith("<")]
        place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        if isinstance(error, UserError):
            return f"{COLOURS.sub('', error.given)}{place}"
        text = COLOURS.sub("", first_line(error))
        return f"the script raised {type(error).__name__}{place}: {text[:300]}"


def _history_growth(optimizer: torch.optim.LBFGS) -> int:
    """Return the bytes by which the history of LBFGS still grows until it is full. Each entry has two vectors
    of the size of the parameters."""
    params = optimizer.param_groups[0]["params"]
    vector_bytes = sum(p.numel() * p.element_size() for p in params)
    pairs = len(optimizer.state[params[0]].get("old_dirs") or [])
    return int(2 * vector_bytes * (optimizer.param_groups[0]["history_size"] - pairs))


def _with_shared_batches(estimate: Estimate, shared_bytes: int) -> Estimate:
    """Return the estimate with batches in shared memory added to its host memory, as a part of "workers";
    unchanged if host memory is not predicted."""
    need, parts = estimate.host_bytes, estimate.host_parts_bytes
    if need is None or not shared_bytes:
        return estimate
    need = Interval(
        value=need.value + shared_bytes, low=need.low + shared_bytes, high=need.high + shared_bytes
    )
    parts = {**parts, "workers": parts.get("workers", 0) + shared_bytes}
    return dataclasses.replace(estimate, host_bytes=need, host_parts_bytes=parts)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _state_bytes(optimizer: Any) -> int:
    return _bytes(tensor_leaves([optimizer.state.get(p, {}) for p in params_of(optimizer)]))


def _check_ranks(name: str, ranks: int, trace: ScriptTrace, machine: Machine) -> None:
    """Raise UserError if no plans can be searched for the ``ranks`` processes of the script ``name``: if they
    share the model, or if ``machine`` has another number of devices."""
    if trace.shards_model:
        raise UserError(
            f"no plan can be searched for {name}: its {ranks} processes share its model already",
            hint="leave out what distributes the model, such as fully_shard: plans do this, too",
        )
    devices = machine.device_count
    if devices != ranks:
        raise UserError(
            f"no plan can be searched for {name}: it has {ranks} processes, but the machine has {devices} "
            f"device{'s' * (devices != 1)}",
            hint=f"name a machine with {ranks}, as in --on {ranks}x{machine.device.name}",
        )


def _divides_dependent_samples(job: Job) -> bool:
    """Return whether the samples of the batch of ``job``, the step of a script on several ranks, depend on
    each other, as those of BatchNorm's statistics do. Then data-parallel ranks count as no change, because
    the script divides its batch over its ranks itself. Ranks that share samples would be one."""
    dependence = sample_dependence(job)
    if dependence.kind is not DependenceKind.DEPENDENT or dependence.cause in _IMPOSSIBLE:
        return False
    remember_dependence(job, dataclasses.replace(dependence, across_ranks=False))
    return True


def _names(optimizers: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the classes of ``optimizers``, each once; of a `PlanOptimizer`, which
    `memfit.apply` makes, those of the optimizers inside it."""
    single = [i for o in optimizers for i in (innermost(o) if isinstance(o, PlanOptimizer) else [o])]
    return tuple(dict.fromkeys(type(o).__name__ for o in single))


def _optimizer_text(optimizer: Any) -> str:
    parameters = sum(p.numel() for p in params_of(optimizer))
    return f"{type(optimizer).__name__} of {parameters:,} parameters"


def _with_late_collective(estimate: Estimate, trace: Trace) -> Estimate:
    """Return the estimate of a rank with the largest collective's tensors added to the upper end of its peak:
    gloo ends collectives on its own threads, and may hold their memory until the next one."""
    late_bytes = max((op.moved_bytes for op in trace.ops if op.group), default=0)
    allocated = estimate.allocated_bytes
    return dataclasses.replace(
        estimate, allocated_bytes=dataclasses.replace(allocated, high=allocated.high + late_bytes)
    )


def _print_traceback(error: BaseException) -> None:
    if os.environ.get("MEMFIT_TRACEBACK"):
        traceback.print_exception(error)


def _await_threads() -> None:
    """Wait for the threads that the script started, as Python does at its end, but at most 10 s for each:
    those of a pool wait for work."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(_THREAD_LIMIT_S)


def _not_built(*arguments: Any) -> Any:
    raise AssertionError("the model of a script is not built again")


def main(path: Path) -> NoReturn:
    """Run the script of the `ScriptSpec` in the file ``path`` (JSON), and end the process."""
    spec = loads(ScriptSpec, path.read_text())
    with assume_case(AssumedCase(spec.case)):
        _Session(spec).run()
