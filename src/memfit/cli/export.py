"""``memfit export``: write a plan as files for a launcher, a cluster or a trainer, without running
anything."""

from __future__ import annotations

import ast
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.options import GoalOptions, HereOptions, JobOptions, JsonOptions, WhichOptions
from memfit.cli.output import emit, one_of
from memfit.cli.progress import Bars
from memfit.cli.request import plan_file, recommended_plan, request
from memfit.types.errors import UserError
from memfit.types.launch import Keep, LaunchConfig, RunSpec
from memfit.types.plan import Plan

if TYPE_CHECKING:
    import memfit.export.base
    import memfit.export.script_steps
    import memfit.types.dependence
    import memfit.types.job

_MOST_BYTES = 512 * 1024  # maximum size of a file that is copied into the export


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The target, the folder, and the settings of the launch."""

    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="torchrun, slurm, k8s, skypilot, trainer, torchtitan or openfold."
        ),
    ]
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")]
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines that the ranks are dealt to.")] = 1
    script: Annotated[
        str | None,
        typer.Option(metavar="'FILE.py ARGS'", help="Your own training script in place of memfit's worker."),
    ] = None
    max_restarts: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often the launcher starts all ranks again.")
    ] = 3
    gpu: Annotated[str, typer.Option(metavar="NAME", help="skypilot: the accelerator, such as H100.")] = ""
    image: Annotated[str, typer.Option(metavar="IMAGE", help="k8s: the container image.")] = ""
    setup: Annotated[
        str, typer.Option(metavar="COMMAND", help="skypilot: what a fresh machine installs.")
    ] = ""
    save: Annotated[
        str,
        typer.Option(metavar="DIR", help="Checkpoints, on a folder of all nodes; a restart goes on from it."),
    ] = ""
    save_every: Annotated[
        int, typer.Option(metavar="N", min=0, help="And after every N steps. 0: at the end only.")
    ] = 0
    claim: Annotated[
        str, typer.Option(metavar="NAME", help="k8s: the volume claim with --save's folder.")
    ] = ""
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export.")] = False
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Your own configuration of DeepSpeed, Accelerate, Trainer, Megatron-LM, torchtitan or "
            "OpenFold: its plan unless another is given, and every setting that no plan decides. May be "
            "given several times.",
        ),
    ] = None
    ranks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes, where the files of --from do not say.")
    ] = None
    script_applies: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What --script does itself of the plan, such as activation-checkpointing; all: everything.",
        ),
    ] = ""


def export(
    job: JobOptions,
    which: WhichOptions,
    goal: GoalOptions,
    own: ExportOptions,
    here: HereOptions,
    output: JsonOptions,
) -> None:
    """Write a plan as files to start elsewhere, without training.

    The engine's configuration is byte for byte the one that `memfit run` would use.
    """
    from memfit.export.base import Handover
    from memfit.export.readme import dependence_line
    from memfit.export.script_steps import check_acknowledged, script_steps
    from memfit.export.targets import LIBRARIES, TARGETS, bundle
    from memfit.export.user_settings import read_user_files
    from memfit.export.write import write
    from memfit.planner.recompute_budget import open_budget
    from memfit.techniques.plan_file import plan_text
    from memfit.workflows.single_run import settled

    target = one_of("--to", own.to, TARGETS)
    words, script_file = _words(own.script)
    by_worker = not words and target not in LIBRARIES
    given = read_user_files(own.given, ranks=own.ranks, for_worker=by_worker) if own.given else None
    job, goal = _as_files_say(given, job, goal)
    asked = which.plan is not None or which.recommended
    plan = given.carried.plan if given is not None and not asked else plan_file(which)
    if plan is None:
        with Bars("en") as progress:
            plan = recommended_plan(request(job, goal, here), progress)
    elif open_budget(plan) is not None:
        with Bars("en") as progress:
            plan = settled(request(job, goal, here), plan, progress)
    config, job_file, given, dependence = _launch(job, goal.engine, plan, here, _kept(own), given)
    steps = script_steps(config.spec) if words and target not in LIBRARIES else ()
    check_acknowledged(steps, _names(own.script_applies), script=words[0] if words else "")
    handover = Handover(
        config=config,
        nodes=own.nodes,
        script=words,
        max_restarts=own.max_restarts,
        gpu=own.gpu,
        image=own.image,
        setup=own.setup,
        claim=own.claim,
        user_files=given,
        dependence=dependence,
        own_files={"plan.yaml": plan_text(plan), **(script_file if words else job_file)},
    )
    files = bundle(target, handover)
    write(own.out, files, force=own.force)
    if output.json:
        listed, caution = {s.name: s.text for s in steps}, dependence_line(handover)
        written = {"folder": str(own.out), "files": sorted(files)}
        emit({**written, "script_steps": listed, "dependence": caution})
    else:
        _print_written(own.out, sorted(files), handover, steps)


def _print_written(
    out: Path,
    files: Sequence[str],
    handover: memfit.export.base.Handover,
    steps: Sequence[memfit.export.script_steps.ScriptStep],
) -> None:
    from memfit.export.readme import dependence_line

    print(f"{out}: {', '.join(files)}")
    if (caution := dependence_line(handover)) is not None:
        print(caution)
    if steps:
        print(f"{handover.script[0]} must do itself:")
    for step in steps:
        print(f"  {step.name}: {step.text}")
    if handover.user_files is not None:
        print(f"Your settings are kept; {out}/README.md lists what the plan changed and what is not in it.")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _as_files_say(
    given: memfit.export.base.UserFiles | None, job: JobOptions, goal: GoalOptions
) -> tuple[JobOptions, GoalOptions]:
    """Take the engine from the user's files, and the batch if the job accepts it, unless the options give
    them."""
    from memfit.jobs.registry import load

    if given is None:
        return job, goal
    if goal.engine == "native":
        goal = dataclasses.replace(goal, engine=given.carried.engine)
    if job.batch is not None or given.carried.batch is None:
        return job, goal
    batch = given.carried.batch
    ref = job.ref
    try:
        load(dataclasses.replace(ref, batch=batch))
    except UserError as error:
        if (own := load(ref).batch_size) != batch:
            print(f"memfit: the files say a batch of {batch}, the job has {own}: {error}", file=sys.stderr)
        return job, goal
    return dataclasses.replace(job, batch=batch), goal


def _kept(own: ExportOptions) -> Keep:
    if own.script is not None and own.save:
        raise UserError("--save with --script", hint="your own script keeps its own checkpoints")
    if own.save_every and not own.save:
        raise UserError("--save-every without --save", allowed="--save DIR --save-every N")
    return Keep(save=own.save, every_steps=own.save_every, resume=own.save)


def _launch(
    job: JobOptions,
    engine: str,
    plan: Plan,
    here: HereOptions,
    keep: Keep,
    files: memfit.export.base.UserFiles | None,
) -> tuple[
    LaunchConfig,
    dict[str, str],
    memfit.export.base.UserFiles | None,
    memfit.types.dependence.SampleDependence | None,
]:
    """Return the launch, the files of the user's job (they are put beside it), the user's configuration
    with the job's clipping, and how the samples of a batch that the plan splits depend on each other."""
    from memfit.engines.registry import carrying, render
    from memfit.jobs.registry import load
    from memfit.planner.single_device import model_sizes

    if engine == "replay":
        raise UserError("engine replay trains nothing", hint="name the engine whose runs it answers from")
    carrying(engine, plan)
    given = job.ref
    loaded = load(given)
    dependence = _dependence(loaded, plan)
    clip, batch_size = loaded.clip, loaded.batch_size
    if files is not None:
        batch_size = batch_size if files.for_worker or job.batch else files.carried.batch or batch_size
        files = dataclasses.replace(files, job_clip=loaded.clip)
        clip = files.clip
        given = dataclasses.replace(given, clip=clip or 0.0)
    path, _, attribute = given.spec.rpartition(":")
    own = {} if path in ("", "hf") else _carried(Path(path))
    ref = dataclasses.replace(given, spec=f"{Path(path).name}:{attribute}") if own else given
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=ref,
        plan=plan,
        engine=engine,
        seed=0,
        steps=loaded.steps,
        batch_size=batch_size,
        clip=clip,
        sizes=model_sizes(engine, loaded),
        threads=here.threads or 0,
        evaluate=plan.ranks == 1,
        keep=keep,
    )
    return render(spec), own, files, dependence


def _dependence(job: memfit.types.job.Job, plan: Plan) -> memfit.types.dependence.SampleDependence | None:
    """Return how the job's samples depend on each other, or None if the plan does not split the batch. Raises
    UserError if splitting would weight the loss wrongly."""
    from memfit.techniques.registry import refuse_wrong_weights, splits_batch
    from memfit.trace.sample_dependence import sample_dependence

    if not splits_batch(plan):
        return None
    dependence = sample_dependence(job)
    refuse_wrong_weights(plan, dependence)
    return dependence


def _words(script: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the user's program with its arguments, and its files (name -> text)."""
    words = shlex.split(script or "")
    if not words:
        return (), {}
    path = Path(words[0])
    return (path.name, *words[1:]), _carried(path)


def _carried(path: Path) -> dict[str, str]:
    """Return the text of the file and of all modules beside it that it imports, directly or indirectly.
    Packages beside it are only reported on standard error: the export's files have no subfolders."""
    found: dict[str, str] = {}
    packages: set[str] = set()
    waiting = [path]
    while waiting:
        one = waiting.pop()
        found |= (text := _read(one))
        for name in _imported(text[one.name]):
            beside = path.parent / f"{name}.py"
            if beside.is_file() and beside.name not in found:
                waiting.append(beside)
            elif (path.parent / name / "__init__.py").is_file():
                packages.add(name)
    if packages:
        told = f"not carried: {', '.join(sorted(packages))} beside {path.name}"
        print(f"memfit: {told}; install what is a package where it runs", file=sys.stderr)
    return found


def _imported(source: str) -> Iterator[str]:
    """Yield the top-level names that ``source`` imports; none if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _read(path: Path) -> dict[str, str]:
    try:
        data = path.read_bytes()
        text = data.decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text", allowed="a Python file in UTF-8") from error
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} has {len(data)} bytes", allowed=f"at most {_MOST_BYTES}")
    return {path.name: text}
