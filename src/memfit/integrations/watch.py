"""Callbacks that watch a training of Hugging Face's Trainer or of Lightning's, as `memfit.watch` does.

::

    trainer.add_callback(TrainerWatch(trainer))             # Hugging Face
    Trainer(callbacks=[LightningWatch(file="run.jsonl")])   # Lightning

A loop with Accelerate needs no callback: ``with memfit.watch(logger=accelerator): ...``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memfit.monitoring.watch import TrainingWatch


class _TrainerHooks:
    """Callback that watches each step of a Hugging Face Trainer on this rank, as `memfit.watch` does. The
    loss of a step is that on which ``backward`` is called: of the last micro-batch, divided by the number of
    micro-batches.

    ``trainer``: the Trainer to which it is added. ``file``: by default run.jsonl in its output folder.
    ``logger``: by default the writer of the Trainer's TensorBoard callback; without one, the active runs of
    W&B and MLflow in this process. Other arguments are those of `memfit.watch`. Raises UserError for wrong
    arguments.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        file: str | Path | None = None,
        prediction: Any = None,
        limits: Any = None,
        on_alarm: Callable[[Any], object] | None = None,
        logger: Any = None,
    ) -> None:
        self._trainer, self._logger = trainer, logger
        self._new_watch = functools.partial(
            TrainingWatch,
            file=file if file is not None else Path(trainer.args.output_dir) / "run.jsonl",
            prediction=prediction,
            limits=limits,
            on_alarm=on_alarm,
        )
        self._new_watch()  # checks the arguments
        self._watch: TrainingWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._watch is not None:  # of a training that failed, which the Trainer tells no callback
            self._watch.close()
        callbacks = self._trainer.callback_handler.callbacks
        writers = (getattr(callback, "tb_writer", None) for callback in callbacks)  # TensorBoard's
        logger = next((w for w in (self._logger, *writers) if w is not None), None)
        self._watch = self._new_watch(more.get("model"), False, logger=logger)
        self._watch.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._watch is not None:
            self._watch.step(step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._watch is not None:
            self._watch.close()


class _LightningHooks:
    """Callback that watches each optimizer step of Lightning's Trainer on this rank, as `memfit.watch` does.
    The loss of a step is that of the last micro-batch, which Lightning has divided by
    ``accumulate_grad_batches`` in automatic optimization.

    ``file``: by default run.jsonl in the Trainer's ``default_root_dir``. ``logger``: by default the Trainer's
    logger. Other arguments are those of `memfit.watch`. Raises UserError for wrong arguments at the start of
    the training.
    """

    def __init__(
        self,
        *,
        file: str | Path | None = None,
        prediction: Any = None,
        limits: Any = None,
        on_alarm: Callable[[Any], object] | None = None,
        logger: Any = None,
    ) -> None:
        self._file, self._logger = file, logger
        self._new_watch = functools.partial(
            TrainingWatch, prediction=prediction, limits=limits, on_alarm=on_alarm
        )
        self._watch: TrainingWatch | None = None
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        file = self._file if self._file is not None else Path(trainer.default_root_dir) / "run.jsonl"
        logger = self._logger if self._logger is not None else trainer.logger
        self._step = trainer.global_step
        self._watch = self._new_watch(pl_module, False, file=file, logger=logger)
        self._watch.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *more: Any) -> None:
        if self._watch is not None and trainer.global_step != self._step:
            self._step = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self._watch.step(step=self._step, loss=loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._watch is not None:
            self._watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.close(exception)


@functools.cache
def _trainer_watch() -> type:
    """Return the class TrainerWatch, always the same one. The first call imports transformers."""
    from transformers import TrainerCallback

    class TrainerWatch(_TrainerHooks, TrainerCallback):  # type: ignore[misc]
        __doc__ = _TrainerHooks.__doc__

    return TrainerWatch


@functools.cache
def _lightning_watch() -> type:
    """Return the class LightningWatch, always the same one. The first call imports Lightning."""
    from lightning.pytorch.callbacks import Callback

    class LightningWatch(_LightningHooks, Callback):  # type: ignore[misc]
        __doc__ = _LightningHooks.__doc__

    return LightningWatch


def __getattr__(name: str) -> Any:
    if name == "TrainerWatch":
        return _trainer_watch()
    if name == "LightningWatch":
        return _lightning_watch()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
