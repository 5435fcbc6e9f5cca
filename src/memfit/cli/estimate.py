"""``memfit estimate``: predict the memory of a training before it runs, of a job or of a script as it is."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from memfit.cli.engines import compare_engines
from memfit.cli.estimate_job import TraceFileOptions, estimate_job
from memfit.cli.estimate_script import ScriptOptions, estimate_command
from memfit.cli.lengths import LengthOptions, print_lengths
from memfit.cli.options import (
    JobOptions,
    MachineOptions,
    OutputOptions,
    PlanOptions,
    RuntimeOptions,
    SearchOptions,
    SizeOptions,
)
from memfit.cli.output import check_language, english_only, refuse_options, set_options
from memfit.cli.precision import PrecisionOptions, print_precision
from memfit.types.errors import UserError, suggest

_PLAN_ENDINGS = (".yaml", ".yml")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EstimateOptions:
    """What to predict (a job with plan files, or a command), and whether to compare the engines."""

    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="JOB [A.yaml [B.yaml]] | -- COMMAND",
            help="JOB: a job as for `memfit plan`, such as protein-lm or FILE.py:NAME. It can be left out "
            "with plan files (default: protein-ss) and with --lengths (default: protein-lm). A.yaml: the "
            "plan to predict, in place of --plan and --recommended. A.yaml B.yaml: show why the memory of "
            "these two plans differs. COMMAND: the command that starts your own training, as you would "
            "type it: python train.py ARGS, python -m MODULE ARGS, torchrun, accelerate launch, deepspeed, "
            "srun, mpirun or uv run with their options, or the name of a program written in Python. "
            "memfit's options must come before it. The -- before it can be left out.",
        ),
    ] = None
    engines: Annotated[
        bool,
        typer.Option(
            "--engines",
            help="For a JOB: compare the engines that can train it with the plan of --plan or --recommended "
            "(default: plain training): whether each supports the plan, its predicted peak memory and step "
            "time, whether it is installed, the number of lines of its configuration files, and facts about "
            "its installation and maintenance. Not with plan files as arguments, a COMMAND, --html, "
            "--snapshot, --perfetto, --no-lines, --lengths or --precision, and with --lang ja only as "
            "--json.",
        ),
    ] = False


class EstimateCommand(TyperCommand):
    """The command line of ``memfit estimate``. Options after a JOB are memfit's; those after the first word
    of a COMMAND are the command's own, also without "--" before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args`` into the parameters of ``ctx`` and return what remains."""
        ctx.allow_interspersed_args = False
        values, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        targets = values.get("targets")  # a placeholder if there are none
        ctx.allow_interspersed_args = not isinstance(targets, tuple) or not targets or is_job(targets[0])
        return super().parse_args(ctx, args)


def is_job(word: str) -> bool:
    """Return whether ``word`` names a job or a plan file, and not the program of a command. It does if it is
    the name of a built-in job, begins with "hf:", contains ".py:", or ends in .yaml or .yml. A word that is
    similar to the name of a built-in job counts as a misspelled job if it is no program."""
    from memfit.jobs.registry import names

    if word in names() or word.startswith("hf:") or ".py:" in word or word.endswith(_PLAN_ENDINGS):
        return True
    is_program = Path(word).is_file() or shutil.which(word) is not None
    return not is_program and bool(suggest(word, names()))


def estimate(  # noqa: PLR0913
    options: EstimateOptions,
    files: TraceFileOptions,
    sizes: SizeOptions,
    plan_options: PlanOptions,
    search_options: SearchOptions,
    on: MachineOptions,
    runtime: RuntimeOptions,
    lengths: LengthOptions,
    precision: PrecisionOptions,
    script: ScriptOptions,
    output: OutputOptions,
) -> None:
    """Predict the memory of a training before it runs: of a JOB, or of your own script as it is.

    Shows what uses the memory of a step, by module and line. A script runs unmodified, in a process of its
    own, until its second optimizer step. Its parameters have shapes but no data, so a model that is too large
    for this machine can be predicted, too. A script that needs a GPU can be predicted without one: name it
    with --on.

    Only with a COMMAND: --bound, --plans, --save, --diff, --show-output, --time-limit. Of the other options,
    it takes --on, --memory, --html, --snapshot, --perfetto, --lang and --json, and with --plans also --goal,
    --accuracy and --within. All others are for a JOB.

    Examples: memfit estimate --on H100-SXM -- python train.py --batch-size 32; memfit estimate protein-lm
    --size 650M --html peak.html"""
    language_code = check_language(output.lang)
    targets = options.targets or []
    if targets and not is_job(targets[0]):
        job_only = set_options(sizes, plan_options, runtime, lengths, precision)
        job_only |= {"--engines": options.engines, "--engine": bool(search_options.engine)}
        job_only["--host-memory"] = bool(search_options.host_memory)
        job_only.pop("--within")
        refuse_options(job_only, "cannot be used with a COMMAND", hint="they are for `memfit estimate JOB`")
        estimate_command(
            targets,
            script,
            files,
            search_options,
            on.on,
            within=runtime.within,
            lang=language_code,
            as_json=output.json,
        )
        return
    refuse_options(
        set_options(script),
        "cannot be used with a JOB: they are for a COMMAND after --",
        hint="`memfit plan JOB` searches for plans of a job",
    )
    if not targets and lengths.lengths is None:
        raise UserError(
            "neither a job nor a command is given",
            hint="memfit estimate -- python train.py ARGS, or memfit estimate JOB (`memfit list jobs`)",
        )
    jobs = [target for target in targets[:1] if not target.endswith(_PLAN_ENDINGS)]
    job_sizes = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(SizeOptions)}
    job, plan_paths = JobOptions(**job_sizes, job=jobs[0] if jobs else None), targets[len(jobs) :]
    if precision.precision is not None:
        not_for_precision: dict[str, object] = {"plan files": plan_paths, "--engines": options.engines}
        not_for_precision |= set_options(files, plan_options, search_options, on, runtime, lengths)
        refuse_options(not_for_precision, "cannot be used with --precision")
        print_precision(job, precision, lang=language_code, as_json=output.json)
        return
    refuse_options(set_options(precision), "cannot be used without --precision")
    if lengths.lengths is not None:
        other: dict[str, object] = {"plan files": plan_paths, "--engines": options.engines}
        other |= set_options(files, runtime, search_options) | {"--recommended": plan_options.recommended}
        other.pop("--memory")
        other |= {f"--{name}": job_sizes[name] for name in ("data", "weights", "steps", "length", "dim")}
        refuse_options(other, "cannot be used with --lengths")
        english_only(output, "--lengths")
        print_lengths(lengths, job, plan_options.plan, search_options.memory, on.on, as_json=output.json)
        return
    refuse_options(set_options(lengths), "cannot be used without --lengths")
    if options.engines:
        refuse_options(set_options(files) | {"plan files": plan_paths}, "cannot be used with --engines")
        english_only(output, "--engines")
        compare_engines(job, plan_options, search_options, on, runtime, as_json=output.json)
        return
    estimate_job(
        job,
        plan_paths,
        files,
        plan_options,
        search_options,
        on,
        runtime,
        lang=language_code,
        as_json=output.json,
    )
