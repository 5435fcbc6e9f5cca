"""``memfit plan JOB --from FILE``: predict and lint an existing set-up, and show better plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfit.cli.lint import findings_view, print_findings
from memfit.cli.options import JobOptions, RuntimeOptions, SearchOptions
from memfit.cli.output import console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import machine_of, print_workload_of, request
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.units import format_seconds

if TYPE_CHECKING:
    import memfit.lint.check
    import memfit.lint.draft
    import memfit.lint.models
    import memfit.planner.request
    import memfit.types.result
    import memfit.workflows.config_review


def review_files(
    files: Sequence[Path],
    job: JobOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    on: str,
    *,
    lang: str,
    as_json: bool,
) -> tuple[Plan, bool]:
    """Predict and lint the set-up in ``files``, find better plans, and print all of this. Return (the plan of
    the set-up; False if neither it nor a better plan fits, otherwise True, also if nothing was checked, as on
    a CPU without --memory). ``on``: the machine to predict for, as in --on; ``as_json``: print one JSON
    object instead of text in ``lang``. If the files do not say how many processes train, and the machine has
    several devices, it is one process per device. The engine that predicts is that of --engine or, without
    it, that of the files, or native if that one does not support the plan or the model. Raises UserError for
    files that `memfit.lint.parse.read` refuses, for OpenFold's settings with another job than alphafold2, for
    a plan that the job or the engine of --engine does not support, for a job that cannot be built, for a
    model of the files that no job builds if none is named, for a batch that cannot be split over the plan's
    ranks and micro-batches, and for invalid options."""
    from memfit.lint import check, draft, parse, to_plan
    from memfit.lint.clipping import clipping_setting

    setup = parse.read(files)
    count = machine_of(on, runtime.place).device_count
    if setup.ranks is None and count > 1:
        setup = dataclasses.replace(setup, ranks=count)
    converted = to_plan.convert(setup)
    if converted.plan.ranks > count:
        note = draft.LeftOut(
            option=f"{converted.plan.ranks} processes on {count} devices",
            reason="predicted as if each process had its own device",
        )
        converted = dataclasses.replace(converted, left_out=(*converted.left_out, note))
    job, converted = _with_job_of_model(*_with_openfold_job(converted, job))
    job_request, size, converted = _with_batch_and_length(converted, job, search_options, runtime, on)
    job_request, converted = _with_clipping(job_request, converted, clipping_setting(setup).limit)
    if converted.ema is not None:
        job_request = dataclasses.replace(
            job_request, job_ref=dataclasses.replace(job_request.job_ref, ema=converted.ema)
        )
    job_request, converted = _with_engine(job_request, converted, search_options.engine)
    from memfit.workflows import config_review

    findings = check.check(dataclasses.replace(setup, parameters=size.parameter_count), lang=lang)
    workload = print_workload_of(job_request, lang=lang, quiet=as_json)
    if not as_json:  # printed before the prediction, which may fail because the plan is impossible
        _print_conversion(converted, lang)
        print_findings(findings, lang=lang)
    with Bars(lang) as progress:
        result = config_review.find_alternatives(
            job_request, converted.plan, progress, parameters=size.parameter_count
        )
    if as_json:
        of_job = {"clip": job_request.job_ref.clip or None, "ema": job_request.job_ref.ema}
        emit({"workload": workload, **of_job, **_view(converted, findings, result)})
    else:
        _print(result, lang)
    return converted.plan, not result.nothing_fits


def _leave_out(
    converted: memfit.lint.draft.Conversion, option: str, reason: str
) -> memfit.lint.draft.Conversion:
    from memfit.lint.draft import LeftOut

    note = LeftOut(option=option, reason=reason)
    return dataclasses.replace(converted, left_out=(*converted.left_out, note))


def _with_openfold_job(
    converted: memfit.lint.draft.Conversion, job: JobOptions
) -> tuple[memfit.lint.draft.Conversion, JobOptions]:
    """Return ``converted`` and ``job``. If the files are OpenFold's, and thus describe the built-in job
    alphafold2 with some number of residues in a sample (the crop), the job options get its name and size, but
    keep --size and --length if the user gave them. If these differ from the files' size or number of
    residues, ``converted`` lists that as left out. With other files, both are returned unchanged. Raises
    UserError if the files are OpenFold's and the user named another job."""
    from memfit.lint.openfold import JOB

    if not converted.size:
        return converted, job
    if job.job not in (None, JOB):
        raise UserError(
            f"the files of --from are OpenFold's settings, which describe the job {JOB}, not {job.spec}",
            allowed=f"memfit plan {JOB} --from ..., or memfit plan --from ... without a job",
        )
    job, (size, _, length) = dataclasses.replace(job, job=JOB), converted.size.partition("@")
    if job.size is None and (job.length is None or not length or job.length == int(length)):
        return converted, dataclasses.replace(job, size=size if job.length else converted.size)
    if job.size is None:
        converted = _leave_out(converted, f"crop of {length} residues", f"--length {job.length} was given")
        return converted, dataclasses.replace(job, size=size)
    if job.size == converted.size:
        return converted, job
    return _leave_out(converted, f"crop of size {converted.size}", f"--size {job.size} was given"), job


def _with_job_of_model(
    converted: memfit.lint.draft.Conversion, job: JobOptions
) -> tuple[JobOptions, memfit.lint.draft.Conversion]:
    """Return ``job`` and ``converted``. If the user named no job and some job builds the model that the files
    describe, the job options get that job, and ``converted`` lists as left out where its model differs. If
    the files describe no model, the job options are unchanged, so that the default job is predicted, and
    ``converted`` says so. If the user named a job, both are returned unchanged. Raises UserError if the user
    named no job, and none builds the model that the files describe."""
    model = converted.model
    if job.job is not None:
        return job, converted
    if model is None:
        return job, _leave_out(converted, "the model", f"no file describes it: predicted for {job.spec}")
    if not model.job:
        raise UserError(
            f"no job is named, and none builds the model of the files ({_model_text(model)}): "
            f"{model.missing}",
            allowed="memfit plan JOB --from ..., with a job that builds such a model",
            hint="JOB is FILE.py:NAME, hf:MODEL, or a built-in job (memfit list jobs)",
        )
    for option, reason in model.differences:
        converted = _leave_out(converted, option, reason)
    return dataclasses.replace(job, job=model.job), converted


def _model_text(model: memfit.lint.models.DescribedModel) -> str:
    """Return the known sizes of the model as text, such as ``48 layers of width 8192``, ``48 layers``, or
    ``the model`` if none is known."""
    layers = None if model.layers is None else f"{model.layers} layers"
    width = None if model.width is None else f"width {model.width}"
    return " of ".join(filter(None, (layers, width))) or "the model"


def _with_batch_and_length(
    converted: memfit.lint.draft.Conversion,
    job: JobOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    on: str,
) -> tuple[
    memfit.planner.request.Request, memfit.workflows.config_review.JobSize, memfit.lint.draft.Conversion
]:
    """Return (the request to predict, the size of its job, ``converted`` with the batch and length of that
    job). Batch and length are those of the files if they state them. If the user gave another value, that one
    is used; if the job refuses the files' value, the job's own is used. In both cases ``converted`` lists the
    files' value as left out. Raises UserError if the job is invalid even without the files' values."""
    from memfit.workflows import config_review

    for name in ("batch", "length"):
        option_value, file_value = getattr(job, name), getattr(converted, name)
        if file_value is None or option_value == file_value:
            continue
        if option_value is not None:
            converted = _leave_out(converted, f"{name} {file_value}", f"--{name} {option_value} was given")
            continue
        changed_job = dataclasses.replace(job, **{name: file_value})
        try:
            config_review.job_size(request(changed_job, search_options, runtime, on))
        except UserError as error:
            # Raises the job's own error if the job is invalid without the files' value too.
            config_review.job_size(request(job, search_options, runtime, on))
            converted = _leave_out(converted, f"{name} {file_value}", str(error))
            continue
        job = changed_job
    job_request = request(job, search_options, runtime, on)
    size = config_review.job_size(job_request)
    return job_request, size, _with_values_of_job(converted, job, size)


def _with_values_of_job(
    converted: memfit.lint.draft.Conversion, job: JobOptions, size: memfit.workflows.config_review.JobSize
) -> memfit.lint.draft.Conversion:
    """Return ``converted`` with the batch of ``size``, and with the length in the options ``job`` (None: the
    job's own length). Its micro-batch is that of the plan with this batch, and the files' is listed as left
    out if it is another; it is unchanged if the files do not state both batch and micro-batch. Raises
    UserError if the batch cannot be split equally over the plan's ranks and micro-batches.

    If the user named another job than the one that builds the files' model, it lists the model as left out if
    that job has another number of blocks or another width, or if the files do not state the model's number of
    blocks. The files' options of the model are then listed as left out, too."""
    from memfit.techniques.rank_mesh import split_batch

    micro_batch, samples = converted.micro_batch, split_batch(converted.plan, size.batch_size)
    if micro_batch is not None and converted.batch is not None:
        if micro_batch != samples:
            reason = f"{samples} with a batch of {size.batch_size}"
            converted = _leave_out(converted, f"{micro_batch} samples per micro-batch", reason)
        micro_batch = samples
    model = converted.model
    if model is not None and job.job not in (None, model.job):
        pairs = ((model.layers, size.layers), (model.width, size.width))
        if any(file_value is not None and file_value != job_value for file_value, job_value in pairs):
            job_value = f"{size.layers or 'no'} blocks of width {size.width or 'unknown'}"
            converted = _leave_out(
                converted,
                _model_text(model),
                f"{job.spec} has {job_value}; the job's own sizes are predicted",
            )
        elif model.layers is None:
            converted = _leave_out(converted, "the model", f"{model.missing}: predicted for {job.spec}")
        if model.options:
            converted = _leave_out(converted, ", ".join(model.options), f"those of {job.spec} are predicted")
    return dataclasses.replace(converted, batch=size.batch_size, length=job.length, micro_batch=micro_batch)


def _with_clipping(
    job_request: memfit.planner.request.Request, converted: memfit.lint.draft.Conversion, limit: float | None
) -> tuple[memfit.planner.request.Request, memfit.lint.draft.Conversion]:
    """Return ``job_request`` with gradients clipped to a norm of ``limit``, and ``converted`` unchanged. A
    ``limit`` of 0: not clipped; None: the files do not say, and the request keeps the limit of the job. But
    if the plan of ``converted`` has optimizer-in-backward, with which gradients cannot be clipped, and
    ``limit`` is above 0, return the request unchanged, and ``converted`` with the clipping listed as left
    out."""
    if limit and converted.plan.get("optimizer-in-backward"):
        reason = "each parameter is updated before the whole norm is known: predicted without clipping"
        return job_request, _leave_out(converted, f"gradients clipped to {limit:g}", reason)
    return dataclasses.replace(
        job_request, job_ref=dataclasses.replace(job_request.job_ref, clip=limit)
    ), converted


def _with_engine(
    job_request: memfit.planner.request.Request, converted: memfit.lint.draft.Conversion, chosen: str | None
) -> tuple[memfit.planner.request.Request, memfit.lint.draft.Conversion]:
    """Return (``job_request`` with the engine to predict with, ``converted``). The engine is ``chosen``, the
    value of --engine; without it (None), that of the files, or native if theirs does not support the plan or
    the model. If it is not that of the files, ``converted`` lists theirs as left out. Raises UserError if
    ``chosen`` does not support the plan or the model."""
    from memfit.engines.registry import engine, supporting_engine
    from memfit.jobs.registry import load
    from memfit.planner.request import model_sizes

    reason = f"--engine {chosen} was given"
    try:
        backend = supporting_engine(chosen or converted.engine, converted.plan)
        model_sizes(backend.name, load(job_request.job_ref))  # Megatron-LM cannot build every model
    except UserError as error:
        if chosen is not None:
            raise
        backend, reason = engine("native"), f"{error.given}; predicted with PyTorch's own features"
    if backend.name != converted.engine:
        converted = _leave_out(converted, f"engine {converted.engine}", reason)
    return dataclasses.replace(job_request, engine=backend.name), converted


def _view(
    converted: memfit.lint.draft.Conversion,
    findings: Sequence[memfit.lint.check.Finding],
    result: memfit.workflows.config_review.ConfigReview,
) -> dict[str, Any]:
    from memfit.cli.views import choice_view, estimate_view

    return {
        "given": estimate_view(result.existing),
        "fits": result.fits,
        "needed_bytes": result.needed_bytes,
        "cap_bytes": result.cap_bytes,
        "engine": converted.engine,
        "micro_batch": converted.micro_batch,
        "batch": converted.batch,
        "length": converted.length,
        "carried": list(converted.carried),
        "left_out": [dataclasses.asdict(note) for note in converted.left_out],
        "findings": findings_view(findings),
        "better": [estimate_view(e) for e in result.better],
        "recommended": choice_view(result.recommended) if result.recommended is not None else None,
        "extent": serialization.to_plain(result.extent) if result.extent is not None else None,
        "nothing_fits": result.nothing,
    }


def _print_conversion(converted: memfit.lint.draft.Conversion, lang: str) -> None:
    from rich.text import Text

    from memfit.report.words import load_words

    words, output = load_words(lang), console()
    title = words.get(
        "lint.carried", engine=converted.engine, plan=converted.plan.label, batch=converted.batch
    )
    output.print(Text(title, style="bold"))
    if converted.carried:
        options = ", ".join(converted.carried)
        output.print(
            Text(words.get("lint.options", count=len(converted.carried), options=options), style="dim")
        )
    for note in converted.left_out:
        option, reason = words.of(note.option), words.of(note.reason)
        output.print(Text(words.get("lint.left_out", option=option, reason=reason), style="dim"))


def _print(result: memfit.workflows.config_review.ConfigReview, lang: str) -> None:
    from rich.text import Text

    from memfit.report.terminal import print_estimate, print_verdict
    from memfit.report.words import load_words

    words, output = load_words(lang), console()
    print_estimate(result.existing, console=output, lang=lang)
    if result.fits is not None and result.cap_bytes is not None:
        print_verdict(
            result.existing,
            needed_bytes=result.needed_bytes,
            cap_bytes=result.cap_bytes,
            fits=result.fits,
            console=output,
            words=words,
        )
    choice = result.recommended
    estimates = (
        [(choice.estimate, None)]
        if choice is not None
        else list(zip(result.better, result.better_fits, strict=True))
    )
    if result.nothing is not None:
        output.print(Text(result.nothing, style="bold"))
        return
    output.print(Text(words.get("lint.better" if estimates else "lint.nothing_better"), style="bold"))
    for estimate, fits in estimates:
        line = words.get("lint.instead", **_differences(result.existing, estimate))
        if fits is not None and not result.fits:
            line = words.get(
                "text.with_note", text=line, note=words.get(f"text.{'fits' if fits else 'does_not_fit'}")
            )
        output.print(Text(line))
    if result.extent is not None and result.extent.time_up:
        limit_s = result.extent.limit_s or 0.0  # 0: what an earlier search kept was used
        cut = "extent.time_up" if limit_s else "extent.kept"
        output.print(Text(words.get(cut, limit=format_seconds(limit_s))))


def _differences(
    current: memfit.types.result.Estimate, alternative: memfit.types.result.Estimate
) -> dict[str, str]:
    from memfit.types.units import format_bytes

    peak = alternative.allocated_bytes.value
    change = peak - current.allocated_bytes.value
    return {
        "plan": alternative.plan.label,
        "peak": format_bytes(int(peak)),
        "change": f"{'+' if change > 0 else '-'}{format_bytes(int(abs(change)))}",
    }
