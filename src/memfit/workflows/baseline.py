"""Predict the memory of a project's jobs for its baseline file, and compare later predictions with it.

A prediction depends on the job, the plan, the named machine and the versions of memfit and torch alone:
nothing is measured on the machine that makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import linecache
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from memfit import catalog
from memfit.cost.device_overhead import with_workspaces
from memfit.cost.module_memory import Place, block_memory, largest_modules, module_memory
from memfit.files.replace import only_writer, write_whole
from memfit.inputs import on_ranks, plan_of
from memfit.jobs import huggingface
from memfit.jobs.registry import load
from memfit.planner.batch_memory import check_batch_memory
from memfit.planner.evaluate import Predictor
from memfit.report.baseline_drift import compare_baseline
from memfit.report.baseline_file import baseline_text, read_baseline
from memfit.techniques.base import JobFacts
from memfit.techniques.rank_mesh import SEVERAL
from memfit.techniques.registry import check
from memfit.trace.tracer import fake_model
from memfit.types.baseline import (
    PLAIN,
    ROOT,
    BaselineComparison,
    BaselineFile,
    BaselineTarget,
    MemoryBaseline,
)
from memfit.types.errors import UserError
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job, JobRef
from memfit.types.machine import Machine
from memfit.types.plan import Plan

MACHINE: Final = "H100-SXM"  # for which a baseline is predicted by default
_PACKAGES: Final = "/site-packages/"
_SOURCE: Final = Path(__file__).parents[2]  # the folder of memfit's package

# (number of finished predictions, number of all, the target that is predicted)
OnTarget = Callable[[int, int, BaselineTarget], None]


def write_baseline(
    path: Path, targets: Sequence[BaselineTarget], on_target: OnTarget
) -> tuple[MemoryBaseline, ...]:
    """Predict ``targets`` and store the predictions in the baseline file ``path``; other entries of the file
    stay. Without targets, predict all jobs of the file again. Return the predictions as stored.

    Raises UserError if the file is not a baseline or cannot be written, if there is nothing to predict, if a
    job, plan or machine cannot be loaded, and if the machine or job does not support the plan; then the file
    is not changed.
    """
    stored = read_baseline(path) if path.exists() or not targets else BaselineFile()
    targets = targets or stored.jobs
    if not targets:
        raise UserError(
            f"{path} has no jobs to predict again", hint="name the jobs: `memfit baseline write JOB`"
        )
    new = {p.key: shorten(p) for p in _predictions(targets, path.parent, on_target)}
    with only_writer(path):
        stored = read_baseline(path) if path.exists() else BaselineFile()  # as others have left it meanwhile
        entries = {entry.key: entry for entry in stored.jobs}
        _write(path, dataclasses.replace(stored, jobs=tuple((entries | new).values())))
    return tuple(new.values())


def check_baseline(path: Path, tolerance_ratio: float, on_target: OnTarget) -> tuple[BaselineComparison, ...]:
    """Predict all jobs of the baseline file ``path`` and return the comparisons with it, in the file's order
    (see `compare_baseline`). ``tolerance_ratio``: relative growth that is no drift. ``on_target``: called
    before each prediction. Raises UserError if the file does not exist, is not a baseline or has no jobs, if
    a job, plan or machine cannot be loaded, and if the machine or job does not support the plan."""
    stored = read_baseline(path)
    if not stored.jobs:
        raise UserError(
            f"{path} has no jobs" + (", only tests, which pytest compares" if stored.tests else ""),
            hint="`memfit baseline write JOB` adds one",
        )
    predictions = _predictions(stored.jobs, path.parent, on_target)
    return tuple(
        compare_baseline(entry, p, tolerance_ratio) for entry, p in zip(stored.jobs, predictions, strict=True)
    )


def write_test(path: Path, prediction: MemoryBaseline) -> None:
    """Store the prediction of a test, whose name is its ``job``, in the baseline file ``path``. It replaces
    the one of this name; other entries stay. Raises UserError if the file is not a baseline or cannot be
    written."""
    with only_writer(path):
        stored = read_baseline(path) if path.exists() else BaselineFile()
        others = tuple(entry for entry in stored.tests if entry.job != prediction.job)
        _write(path, dataclasses.replace(stored, tests=(*others, shorten(prediction))))


def _write(path: Path, baseline: BaselineFile) -> None:
    write_whole(path, baseline_text(baseline).encode())


def _predictions(
    targets: Sequence[BaselineTarget], folder: Path, on_target: OnTarget
) -> Iterator[MemoryBaseline]:
    for index, target in enumerate(targets):
        on_target(index, len(targets), target)
        machine = machine_named(_relative_path(target.machine, folder))
        ref = JobRef(
            spec=job_path(target, folder), size=target.size, batch=target.batch, length=target.length
        )
        check_batch_memory(ref)
        job = load(ref)
        plan = None if target.plan == PLAIN else _relative_path(target.plan, folder)
        yield predict(target, job, plan_on(plan, machine), machine, folder)


# -- targets --------------------------------------------------------------------------------------


def target_in(folder: Path, target: BaselineTarget) -> BaselineTarget:
    """Return ``target``, whose paths are relative to the current folder, with paths relative to ``folder``,
    and with the machine's name as the catalog spells it. Raises UserError for a name that is not in the
    catalog and for "this". A machine file (.toml) is not read."""
    machine = target.machine
    if not machine.endswith(".toml"):
        machine = machine_named(machine).name

    def move(path: str) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return dataclasses.replace(
        target,
        job=_with_path(target.job, Path(), move),
        plan=move(target.plan) if _is_path(target.plan) else target.plan,
        machine=move(machine) if _is_path(machine) else machine,
    )


def job_path(target: BaselineTarget, folder: Path) -> str:
    """Return the target's job with its path relative to the current folder instead of ``folder``."""
    return _with_path(target.job, folder, lambda path: os.path.relpath(folder / path))


def _relative_path(path_or_name: str, folder: Path) -> str:
    return os.path.relpath(folder / path_or_name) if _is_path(path_or_name) else path_or_name


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".toml"))


def _with_path(spec: str, folder: Path, move: Callable[[str], str]) -> str:
    """Return the job ``spec`` with ``move`` applied to its path: of FILE.py:NAME, and of hf:PATH if the text
    begins with a dot or slash or exists in ``folder``; else it is a name."""
    if spec.startswith(huggingface.PREFIX):
        path, mark, settings = spec.removeprefix(huggingface.PREFIX).partition("?")
        is_path = path.startswith((".", "/")) or (folder / path).exists()
        return f"{huggingface.PREFIX}{move(path) if is_path else path}{mark}{settings}"
    path, mark, name = spec.rpartition(":")
    return f"{move(path)}:{name}" if mark else spec


def machine_named(name: str) -> Machine:
    """Return the machine of the catalog or of a machine file (.toml) that has this name. Raises UserError for
    "this", because a baseline must be the same wherever it is predicted, for an unknown name, and for a
    machine file that cannot be used."""
    if name.partition(":")[0] == "this":
        raise UserError(
            f"a baseline cannot be for the machine {name}, which is another machine on each computer",
            allowed=f"a name of the catalog, such as {MACHINE} or 8xH100-SXM, or a machine file (.toml)",
            hint="`memfit list machines` lists the names",
        )
    return catalog.from_toml(name) if name.endswith(".toml") else catalog.machine(name)


def plan_on(plan: Any, machine: Machine) -> Plan:
    """Return the plan that ``plan`` means, as in `memfit.estimate`. If it has a technique for several ranks
    and no number of ranks, it gets one rank for each device of the machine. Raises UserError if it cannot be
    read, or if the machine or memfit does not support it."""
    resolved = plan_of(plan)
    if any(use.technique in SEVERAL for use in resolved.uses):
        resolved = plan_of(on_ranks(plan, machine.device_count))
    return check(resolved, machine)


# -- one prediction -------------------------------------------------------------------------------


@pause_gc()
def predict(target: BaselineTarget, job: Job, plan: Plan, machine: Machine, folder: Path) -> MemoryBaseline:
    """Return the prediction for ``target``, which is ``job`` under ``plan`` on ``machine``, with the rows of
    all modules. Paths of lines are relative to ``folder``. Raises UserError if the model does not support the
    plan."""
    facts = JobFacts(batch_size=job.batch_size, block_count=0, vocabulary=0, device_kind=machine.device.kind)
    predictor = Predictor(job=job, machine=machine, job_facts=facts, lines=True)
    estimate = predictor.whole(plan)
    trace = with_workspaces(predictor.trace(plan, estimate.rank), machine.device)
    model = fake_model(job)
    fold, place = _fold_of(model), _place_in(folder)
    paths = module_memory(trace, lambda path: path or ROOT, place)
    reserved = estimate.reserved_bytes
    return MemoryBaseline(
        **{f.name: getattr(target, f.name) for f in dataclasses.fields(BaselineTarget)},
        plan_label=plan.label,
        memfit=_version(),
        torch=torch.__version__.partition("+")[0],
        parameter_count=sum(p.numel() for p in model.parameters()),
        allocated_bytes=int(estimate.allocated_bytes.value),
        reserved_bytes=None if reserved is None else int(reserved.value),
        peak_phase=estimate.peak_phase,
        phase_bytes=dict(estimate.phase_peak_bytes),
        category_bytes=dict(sorted(estimate.at_peak_bytes.items())),
        modules=module_memory(trace, fold, place),
        blocks=block_memory(paths, fold, int(estimate.allocated_bytes.value)),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("memfit")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def shorten(prediction: MemoryBaseline) -> MemoryBaseline:
    """Return the prediction as it is stored: of the rows of modules, only those of the large ones stay."""
    rows = largest_modules(prediction.modules, prediction.allocated_bytes)
    return dataclasses.replace(prediction, modules=rows)


def _fold_of(model: torch.nn.Module) -> Callable[[str], str]:
    """Return a function from the path of a module to its name in a baseline. The number of a block becomes a
    star if all modules of its list are of one class and have modules inside: ``layers.*.mlp``."""
    lists = set[str]()
    for path, module in model.named_modules():
        children = list(module.children())
        are_alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if are_alike and all(any(True for _ in child.children()) for child in children):
            lists.add(path)

    @functools.cache
    def fold(path: str) -> str:
        parts = path.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts))]
        names = ("*" if n.isdigit() and p in lists else n for n, p in zip(parts, prefixes, strict=True))
        return ".".join(names) or ROOT

    return fold


def _place_in(folder: Path) -> Place:
    """Return a function from a file and a line in it ("model.py:12") to ("src/model.py:12", text of the
    line). Its path is relative to ``folder``, or to where packages are installed, so that it is the same on
    other computers; of other files it is the name."""
    root = folder.resolve()
    linecache.checkcache()  # files may have changed since they were read

    def place(file: str, line: str) -> tuple[str, str]:
        number = int(line.rpartition(":")[2])
        path = Path(file).resolve()
        if _PACKAGES in file:
            shown = file.rpartition(_PACKAGES)[2]
        elif path.is_relative_to(_SOURCE / "memfit"):
            shown = path.relative_to(_SOURCE).as_posix()
        else:
            shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        return f"{shown}:{number}", linecache.getline(file, number).strip()

    return functools.cache(place)
