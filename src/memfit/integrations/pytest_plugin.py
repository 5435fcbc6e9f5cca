"""A plugin for pytest: the fixture ``memfit_memory`` fails a test when the predicted memory of a training
step grew since it was stored; ``pytest --memfit-update`` stores it.

::

    def test_memory(memfit_memory):
        memfit_memory(Model(), batch, loss=functional.cross_entropy, optimizer="adamw")

pytest loads this module at every start, so torch and the rest of memfit are imported when the fixture is
called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memfit.types.baseline import MemoryBaseline

_OPTION = "--memfit-update"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--memfit-update``."""
    parser.getgroup("memfit").addoption(
        _OPTION,
        action="store_true",
        dest="memfit_update",
        help="store the memory that the fixture memfit_memory predicts in memfit-baseline.toml beside each "
        "test file, instead of comparing it with what is stored there",
    )


@pytest.fixture
def memfit_memory(request: pytest.FixtureRequest) -> Callable[..., MemoryBaseline]:
    """Return the function ``memfit_memory``. It predicts the memory of a training step, and fails the test if
    that grew since it was stored in memfit-baseline.toml beside the test file; the failure names the modules
    and lines that grew. Nothing is trained, and no GPU is needed.

    ``memfit_memory(model, batch, loss=..., optimizer=..., plan=..., machine="H100-SXM", name=None,
    tolerance=0.02)``: the first six are as in `memfit.estimate`, but "this" is refused as machine. ``name``:
    under which the prediction is stored; by default the test's own. ``tolerance``: relative growth that
    passes (0.02 is 2 %), of each phase, of each module that holds at least 1 % of the peak, and of reserved
    memory, of which 20 MiB pass in any case. Returns the prediction. Raises UserError if the step cannot be
    predicted. Fails the test also if memfit-baseline.toml cannot be read or written, if nothing is stored for
    it, if what is stored is for another plan or machine, and if two calls use the same name. With
    ``pytest --memfit-update`` it stores the prediction and compares nothing; that fails under ``pytest -n``.
    """
    names = set[str]()

    def compare(
        model: Any,
        batch: Any = None,
        loss: Any = None,
        optimizer: Any = None,
        plan: Any = None,
        machine: str = "H100-SXM",
        *,
        name: str | None = None,
        tolerance: float = 0.02,
    ) -> MemoryBaseline:
        __tracebackhide__ = True
        test = name or "::".join((request.path.name, *request.node.nodeid.split("::")[1:]))
        if test in names:
            pytest.fail(f"memfit_memory is called twice for {test}: give each call its own name=", False)
        names.add(test)
        prediction = _prediction(test, (model, batch, loss, optimizer), plan, machine, request)
        updates = request.config.getoption("memfit_update")
        if updates and hasattr(request.config, "workerinput"):
            pytest.fail(f"{_OPTION} writes one file: run pytest without -n", pytrace=False)
        from memfit.types.errors import UserError

        try:
            _store(prediction, request) if updates else _compare(prediction, request, tolerance)
        except UserError as error:
            pytest.fail(str(error), pytrace=False)
        return prediction

    return compare


def _path(request: pytest.FixtureRequest) -> Any:
    from memfit.report.baseline_file import FILE

    return request.path.with_name(FILE)


def _prediction(
    test: str, step: tuple[Any, Any, Any, Any], plan: Any, machine: str, request: pytest.FixtureRequest
) -> MemoryBaseline:
    from memfit.inputs import job_of
    from memfit.types.baseline import BaselineTarget
    from memfit.workflows.baseline import machine_named, plan_on, predict

    model, batch, loss, optimizer = step
    target_machine = machine_named(machine)
    resolved_plan = plan_on(plan, target_machine)
    target = BaselineTarget(job=test, plan=resolved_plan.label, machine=target_machine.name)
    job = job_of(model, batch, loss=loss, optimizer=optimizer)
    return predict(target, job, resolved_plan, target_machine, request.path.parent)


def _store(prediction: MemoryBaseline, request: pytest.FixtureRequest) -> None:
    from memfit.workflows.baseline import write_test

    write_test(_path(request), prediction)


def _compare(prediction: MemoryBaseline, request: pytest.FixtureRequest, tolerance: float) -> None:
    """Fail the test if the prediction grew by more than ``tolerance``, a ratio (see `compare_baseline`), or
    if none is stored for this test, plan and machine. Otherwise print the notes of the comparison. Raises
    UserError as `read_baseline` does."""
    __tracebackhide__ = True
    from memfit.report.baseline_drift import compare_baseline, drift_text
    from memfit.report.baseline_file import read_baseline

    path = _path(request)
    entries = read_baseline(path).tests if path.exists() else ()
    stored = {entry.job: entry for entry in entries}.get(prediction.job)
    if stored is None:
        pytest.fail(f"{path} has no memory stored for {prediction.job}: {_to_store(request)}", pytrace=False)
    if stored.key != prediction.key:
        pytest.fail(
            f"the memory of {prediction.job} is stored for {stored.plan}, {stored.machine}, but the test "
            f"predicts it for {prediction.plan}, {prediction.machine}: {_to_store(request)}",
            pytrace=False,
        )
    comparison = compare_baseline(stored, prediction, tolerance)
    if comparison.drifts:
        lines = [
            f"the predicted memory of {comparison.title} grew",
            *(f"  {drift_text(drift)}" for drift in comparison.drifts),
            *(f"  {note}" for note in comparison.notes),
            f"if this is intended: {_to_store(request)}",
        ]
        pytest.fail("\n".join(lines), pytrace=False)
    for note in comparison.notes:
        print(f"memfit: {comparison.title}: {note}")


def _to_store(request: pytest.FixtureRequest) -> str:
    return f"`pytest {request.node.nodeid} {_OPTION}` stores it"
