"""``memfit export``: write a plan as files for a launcher, a cluster or a training library, without
training."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.options import JobOptions, JsonOptions, PlanOptions, RuntimeOptions, SearchOptions
from memfit.cli.output import check_choice, emit
from memfit.cli.progress import Bars
from memfit.cli.request import plan_file, recommended_plan, request
from memfit.files.read import read_text
from memfit.types.errors import UserError
from memfit.types.launch import CheckpointSettings, LaunchConfig, RunSpec
from memfit.types.plan import Plan

if TYPE_CHECKING:
    import memfit.export.base
    import memfit.export.script_steps
    import memfit.types.dependence
    import memfit.types.job

_MOST_BYTES = 512 * 1024  # maximum size of a file that is copied into the export


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The target to export for, such as "slurm", the folder to write, the settings of the launch, and the
    user's own script and configuration files."""

    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="What the files are for: torchrun, slurm, k8s (Kubernetes) or skypilot, which start the "
            "training; or the library trainer (Hugging Face), torchtitan or openfold, whose own program "
            "trains.",
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder to write the files into. It is created if it does not exist; the folder above it "
            "must exist. Without --force it must be new or empty.",
        ),
    ]
    nodes: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of machines that train. The number of processes of the plan must be divisible by "
            "it. Default: 1.",
        ),
    ] = 1
    script: Annotated[
        str | None,
        typer.Option(
            metavar="'FILE.py ARGS'",
            help="Command line of your own training script, in quotes: the Python file and its arguments. "
            "The file and the modules beside it (not packages) that it imports are copied. The written "
            "files start it instead of memfit's worker, the program that trains the job by default. With "
            "--to trainer, torchtitan or openfold it is copied but not started: the library's own program "
            "trains. Default: memfit's worker or, with these three, the library's program alone.",
        ),
    ] = None
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="How many times the launcher restarts all processes after a failure. Default: 3. Ignored "
            "with --to trainer, torchtitan or openfold.",
        ),
    ] = 3
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="For --to skypilot with --script, which needs it: the accelerator to rent, such as H100. "
            "Ignored without --script, as memfit's worker then trains on CPUs, and with any other "
            "--to.",
        ),
    ] = ""
    image: Annotated[
        str,
        typer.Option(
            metavar="IMAGE",
            help="For --to k8s, which needs it: the container image. It must have Python, torch, the package "
            "of the engine if that is not native, and memfit or, with --script, in place of memfit what "
            "your script imports. Ignored with any other --to.",
        ),
    ] = ""
    setup: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="For --to skypilot: the shell command that sets up a new machine. Default: a check that "
            "these can be imported: torch; memfit, unless --script is given; and the package of the engine. "
            "Ignored with any other --to.",
        ),
    ] = ""
    save: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder for the checkpoints of memfit's worker, which the written files start unless "
            "--script is given: one at the end and, with --save-every, earlier ones. All nodes must share "
            "the folder. A relative path starts at the folder of the written files, where they are started. "
            "A restart, and a later start, continues from the newest checkpoint. Jobs, plans and engines "
            "that `memfit run --save` refuses are refused when they start. --to k8s needs an absolute path "
            "and --claim. Not with --script, and not with --to trainer, torchtitan or openfold. Default: no "
            "checkpoints.",
        ),
    ] = ""
    save_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --save: also write a checkpoint after every N steps. 0 (default): only at the end. "
            "Another number is refused without --save.",
        ),
    ] = 0
    claim: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="For --to k8s with --save, which needs it: the name of the persistent volume claim that is "
            "mounted as the folder of --save. With --to k8s it is refused without --save; with any other "
            "--to it is ignored.",
        ),
    ] = ""
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write into --out even if it is a folder that is not empty: replace files of the same "
            "names, and remove the other files of an earlier export. Any other file stays. Default: such a "
            "folder is refused.",
        ),
    ] = False
    from_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Configuration file of your own for DeepSpeed, Accelerate, Trainer, Megatron-LM, "
            "torchtitan, OpenFold, Axolotl, LLaMA-Factory, Lightning or MACE. Can be given several times: "
            "all files together are one set-up, with at most one file of each kind. The plan of the set-up "
            "is exported unless --plan or --recommended is given. Settings that the plan does not decide "
            "are kept in the written files of the same kinds; the README.md there lists your settings that "
            "are changed or not in the export.",
        ),
    ] = None
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --from: number of processes that train. Needed if the files do not state it; if they "
            "do, it must be the same number. Ignored without --from.",
        ),
    ] = None
    script_applies: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="With --script, or --to trainer, torchtitan or openfold: names, separated by commas, of "
            "the parts of the plan that your training code applies itself, because no written file does: "
            "techniques, such as activation-checkpointing; clipping for gradient clipping; loss-terms for "
            "losses weighted by the job's loss_terms, which libraries do not know; all for every such part. "
            "With --to trainer, torchtitan or openfold, only loss-terms can be such a part. The export is "
            "refused until every such part is named; the error lists the names. Any other name is refused, "
            "but all never is. Default: none.",
        ),
    ] = ""


def export(
    job: JobOptions,
    plan_options: PlanOptions,
    search_options: SearchOptions,
    options: ExportOptions,
    runtime: RuntimeOptions,
    output: JsonOptions,
) -> None:
    """Write the files that train with a plan elsewhere. Nothing is trained here.

    Without --from and --script, the engine's configuration files are byte for byte those that `memfit run`
    would use."""
    from memfit.export.base import Handover
    from memfit.export.readme import dependence_line
    from memfit.export.script_steps import check_acknowledged, loss_terms_step, script_steps
    from memfit.export.targets import LIBRARIES, TARGETS, bundle
    from memfit.export.user_settings import read_user_files
    from memfit.export.write import check_folder, write
    from memfit.planner.recompute_budget import open_budget
    from memfit.techniques.plan_file import plan_text
    from memfit.workflows.single_run import resolve_plan

    target = check_choice("--to", options.to, TARGETS)
    check_folder(options.out, force=options.force)
    script_words, script_file = _split_script(options.script)
    by_worker = not script_words and target not in LIBRARIES
    user_files = (
        read_user_files(options.from_files, ranks=options.ranks, for_worker=by_worker)
        if options.from_files
        else None
    )
    job, search_options = _with_batch_and_engine(user_files, job, search_options)
    plan_chosen = plan_options.plan is not None or plan_options.recommended
    plan = user_files.carried.plan if user_files is not None and not plan_chosen else plan_file(plan_options)
    if plan is None:
        with Bars("en") as progress:
            plan = recommended_plan(request(job, search_options, runtime), progress)
    elif open_budget(plan) is not None:
        with Bars("en") as progress:
            plan = resolve_plan(request(job, search_options, runtime), plan, progress)
    config, job_file, user_files, dependence, loaded = _launch(
        job, search_options.engine or "native", plan, runtime, _checkpoint_settings(options), user_files
    )
    steps = script_steps(config.spec) if script_words and target not in LIBRARIES else ()
    if not by_worker and (weights := loss_terms_step(loaded, plan, trainer=target == "trainer")) is not None:
        steps += (weights,)
    applied = tuple(name for part in options.script_applies.split(",") if (name := part.strip()))
    handover = Handover(
        config=config,
        nodes=options.nodes,
        script=script_words,
        max_restarts=options.max_restarts,
        gpu=options.gpu,
        image=options.image,
        setup=options.setup,
        claim=options.claim,
        user_files=user_files,
        dependence=dependence,
        script_steps=steps,
        own_files={"plan.yaml": plan_text(plan), **(script_file if script_words else job_file)},
    )
    check_acknowledged(steps, applied, script=handover.training_code)
    files = bundle(target, handover)
    write(options.out, files, force=options.force)
    if output.json:
        step_texts, caution = {s.name: s.text for s in steps}, dependence_line(handover)
        summary = {"folder": str(options.out), "files": sorted(files)}
        emit({**summary, "script_steps": step_texts, "dependence": caution})
    else:
        _print_written(options.out, sorted(files), handover)


def _print_written(
    out: Path,
    files: Sequence[str],
    handover: memfit.export.base.Handover,
) -> None:
    from memfit.export.readme import dependence_line

    print(f"{out}: {', '.join(files)}")
    if (caution := dependence_line(handover)) is not None:
        print(caution)
    if handover.script_steps:
        print(f"{handover.training_code} must apply these parts of the plan itself:")
    for step in handover.script_steps:
        print(f"  {step.name}: {step.text}")
    if handover.user_files is not None:
        for sentence in handover.user_files.unused_norms:
            print(sentence)
        print(
            f"Settings that the plan does not decide are kept; {out}/README.md lists your settings that the "
            "plan changed and those that are not in the export."
        )


def _with_batch_and_engine(
    user_files: memfit.export.base.UserFiles | None, job: JobOptions, search_options: SearchOptions
) -> tuple[JobOptions, SearchOptions]:
    """Return ``job`` with the batch of the user's files, unless --batch is given or the files state none, and
    ``search_options`` with their engine, unless --engine is given. If the job refuses their batch, it keeps
    its own number; if that is another number, this is printed on standard error. If ``user_files`` is None,
    return both unchanged. Raises UserError if the job cannot be loaded with its own batch either."""
    from memfit.jobs.registry import load

    if user_files is None:
        return job, search_options
    if search_options.engine is None:
        search_options = dataclasses.replace(search_options, engine=user_files.carried.engine)
    if job.batch is not None or user_files.carried.batch is None:
        return job, search_options
    batch = user_files.carried.batch
    ref = job.ref
    try:
        load(dataclasses.replace(ref, batch=batch))
    except UserError as error:
        if (job_batch := load(ref).batch_size) != batch:
            print(
                f"memfit: the files of --from set a batch of {batch}, but the job uses {job_batch}: {error}",
                file=sys.stderr,
            )
        return job, search_options
    return dataclasses.replace(job, batch=batch), search_options


def _checkpoint_settings(options: ExportOptions) -> CheckpointSettings:
    from memfit.export.targets import LIBRARIES

    if options.save and options.to in LIBRARIES:
        raise UserError(
            f"--save cannot be used with --to {options.to}, whose own program trains and saves",
            hint="leave out --save, and let that program write its checkpoints",
        )
    if options.script is not None and options.save:
        raise UserError(
            "--save cannot be used with --script, as only memfit's own training program saves to it",
            hint="leave out --save: your script saves its checkpoints itself",
        )
    if options.save_every and not options.save:
        raise UserError("--save-every needs --save", allowed="--save DIR --save-every N")
    return CheckpointSettings(save=options.save, every_steps=options.save_every, resume=options.save)


def _launch(
    job: JobOptions,
    engine: str,
    plan: Plan,
    runtime: RuntimeOptions,
    keep: CheckpointSettings,
    user_files: memfit.export.base.UserFiles | None,
) -> tuple[
    LaunchConfig,
    dict[str, str],
    memfit.export.base.UserFiles | None,
    memfit.types.dependence.SampleDependence | None,
    memfit.types.job.Job,
]:
    """Return (the launch to export; name -> text of the user's job file and of the modules beside it that it
    imports, empty for a built-in or hf: job; ``user_files`` with ``job_clip`` filled in, or None; how the
    samples of a batch depend on each other, None if the plan does not split the batch; the job). Raises
    UserError for the engine replay, which does not train, for a plan or a model that the engine does not
    support, for a plan that splits the batch and would thereby weight the terms of the loss wrongly, for a
    job that cannot be loaded, and for job files that cannot be copied (see `_file_texts`)."""
    from memfit.engines.registry import render, supporting_engine
    from memfit.jobs.registry import load
    from memfit.planner.request import model_sizes

    if engine == "replay":
        raise UserError(
            "the engine replay only shows recorded runs again and does not train, so it cannot be exported",
            hint="name with --engine the engine that made the recorded runs",
        )
    supporting_engine(engine, plan)
    ref = job.ref
    loaded = load(ref)
    dependence = dependence_of_split(loaded, plan)
    clip, batch_size = loaded.clip, loaded.batch_size
    if user_files is not None:
        batch_size = (
            batch_size if user_files.for_worker or job.batch else user_files.carried.batch or batch_size
        )
        user_files = dataclasses.replace(user_files, job_clip=loaded.clip)
        clip = user_files.clip
        ref = dataclasses.replace(ref, clip=clip or 0.0)
    path, _, attribute = ref.spec.rpartition(":")
    job_files = {} if path in ("", "hf") else _file_texts(Path(path))
    launch_ref = dataclasses.replace(ref, spec=f"{Path(path).name}:{attribute}") if job_files else ref
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=launch_ref,
        plan=plan,
        engine=engine,
        seed=0,
        steps=loaded.steps,
        batch_size=batch_size,
        clip=clip,
        sizes=model_sizes(engine, loaded),
        threads=runtime.threads or 0,
        evaluate=plan.ranks == 1,
        keep=keep,
    )
    return render(spec), job_files, user_files, dependence, loaded


def dependence_of_split(
    job: memfit.types.job.Job, plan: Plan
) -> memfit.types.dependence.SampleDependence | None:
    """Return how the samples of the job's batch depend on each other, or None if the plan does not split the
    batch into micro-batches or over ranks. Raises UserError if that split would weight the terms of the loss
    wrongly."""
    from memfit.techniques.registry import refuse_wrong_weights, splits_batch
    from memfit.trace.sample_dependence import sample_dependence

    if not splits_batch(plan):
        return None
    dependence = sample_dependence(job)
    refuse_wrong_weights(plan, dependence)
    return dependence


def _split_script(script: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return (the words of the command line ``script``, in which the program, the first word, is without its
    folder; name -> text of the program and of the modules beside it that it imports). Both are empty for None
    and "". Raises UserError if a quotation mark in ``script`` is not closed or a backslash ends it, and for a
    file that cannot be copied, as `_file_texts` does."""
    try:
        words = shlex.split(script or "")
    except ValueError as error:
        raise UserError(
            f"--script is not a valid command line: {error}", allowed="'FILE.py ARGS', quoted as for a shell"
        ) from error
    if not words:
        return (), {}
    path = Path(words[0])
    return (path.name, *words[1:]), _file_texts(path)


def _file_texts(path: Path) -> dict[str, str]:
    """Return file name -> text of the Python file ``path`` and of all modules in its folder that it imports,
    directly or through each other. Packages in the folder that are imported are not included, as the files of
    an export have no subfolders; they are named on standard error. Raises UserError if one of the files
    cannot be read, is not UTF-8 text, or is larger than 512 KiB."""
    from memfit.jobs.user_job import imported_names

    texts: dict[str, str] = {}
    packages: set[str] = set()
    pending = [path]
    while pending:
        file = pending.pop()
        texts |= (file_text := _read(file))
        for name in imported_names(file_text[file.name]):
            module_path = path.parent / f"{name}.py"
            if module_path.is_file() and module_path.name not in texts:
                pending.append(module_path)
            elif (path.parent / name / "__init__.py").is_file():
                packages.add(name)
    if packages:
        message = f"packages are not copied: {', '.join(sorted(packages))} beside {path.name}"
        print(f"memfit: {message}; install them on every machine that trains", file=sys.stderr)
    return texts


def _read(path: Path) -> dict[str, str]:
    try:
        return {path.name: read_text(path, most_bytes=_MOST_BYTES)}
    except UserError as error:
        reason = error.given
        raise UserError(
            "the Python file of --script or of the job, or one that it imports, cannot be copied into the "
            f"export: {reason}",
            allowed=error.allowed,
        ) from error
