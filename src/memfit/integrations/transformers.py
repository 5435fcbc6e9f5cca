"""A callback for Hugging Face's Trainer.

::

    trainer = Trainer(model=..., args=..., train_dataset=...)
    trainer.add_callback(MemfitCallback(trainer))
    trainer.train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from memfit.api import Prediction, from_trainer
from memfit.inputs import plan_of
from memfit.integrations.record import Recorder
from memfit.lint import to_plan
from memfit.lint.trainer_setup import setup_of_arguments
from memfit.types.errors import UserError
from memfit.types.plan import Plan


class MemfitCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that predicts the peak memory of the trainer's step when it is created, checks after the first
    update whether the plan was applied, and at the end of training writes the predicted and the measured peak
    to a file and prints them on rank 0. If the step cannot be predicted, the file says why.

    ``trainer``: the Trainer to which it is added. ``plan``: the plan that is checked, anything that
    `memfit.estimate` accepts as a plan; by default what `plan_of_arguments` returns. ``prediction``: an
    earlier prediction to use. Without it, the prediction is what `memfit.from_trainer` returns, whatever
    ``plan`` is; training on several ranks or with DeepSpeed is not predicted then, because that would take
    time on every rank. ``path``: the file; by default memfit.json in the output folder. For ranks other than
    0 its name has the rank before the suffix, as in memfit.1.json. ``strict``: if the plan was not applied,
    training stops with NotConforming, and no file is written; otherwise the file says so. ``blocks``: module
    path of the repeated blocks; by default memfit finds them. Raises UserError for a plan that cannot be
    read.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        plan: Any = None,
        prediction: Prediction | None = None,
        path: str | Path | None = None,
        strict: bool = True,
        blocks: str | None = None,
    ) -> None:
        args = trainer.args
        why_not = ""
        if prediction is None:
            try:
                if args.world_size > 1 or args.deepspeed_plugin is not None:
                    raise UserError(
                        "MemfitCallback itself does not predict a Trainer on several ranks or with DeepSpeed",
                        hint="pass a prediction: MemfitCallback(trainer, "
                        "prediction=memfit.from_trainer(trainer))",
                    )
                prediction = from_trainer(trainer)
            except UserError as error:
                why_not = str(error)
        self._path = Path(path) if path is not None else Path(args.output_dir) / "memfit.json"
        self._recorder = Recorder(
            plan=plan_of(plan) if plan is not None else plan_of_arguments(args),
            prediction=prediction,
            why_not=why_not,
            model=trainer.model,
            strict=strict,
            blocks=blocks,
            # DeepSpeed takes the norm from its own configuration
            clip=args.max_grad_norm if args.deepspeed_plugin is None else None,
        )
        if prediction is not None and args.process_index == 0:
            print(f"memfit: {prediction}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.step_begins(kwargs["model"], kwargs["optimizer"], args.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.updated()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.step_ends()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.write(self._path, args.process_index)
        if args.process_index == 0:
            print(self._recorder.line)


def plan_of_arguments(args: Any) -> Plan:
    """Return the plan that the TrainingArguments ``args`` express, with DeepSpeed's configuration if they use
    one, on the current number of ranks (``args.world_size``). Settings that no plan can express are ignored.
    Raises UserError as `memfit.lint.to_plan.convert` does."""
    return to_plan.convert(setup_of_arguments(args, ranks=args.world_size)).plan
