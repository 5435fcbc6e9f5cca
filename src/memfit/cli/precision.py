"""``memfit estimate JOB --precision``: measure which modules must stay in float32."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Final

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JobOptions
from memfit.cli.output import check_choice, console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import print_workload
from memfit.types.device_kind import CUDA, device_kinds

_DTYPES: Final = ("bf16", "fp16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionOptions:
    """The half precisions to try, the number of batches to measure, the number of training steps before that,
    and the kind of device to advise for."""

    precision: Annotated[
        str | None,
        typer.Option(
            metavar="bf16|fp16|both",
            help="For a JOB: instead of its memory, show which modules must stay in float32, and the error "
            "that they would cause in half precision: bf16 (bfloat16), fp16 (float16) or both, each by "
            "itself. The code of each module runs in half precision and in float64 on real activations and "
            "gradients. Of the other options, only --batches, --after, --device, those that change the job "
            "(--size, --data, --weights, --steps, --batch, --length, --dim), --lang and --json can be given "
            "with it.",
        ),
    ] = None
    batches: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="With --precision: number of training batches on which modules are measured, with only a "
            "few samples of each. Default: 1. Another number is refused without --precision.",
        ),
    ] = 1
    after: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --precision: number of training steps in float32, on a few samples each, before the "
            "modules are measured: untrained weights hide many errors. 0: measure at once. Default: 40. "
            "Another number is refused without --precision.",
        ),
    ] = 40
    device: Annotated[
        str,
        typer.Option(
            metavar="cuda|cpu",
            help="With --precision: kind of device for which to advise, cuda (GPUs; the default) or cpu: "
            "torch.autocast keeps other operators in float32 on GPUs than on CPUs. The measurement itself "
            "runs on the CPU. cpu is refused without --precision.",
        ),
    ] = CUDA


def print_precision(job: JobOptions, options: PrecisionOptions, *, lang: str, as_json: bool) -> None:
    """Print which modules must stay in float32, and the error they would cause in half precision. Raises
    UserError for an unknown --precision or --device, for a job that cannot be loaded, if the batch of a
    built-in job is too large for this machine, and if the loss is not finite in float32.

    The code of each module runs in half precision and in float64 on real activations and gradients. The
    recorded results of its child modules are used instead of running these, so that an error is attributed to
    the module that causes it."""
    dtype = check_choice("--precision", options.precision or "", (*_DTYPES, "both"))
    device = check_choice("--device", options.device, [k.name for k in device_kinds() if k.checked])
    quiet_libraries()
    from memfit.jobs.registry import load
    from memfit.planner.workload import stored_workload
    from memfit.precision.advise import advise
    from memfit.report.precision_terminal import print_advice

    loaded_job = load(job.ref)
    workload = stored_workload(job.ref, loaded_job)
    with Bars(lang) as progress:
        results = advise(
            loaded_job,
            _DTYPES if dtype == "both" else (dtype,),
            batches=options.batches,
            trained=options.after,
            device=device,
            progress=lambda stage, done, total: progress(f"precision-{stage}", done, total, ""),
        )
    if as_json:
        emit({"workload": workload, "advice": results})
        return
    print_workload(workload, lang)
    for advice in results:
        print_advice(advice, console=console(), lang=lang)
