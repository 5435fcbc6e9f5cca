"""Hand what was measured to the logger that a training uses already. None is imported or started here."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

_PERIOD_S: Final = 1.0
_PREFIX: Final = "memfit/"
Log = Callable[[Mapping[str, float], int], object]  # takes values by name, and the step


class Loggers:
    """Writes values to a logger, if the caller asks `is_due` first, once a second at most.

    ``logger``: TensorBoard's SummaryWriter, a logger of Lightning, a run of W&B, an Accelerator, or a
    function of a mapping and the step. Without one, the active runs of W&B and MLflow in this process are
    used, if there are any."""

    def __init__(self, logger: Any = None) -> None:
        self._log = None if logger is None else _log_of(logger)
        self._next_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether the last write was a second ago or more."""
        return time.monotonic() >= self._next_s

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Write the values that are not None, with "memfit/" before their names."""
        self._next_s = time.monotonic() + _PERIOD_S
        named = {f"{_PREFIX}{name}": v for name, v in values.items() if v is not None}
        for log in [self._log] if self._log is not None else _active():
            log(named, step)


def _log_of(logger: Any) -> Log:
    if hasattr(logger, "add_scalar"):  # TensorBoard
        return lambda values, step: [logger.add_scalar(name, v, step) for name, v in values.items()]
    if hasattr(logger, "log_metrics"):  # Lightning
        return lambda values, step: logger.log_metrics(dict(values), step)
    if hasattr(logger, "log"):
        if "commit" in inspect.signature(logger.log).parameters:
            return _log_to_wandb(logger)
        return lambda values, step: logger.log(dict(values), step=step)  # Accelerate
    return logger  # type: ignore[no-any-return]


def _log_to_wandb(run: Any) -> Log:
    # Without a commit, the values join those that the training logs next, and its steps keep their numbers.
    return lambda values, step: run.log(dict(values), commit=False)


def _active() -> list[Log]:
    logs: list[Log] = []
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    if getattr(wandb, "run", None) is not None:
        logs.append(_log_to_wandb(wandb.run))  # type: ignore[union-attr]
    if mlflow is not None and mlflow.active_run() is not None:
        logs.append(lambda values, step: mlflow.log_metrics(dict(values), step=step, synchronous=False))
    return logs
