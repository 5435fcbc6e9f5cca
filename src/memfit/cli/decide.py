"""``memfit decide``: compare options and their costs, from a proof of concept and the user's figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.gates import GateOptions, check_gates
from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import EffortOptions, OutputOptions, RuntimeOptions, SearchOptions, StoreOptions
from memfit.cli.output import check_language, console, emit, refuse_options, set_options


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecideOptions:
    """The ID of the proof of concept, the file with the user's figures, such as prices, and whether to print
    only a template of such a file."""

    poc: Annotated[
        str | None,
        typer.Argument(
            metavar="ID|FILE",
            help="ID of the proof of concept in the store from whose measurements the costs are computed; "
            "one that was run here, not a record from others. With --gates, --pilot or --full also a record "
            "from others: its file, or its ID in the store; these three refuse a proof of concept that is "
            "unfinished or recommends no plan. Default: the proof of concept begun last. Refused with "
            "--template.",
        ),
    ] = None
    case: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Case file: a TOML file with your own figures, such as prices (--template prints one to "
            "fill in). It is stored with the proof of concept, and later commands for this proof of concept "
            "use it if no other is given. Default: the case file stored last with it, or no figures of your "
            "own if there is none. Not with --template, --gates, --pilot or --full.",
        ),
    ] = None
    template: Annotated[
        bool,
        typer.Option(
            "--template",
            help="Only print a case file to fill in, to standard output. It names every figure that can be "
            "given. Of the other options, only --lang and --json can be given with it.",
        ),
    ] = False


def decide(
    options: DecideOptions,
    gates: GateOptions,
    effort: EffortOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    store: StoreOptions,
    output: OutputOptions,
) -> None:
    """Compare the costs of four options: the machine you have, a purchase, the cloud, and doing nothing. With
    --gates, check instead whether a proof of concept may go on to a pilot and to the full size.

    The costs follow from the measurements of a proof of concept, the figures in memfit's catalog of machines,
    and your own figures, given with --case. With --gates, --pilot or --full, the figures of the proof of
    concept are checked against limits, called gates; if all are kept, the pilot on the machine --pilot and
    the full-size training on the machine --full are predicted. If one is not kept, the exit code is 1."""
    language_code = check_language(output.lang)
    has_stages = gates.pilot is not None or gates.full is not None
    if not has_stages:
        refuse_options(
            {"--size": gates.size, "--job": gates.job, **set_options(search_options, runtime)},
            "cannot be used without a stage to predict",
            hint="add --pilot or --full",
        )
    if gates.gates is not None or has_stages:
        refuse_options(
            {"--case": options.case, "--template": options.template},
            "cannot be used with --gates, --pilot or --full",
            hint="`memfit decide --case FILE` stores your figures for later commands",
        )
        check_gates(options.poc, gates, effort, search_options, runtime, store, output)
        return
    if options.template:
        refuse_options(
            {
                "--case": options.case,
                "ID": options.poc,
                "--attended-minutes": effort.attended_minutes,
                "--store": store.store,
            },
            "cannot be used with --template",
            allowed="--template alone, or with --lang and --json",
        )
        from memfit.decision.case import case_template

        text = case_template(language_code)
        emit({"template": text}) if output.json else print(text, end="")
        return
    quiet_libraries()
    from memfit.store import Store
    from memfit.types import serialization
    from memfit.workflows import proof_of_concept

    records = Store(store.store)
    if effort.attended_minutes is not None:
        proof_of_concept.store_attended_minutes(records, options.poc, effort.attended_minutes)
    poc, decision = proof_of_concept.decide(
        records, poc_id=options.poc, case=options.case, lang=language_code
    )
    if output.json:
        emit({"poc_id": poc.poc_id, "decision": serialization.to_plain(decision)})
    else:
        from memfit.report.decision_terminal import print_decision

        print_decision(poc, decision, lang=language_code, console=console())
