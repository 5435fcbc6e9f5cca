"""``memfit lint``: find known misconfigurations in files of other libraries. It does not load torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import OutputOptions
from memfit.cli.output import check_language, console, emit, refuse_options
from memfit.cli.request import writable
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import memfit.lint.check

_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LintOptions:
    """The configuration files to check, the number of processes that train, whether each file is a set-up of
    its own, the file for the findings, and a rule to explain instead."""

    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...",
            help="Configuration files and launch scripts that belong to one set-up, at most one of each "
            "kind (but see --each): DeepSpeed, Accelerate, Trainer, Megatron-LM, torchtitan, OpenFold, "
            "Axolotl, LLaMA-Factory, Lightning, MACE. Configuration files that they name are read as well. "
            "At least one is needed, except with --explain. Of a folder of `memfit export`, all files can "
            "be given: those for which there are no rules are skipped.",
        ),
    ] = None
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of processes that train. It replaces the number in the files, if they have one. "
            "Default: the number in the files; unknown if they have none. Not with --explain.",
        ),
    ] = None
    each: Annotated[
        bool,
        typer.Option(
            "--each",
            help="Check each file as a set-up of its own, so that there may be several of a kind. Default: "
            "all files together are one set-up. Not with --explain.",
        ),
    ] = False
    sarif: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the findings to this file as SARIF 2.1.0, for code hosts and editors, with the "
            "line of the setting where it is known. It is overwritten if it exists. Default: no file. Not "
            "with --explain.",
        ),
    ] = None
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Explain the rule of this name, as findings have it in brackets, and check nothing: what it "
            "reports and when, what to do, and where the problem was reported or is documented. Not with "
            "FILE, --ranks, --each or --sarif.",
        ),
    ] = None


def lint(options: LintOptions, output: OutputOptions) -> None:
    """Find contradictions, options without effect and known pitfalls in configuration files.

    Reads DeepSpeed JSON, Accelerate YAML, Hugging Face TrainingArguments, Megatron-LM arguments, torchtitan
    TOML, OpenFold's settings, Axolotl YAML, LLaMA-Factory YAML, YAML of Lightning's command line and flags of
    mace_run_train. Without --each, all files together are one set-up. Exits with code 1 if one of the
    findings is an error; warnings and notes do not change the exit code."""
    language_code = check_language(output.lang)
    if options.explain is not None:
        others = {"FILE": options.files, "--ranks": options.ranks, "--each": options.each}
        refuse_options(others | {"--sarif": options.sarif}, "cannot be used with --explain")
        _explain(options.explain, lang=language_code, as_json=output.json)
        return
    if not options.files:
        raise UserError(
            "no configuration file is given",
            allowed="memfit lint FILE..., or memfit lint --explain RULE",
        )
    if options.sarif is not None:
        writable(options.sarif)
    from memfit.lint.check import check
    from memfit.lint.parse import read

    files = _of_libraries(options.files)
    setups = [
        read(group, ranks=options.ranks) for group in ([[f] for f in files] if options.each else [files])
    ]
    findings = [finding for setup in setups for finding in check(setup, lang=language_code)]
    if options.sarif is not None:
        _write_sarif(options.sarif, findings)
    if output.json:
        checked = dict.fromkeys(file for setup in setups for file in setup.files)
        emit({"files": list(checked), "findings": findings_view(findings)})
    else:
        print_findings(findings, lang=language_code)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


def _explain(name: str, *, lang: str, as_json: bool) -> None:
    """Print what the rule ``name`` reports. Raises UserError for an unknown rule."""
    from rich.padding import Padding
    from rich.text import Text

    from memfit.lint.check import explain
    from memfit.report.words import load_words

    rule = explain(name, lang=lang)
    if as_json:
        emit(dataclasses.asdict(rule) | {"severity": str(rule.severity)})
        return
    output, severity = console(), load_words(lang).get(f"lint.{rule.severity}")
    kinds = ", ".join(rule.kinds)
    output.print(Text.assemble(f"{name}: ", (severity, _STYLES[rule.severity]), f" ({kinds})"))
    for text in (rule.says, rule.do, rule.when, *rule.links):
        output.print(Padding(Text(text, style="dim" if text in rule.links else ""), (0, 0, 0, 4)))


def _write_sarif(path: Path, findings: Sequence[memfit.lint.check.Finding]) -> None:
    from memfit import __version__
    from memfit.files.replace import write_whole
    from memfit.report.sarif import SarifResult, sarif_text

    results = []
    for finding in findings:
        file = Path(finding.file)
        line, column = _position(file, finding.says)
        results.append(
            SarifResult(
                rule=finding.rule,
                level=str(finding.severity),
                text=finding.says,
                advice=finding.do,
                file=file,
                line=line,
                column=column,
                link=next(iter(finding.links), ""),
            )
        )
    write_whole(path, sarif_text(results, version=__version__).encode())


def _position(file: Path, sentence: str) -> tuple[int | None, int | None]:
    from memfit.lint.location import locate
    from memfit.lint.parse import read_data

    text, _ = read_data(file)
    return locate(text, file.suffix, sentence) or (None, None)


# Files of an export that are not linted: memfit, a cluster or an engine without rules reads them.
_NOT_LINTED = frozenset(
    {
        "export.json",
        "run.json",
        "plan.yaml",
        "README.md",
        "torchrun.sh",
        "job.sbatch",
        "job.yaml",
        "task.yaml",
        "colossalai.json",
        "fairscale.json",
        "torchtitan.args",
    }
)


def _of_libraries(files: Sequence[Path]) -> Sequence[Path]:
    """Return ``files`` without those in a folder that `memfit export` wrote for which lint has no rules:
    files that memfit, a cluster or an engine without rules reads, such as run.json, and Python files. Files
    in other folders are never left out. Raises UserError if no file is left."""
    from memfit.export.write import MANIFEST

    def is_left_out(file: Path) -> bool:
        has_no_rules = file.name in _NOT_LINTED or file.suffix == ".py"
        return has_no_rules and (file.parent / MANIFEST).is_file()

    library_files = [f for f in files if not is_left_out(f)]
    if not library_files:
        raise UserError(
            f"memfit lint has no rules for any of the given files: {', '.join(map(str, files))}; `memfit "
            "export` wrote them for memfit, a cluster or an engine without rules, or copied Python files",
            allowed="at least one configuration file of a library that `memfit lint --help` names; such "
            "files of an export are then skipped",
        )
    return library_files


def findings_view(findings: Sequence[memfit.lint.check.Finding]) -> list[dict[str, Any]]:
    """Return each finding as plain data for ``--json``: its "rule", "severity", "file", "says", "do" and
    "links"."""
    return [dataclasses.asdict(f) | {"severity": str(f.severity)} for f in findings]


def print_findings(findings: Sequence[memfit.lint.check.Finding], *, lang: str) -> None:
    """Print each finding with its advice and links, or one line that there are none. ``lang``: the language
    of that line and of the severities; the texts of the findings are printed as they are."""
    from rich.padding import Padding
    from rich.text import Text

    from memfit.report.words import load_words

    words, output = load_words(lang), console()
    for f in findings:
        severity = words.get(f"lint.{f.severity}")
        output.print(Text.assemble((severity, _STYLES[f.severity]), f" {f.file}: {f.says} [{f.rule}]"))
        output.print(Padding(Text(f.do), (0, 0, 0, 4)))
        for link in f.links:
            output.print(Padding(Text(link, style="dim"), (0, 0, 0, 4)))
    if not findings:
        output.print(Text(words.get("lint.clean")))
