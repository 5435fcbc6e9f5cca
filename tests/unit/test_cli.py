"""The command line as a person or a script meets it: exit codes, one-line errors, one JSON object."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import report_fixture as fixture

import memfit.workflows
from memfit.cli import app, doctor, main, views
from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import SearchOptions
from memfit.cli.output import check_choice
from memfit.cli.progress import Bars
from memfit.report.explain import TracedEstimate
from memfit.runtime import devices
from memfit.types.errors import NothingFits, RunError, UserError
from memfit.types.job import JobRef
from memfit.types.machine import Device, Fact, Machine
from memfit.types.plan import Accuracy, Plan, use
from memfit.types.result import Measurement, OutcomeKind, Poc, Run
from memfit.types.trace import Allocation, Category, Phase, PhaseSpan, Trace
from memfit.verify.aggregate import median_step_s

POC: Poc = fixture.full_poc()
TRACE = Trace(
    device="cpu",
    steps=1,
    ops=(),
    parameter_count=1,
    trainable_count=1,
    spans=(PhaseSpan(phase=Phase.FORWARD, step=0, start=0, end=9),),
    allocations=(
        Allocation(
            start=1,
            end=None,
            size_bytes=64,
            category=Category.ACTIVATION,
            phase=Phase.FORWARD,
            step=0,
            module="head",
            op="aten.mm.default",
            line="mine.py:3",
        ),
    ),
)
COMMANDS = [name for commands in app.COMMANDS.values() for name in commands]


class FakePipeline(SimpleNamespace):
    """Returns the hand-made results and records what it was called with."""

    asked: dict[str, Any]

    def find_plan(self, request: Any, progress: Any, *, measure_s: float | None = None) -> Any:
        self.asked = {"request": request}
        progress("search", 0, 2, "plain")
        return SimpleNamespace(result=POC.search)

    def anatomy(self, request: Any, plans: Any, progress: Any, **rest: Any) -> Any:
        self.asked = {"request": request, "plan": plans[0], "plans": plans, **rest}
        return [
            TracedEstimate(estimate=POC.search.baseline.estimate, trace=TRACE, peak_clock=1) for _ in plans
        ]

    def run_plan(self, request: Any, plan: Plan, **rest: Any) -> Run:
        self.asked = {"request": request, "plan": plan, **rest}
        return POC.runs[0]

    def poc(self, request: Any, **rest: Any) -> Poc:
        self.asked = {"request": request, **rest}
        return POC

    def report(self, store: Any, **rest: Any) -> Path:
        self.asked = {"store": store, **rest}
        return Path("memfit-x.html")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    fake = FakePipeline()
    for module in ("plan", "proof_of_concept"):
        monkeypatch.setitem(sys.modules, f"memfit.workflows.{module}", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(memfit.workflows, module, fake, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return fake


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command line; exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


# --- help


def test_the_help_names_all_commands_and_imports_no_heavy_library() -> None:
    code = (
        "import sys; from memfit.cli import main; code = main(['--help'])\n"
        "heavy = [m for m in ('torch', 'numpy', 'rich', 'pydantic', 'transformers') if m in sys.modules]\n"
        "print(code, heavy, file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stderr.split() == ["0", "[]"]
    assert all(f"  {command}" in child.stdout for command in COMMANDS)
    assert all(f"\n{task}:\n" in child.stdout for task in app.COMMANDS)


def test_there_are_at_most_fifteen_commands_whose_lines_in_the_help_are_not_cut(ask: Ask) -> None:
    assert len(COMMANDS) <= 15
    assert "..." not in ask("--help")[1].replace("[ARGS]...", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_help_with_its_options(command: str, ask: Ask) -> None:
    code, out, err = ask(command, "--help")
    assert (code, err) == (0, "")
    assert "--json" in out


def test_without_a_command_the_help_is_printed(ask: Ask) -> None:
    assert ask() == ask("--help")
    assert ask("--version") == (0, f"memfit {memfit.__version__}\n", "")


def test_the_help_names_the_goals_and_accuracies_that_exist() -> None:
    import typing

    from memfit.planner.selection import Objective

    hints = typing.get_type_hints(SearchOptions, include_extras=True)
    assert hints["goal"].__metadata__[0].metavar == "|".join(Objective)
    assert hints["accuracy"].__metadata__[0].metavar == "|".join(Accuracy)


def test_the_help_of_plan_names_the_options_that_each_mode_refuses() -> None:
    import typer.main

    from memfit.cli.plan import _REFUSED

    params = typer.main.get_command(app.app).commands["plan"].params  # type: ignore[attr-defined]
    helps = {spelling: p.help for p in params if hasattr(p, "help") for spelling in p.opts}
    refused = [(mode, option) for mode, (options, _) in _REFUSED.items() for option in options]
    refused += [("--measure", "--from"), ("--measure", "--diff"), ("--diff", "--largest")]
    refused += [(option, mode) for mode, option in refused if option in _REFUSED]
    for mode, option in refused:
        only_with = helps[option].startswith(("With --largest", "With --buckets"))
        assert only_with or option in helps[mode].partition("Not with")[2], (mode, option)


def test_options_that_the_help_of_estimate_names_for_no_command_are_refused_with_one(ask: Ask) -> None:
    import typer.main

    command = typer.main.get_command(app.app).commands["estimate"]  # type: ignore[attr-defined]
    named = set(
        re.findall(r"--[a-z-]+", command.help.partition("Only with a COMMAND")[2].partition("\n\n")[0])
    )
    options = {p.opts[0]: p for p in command.params if p.opts[0].startswith("--")}
    assert named <= options.keys()
    for name in options.keys() - named - {"--lines"}:
        value = () if getattr(options[name], "is_flag", False) else ("2",)
        code, out, err = ask("estimate", name, *value, "--", "python", "missing.py")
        assert (code, out) == (2, "")
        assert f"{name} cannot be used with a COMMAND" in err


@pytest.mark.parametrize("dashes", [(), ("--",)], ids=["without --", "with --"])
def test_options_after_a_command_of_estimate_are_its_own(
    dashes: tuple[str, ...], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read as memfit's without "--", and refused: "--batch cannot be used with a COMMAND"."""
    predicted = mock.Mock()
    monkeypatch.setattr("memfit.cli.estimate.estimate_command", predicted)
    words = ("python", "my_unet.py", "--batch", "4", "--on", "disk", "--own", "-x")
    assert ask("estimate", "--on", "RTX-4090", *dashes, *words) == (0, "", "")
    assert predicted.call_args.args[0] == [*words]
    assert predicted.call_args.args[4] == "RTX-4090"


# --- the user's mistakes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("pln", "did you mean 'plan'?"),
        ("poc --sedes 3", "--seeds"),
        ("estimate", "neither a job nor a command is given"),
        ("estimate protien-ss", "did you mean 'protein-ss'?"),
        ("estimate protein-ss --plans", "--plans cannot be used with a JOB"),
        ("estimate --steps 3 --lines -- python x.py", "--steps cannot be used with a COMMAND"),
        ("estimate protein-ss --column n", "--column cannot be used without --lengths"),
        ("estimate --lengths f --steps 3", "--steps cannot be used with --lengths"),
        ("estimate protein-ss --engines --html a.html", "--html cannot be used with --engines"),
        ("list job", "did you mean 'jobs'?"),
        ("list jobs H100-SXM", "takes no name"),
        ("doctor --into folder", "--into needs --install"),
        ("decide --size paper", "--size cannot be used without a stage"),
        ("decide --memory 3GiB --threads 2", "--memory, --threads cannot be used without a stage"),
        ("decide --template --attended-minutes 3", "--attended-minutes cannot be used with --template"),
        ("decide --template --store s.sqlite3", "--store cannot be used with --template"),
        ("estimate protein-ss --dim crop=1 --dim crop=2", "--dim crop is given twice"),
        (
            "estimate protein-ss --dim batch=8 --batch 4",
            "--dim batch=8 cannot be used: --batch sets the batch",
        ),
        (f"estimate protein-ss --dim crop={'9' * 5000}", "allowed: NAME=N"),
        ("plan --diff x.py --step 2", "--step cannot be used with --diff"),
        ("plan --largest batch --lang ja", "in English only"),
        ("export --to torchrun --recommended --out no/such/folder", "there is no folder no/such"),
        ("decide --gates default --template", "--template cannot be used with --gates"),
        ("record --compare a b --schema", "exclude each other"),
        ("record --compare a", "see `memfit record --help`"),
        ("--nope", "see `memfit --help`"),
        ("plan --steps 0", "--steps"),
        ("plan --batch many", "--batch"),
        ("plan --threads -1", "--threads"),
        ("poc --seeds 0", "--seeds"),
        ("run --seed -1", "--seed"),
        ("run --recommended --stall-limit soon", "not a time: 'soon'"),
        ("run --recommended --grace soon", "not a time: 'soon'"),
        ("run --recommended --store .", "the store . cannot be used"),
        ("run --recommended --resume no/such", "there is no complete checkpoint in no/such"),
        (f"run --recommended --save {__file__}", "is a file"),
        ("plan --memory 12parsecs", "not a memory size: '12parsecs'"),
        ("plan --goal fastst", "did you mean 'fastest'?"),
        ("plan --accuracy roundng", "did you mean 'rounding'?"),
        ("poc --lang jp", "did you mean 'ja'?"),
        ("plan --on H10", "H100-SXM"),
        ("plan --on nowhere.toml", "cannot read nowhere.toml: No such file"),
        ("plan --place atlantis", "atlantis"),
        ("estimate protein-ss --plan missing.yaml", "missing.yaml: No such file"),
        ("estimate a.yaml b.yaml c.yaml", "3 plan files"),
        ("estimate a.yaml b.yaml --html x.html", "show one plan"),
        ("estimate a.yaml --recommended", "the plan is given both as a file and by"),
        ("estimate protein-ss --snapshot no/such/folder.pickle", "there is no folder no/such"),
        ("run --plan missing.yaml --recommended", "--plan and --recommended"),
        ("plan --save no/such/folder.yaml", "there is no folder no/such"),
        ("poc --out no/such/folder.html", "there is no folder no/such"),
        ("report --out .", "is a folder"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_exit_code_two(
    line: str, told: str, ask: Ask, pipeline: FakePipeline
) -> None:
    code, out, err = ask(*line.split())
    assert code == 2
    assert out == ""
    assert told in err
    assert err.startswith("memfit: ")
    assert err.count("\n") == 1


def test_the_template_of_a_case_is_one_json_object_with_json(ask: Ask) -> None:
    code, out, _ = ask("decide", "--template", "--json")
    assert (code, json.loads(out)["template"]) == (0, ask("decide", "--template")[1])
    assert 'currency = "JPY"' in ask("decide", "--template", "--lang", "ja")[1]


def test_a_mistake_with_json_is_also_reported_as_one_json_object(ask: Ask, pipeline: FakePipeline) -> None:
    for line in ("plan --memory 12parsecs --json", "plan --json --stepps 3", "plam --json"):
        code, out, err = ask(*line.split())
        error = json.loads(out)["error"]
        assert (code, error["exit_code"]) == (2, 2)
        assert err == f"memfit: {error['message']}\n"


def test_an_unknown_key_in_a_plan_gets_a_suggestion(ask: Ask, pipeline: FakePipeline, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("techniqes: {}\n")
    code, _, err = ask("estimate", "protein-ss", "--plan", str(file))
    assert code == 2
    assert "did you mean 'techniques'?" in err


def test_a_plan_file_is_overwritten_only_with_force(ask: Ask, pipeline: FakePipeline, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    assert ask("plan", "--save", str(file))[0] == 2
    assert file.read_text() == "mine"
    assert ask("plan", "--save", str(file), "--force")[0] == 0
    assert "techniques:" in file.read_text()


def test_a_plan_file_of_a_script_is_not_overwritten(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    code, _, err = ask("estimate", "--plans", "--save", str(file), "--", "python", "train.py")
    assert code == 2
    hint = f"delete it (rm {file}) and repeat the command, or name another file"
    assert err == f"memfit: {file} already exists; {hint}\n"
    assert file.read_text() == "mine"


def test_one_of_suggests_only_similar_values() -> None:
    assert check_choice("--goal", "fastest", ["fastest"]) == "fastest"
    with pytest.raises(UserError) as caught:
        check_choice("--goal", "zzz", ["fastest"])
    assert "did you mean" not in str(caught.value)


# --- other exit codes


def _raise(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def test_when_nothing_fits_the_exit_code_is_three_and_the_smallest_need_is_named(
    ask: Ask, pipeline: FakePipeline
) -> None:
    pipeline.find_plan = _raise(NothingFits(cap_bytes=1024, least_bytes=4096, plan_text="plain"))
    code, out, err = ask("plan", "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (3, 3)
    assert "4096 B" in err.splitlines()[-1]


def test_a_broken_run_exits_with_code_one(ask: Ask, pipeline: FakePipeline) -> None:
    pipeline.find_plan = _raise(RunError("the worker broke"))
    assert ask("plan")[0] == 1


def test_an_internal_error_keeps_its_traceback_and_is_reported_as_json(
    ask: Ask, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.find_plan = _raise(ZeroDivisionError("inside"))
    with pytest.raises(ZeroDivisionError):
        ask("plan", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "error": {"message": "ZeroDivisionError: inside", "exit_code": 1}
    }


def test_an_interruption_is_reported_in_one_line_with_exit_code_130(ask: Ask, pipeline: FakePipeline) -> None:
    pipeline.poc = _raise(KeyboardInterrupt())  # type: ignore[method-assign]
    code, _, err = ask("poc")
    assert code == 130
    assert err.splitlines()[-1].startswith("memfit: interrupted")


def test_a_closed_output_pipe_exits_without_a_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "memfit", "--version"]
    child = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (child.returncode, child.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["list machines", "list machines --json"])
def test_an_output_on_a_full_disk_is_reported_in_one_line(words: str) -> None:
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "memfit", *words.split()], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (child.returncode, child.stderr) == (1, b"memfit: cannot write: No space left on device\n")


def test_an_output_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    command = f"ulimit -f 1; exec {sys.executable} -B -m memfit list machines --json"
    with (tmp_path / "machines.json").open("w") as output:
        child = subprocess.run(["bash", "-c", command], stdout=output, stderr=subprocess.PIPE, check=False)
    assert (child.returncode, child.stderr) == (1, b"memfit: cannot write: File too large\n")


def test_a_closed_standard_output_is_no_error() -> None:
    command = f"{sys.executable} -m memfit list machines --json >&-"
    child = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, check=False)
    assert (child.returncode, child.stderr) == (0, b"")


@pytest.mark.usefixtures("pipeline")
def test_an_output_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["estimate", "char-lm", "--lang", "ja"]) == 0
    assert b"\\u" in output.buffer.getvalue()


@pytest.mark.parametrize(
    "words", [("lint",), ("estimate", "char-lm", "--html"), ("watch",), ("run", "char-lm", "--plan")]
)
def test_a_name_that_is_too_long_is_reported_in_one_line(words: tuple[str, ...], ask: Ask) -> None:
    code, _, err = ask(*words, "x" * 300 + ".py")
    assert code == 2
    assert err.count("\n") == 1
    assert "too long" in err.lower()


# --- requests to the pipeline


@pytest.mark.parametrize(("memory", "used_bytes"), [("20GiB", 20 * 2**30), ("24GiB", 25_383_256_719)])
def test_more_memory_than_the_gpu_has_is_not_planned_with(
    memory: str, used_bytes: int, pipeline: FakePipeline, ask: Ask
) -> None:
    code, _, err = ask("plan", "char-lm", "--on", "RTX-4090", "--memory", memory)
    assert code == 0
    assert pipeline.asked["request"].cap_bytes == used_bytes
    warning = "memfit: warning: --memory 24GiB is more than RTX-4090 has: 23.64 GiB is used\n"
    assert (warning in err) == (memory == "24GiB")


def test_command_line_options_become_the_request(ask: Ask, pipeline: FakePipeline, tmp_path: Path) -> None:
    line = (
        "plan protein-ss --size 8M --batch 4 --steps 7 --memory 1.5GiB --goal smallest --accuracy any "
        "--on 8xH100-SXM --place japan --threads 2"
    )
    assert ask(*line.split())[0] == 0
    request = pipeline.asked["request"]
    assert request.job_ref == JobRef(spec="protein-ss", size="8M", batch=4, steps=7)
    assert (request.cap_bytes, request.goal, request.accuracy) == (1536 * 2**20, "smallest", "any")
    assert (request.machine.device_count, request.machine.place.name, request.threads) == (8, "japan", 2)


def test_poc_receives_its_store_seeds_and_command_line(
    ask: Ask, pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memfit", "poc", "--seeds", "5"])
    assert ask("poc", "--seeds", "5", "--store", str(tmp_path / "s.sqlite3"))[0] == 0
    assert pipeline.asked["store"].path == tmp_path / "s.sqlite3"
    assert (pipeline.asked["seeds"], pipeline.asked["command"]) == (5, "memfit poc --seeds 5")
    assert pipeline.asked["request"].is_here


def test_an_estimate_takes_the_plain_plan_a_plan_file_or_the_recommended_plan(
    ask: Ask, pipeline: FakePipeline, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("techniques: {bf16-autocast: {}}\n")
    for words, plan in (
        ([], Plan()),
        (["--plan", str(file)], Plan(uses=(use("bf16-autocast"),))),
        (["--recommended"], fixture.RECOMMENDED),
    ):
        assert ask("estimate", "protein-ss", *words)[0] == 0
        assert pipeline.asked["plan"] == plan


def test_an_estimate_writes_the_requested_files_and_names_source_lines_unless_disabled(
    ask: Ask, pipeline: FakePipeline, tmp_path: Path
) -> None:
    page, pickled, chrome = (tmp_path / name for name in ("a.html", "b.pickle", "c.json"))
    words = ("--html", str(page), "--snapshot", str(pickled), "--perfetto", str(chrome), "--json")
    code, out, _ = ask("estimate", "protein-ss", *words)
    assert code == 0
    assert json.loads(out)["contributors"][0]["line"] == "mine.py:3"
    assert page.read_text().startswith("<!doctype html>")
    assert pickled.read_bytes()[:2] == b"\x80\x04"
    assert json.loads(chrome.read_text())["traceEvents"]
    assert pipeline.asked["lines"]
    ask("estimate", "protein-ss", "--no-lines")
    assert not pipeline.asked["lines"]


def test_two_plan_files_are_compared_with_or_without_a_job(
    ask: Ask, pipeline: FakePipeline, tmp_path: Path
) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("techniques: {}\n")
    other.write_text("techniques: {bf16-autocast: {}}\n")
    for words, job in (([], "protein-ss"), (["char-lm"], "char-lm")):
        code, out, _ = ask("estimate", *words, str(one), str(other), "--json")
        assert (code, pipeline.asked["request"].job_ref.spec) == (0, job)
        assert pipeline.asked["plans"] == [Plan(), Plan(uses=(use("bf16-autocast"),))]
        assert json.loads(out)["change_bytes"] == 0
    assert ask("estimate", str(one), str(other))[1].splitlines()[1] == "Why they differ"


@pytest.mark.parametrize(
    ("words", "capped"),
    [("", False), ("--memory 1GiB", True), ("--memory 1GiB --no-capped", False), ("--capped", True)],
)
def test_a_run_is_capped_when_memory_is_given(
    words: str, capped: bool, ask: Ask, pipeline: FakePipeline
) -> None:
    ask("run", *words.split())
    assert pipeline.asked["capped"] is capped


def test_a_run_that_runs_out_of_memory_exits_with_code_one(ask: Ask, pipeline: FakePipeline) -> None:
    assert POC.runs[0].measurement.outcome is OutcomeKind.OOM
    code, out, _ = ask("run")
    assert code == 1
    assert "oom under" in out


def test_results_are_printed_in_the_requested_language(ask: Ask, pipeline: FakePipeline) -> None:
    for command in (["plan"], ["estimate", "protein-ss"], ["poc"]):
        english, japanese = ask(*command)[1], ask(*command, "--lang", "ja")[1]
        assert english != japanese
        assert any("\u3040" <= sign <= "\u30ff" for sign in japanese)  # kana


# --- JSON


@pytest.mark.parametrize(
    "command",
    ["poc", "plan", "estimate protein-ss", "run", "report", "list jobs", "list techniques", "list machines"],
)
def test_json_output_is_one_object_without_progress_lines(
    command: str, ask: Ask, pipeline: FakePipeline
) -> None:
    _, out, _ = ask(*command.split(), "--json")
    assert isinstance(json.loads(out), dict)


def test_the_search_view_gives_each_plan_beside_its_estimate() -> None:
    view = views.search_view(POC.search)
    best, expected = view["recommended"], POC.search.recommended
    assert expected is not None
    assert best["plan"] == fixture.RECOMMENDED.to_dict()
    assert (
        best["estimate"]["allocated_bytes"]["value"] == POC.search.recommended.estimate.allocated_bytes.value
    )
    assert "plan" not in best["estimate"]
    assert best["fits"] is True
    assert best["effect"] == "E2"
    assert best["reasons"][0]["kind"] == "saves"
    assert len(view["frontier"]) == len(POC.search.frontier)
    assert view["cap_bytes"] == fixture.CAP


def test_the_poc_view_keeps_its_key_names() -> None:
    view = views.poc_view(POC)
    promised = {"cap_bytes", "runs", "verdict", "reproducible", "effort", "report"}
    assert promised <= set(view)
    of_run = {
        "name",
        "role",
        "capped",
        "seed",
        "outcome",
        "predicted_peak_bytes",
        "measured_peak_bytes",
        "predicted_step_s",
        "step_s",
        "losses",
        "metric",
    }
    assert all(of_run <= set(run) for run in view["runs"])
    first = view["runs"][0]
    assert (first["role"], first["capped"], first["outcome"]) == ("baseline", True, "oom")
    named = {v.name: v.verdict.kind.value for v in POC.verdicts}
    assert view["verdict"] == named["recommended"]
    assert json.loads(json.dumps(view)) == view


@pytest.mark.parametrize(
    ("times_s", "median_s"), [((), None), ((9.0,), 9.0), ((9.0, 8.0), 8.5), ((9.0, 8.0, 1.0, 2.0, 3.0), 2.0)]
)
def test_the_step_time_is_the_median_without_the_first_two_steps(
    times_s: tuple[float, ...], median_s: float | None
) -> None:
    assert median_step_s(Measurement(outcome=OutcomeKind.OK, step_s=times_s)) == median_s


# --- progress


def test_without_a_terminal_long_stages_print_a_line_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (
        ("_TICK_S", 0.005),
        ("_SILENT_S", 0.1),
        ("_STAGE_S", 0.05),
        ("_LINE_EVERY_S", 0.25),
    ):
        monkeypatch.setattr(f"memfit.cli.progress.{name}", seconds)
    with Bars("en") as bars:
        bars("search", 0, 9, "plain")  # ends at once, within the silent period: no line
        bars("run", 0, 4, "baseline")
        bars("run", 3, 4, "baseline")
        time.sleep(0.45)  # one line at 0.1 s and one 0.25 s later
        bars("run", 0, 4, "baseline: evaluate")
        bars("run", 0, 4, "recommended")
        time.sleep(0.15)  # a line after 0.05 s
    out, err = capsys.readouterr()
    assert out == ""
    told = [line.partition(" (")[0] for line in err.splitlines()]
    assert told == ["training 3/4 baseline"] * 2 + ["training 0/4 recommended"]


def test_on_a_terminal_every_ended_stage_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Bars("en") as progress:
        progress("search", 9, 10, "[/not markup]")
        for done, name in ((10, "baseline"), (4, "recommended")):
            progress("run", 0, 10, name)
            progress("run", done, 10, name)
            progress("run", 0, 10, f"{name}: evaluate")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "✓ searching plans" in text
    assert "✓ training baseline  " in text
    assert "• training recommended 4/10" in text  # it ended early, as the line shows


# --- doctor


def test_the_doctor_lists_extras_that_the_package_defines() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in doctor.EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in extras[extra])


def test_the_doctor_imports_packages_and_continues_after_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memfit_broken.py").write_text("raise RuntimeError('half installed')")
    (tmp_path / "memfit_fatal.py").write_text("import os\nos._exit(7)")
    (tmp_path / "memfit_sound.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["memfit_broken", "memfit_sound", "memfit_fatal"]
    assert dict(doctor.broken_imports(names)) == {
        "memfit_broken": "RuntimeError: half installed",
        "memfit_fatal": "exit code 7",
    }


def test_the_doctor_names_the_slow_module_whatever_the_modules_before_it_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "print('loading memfit_slow')\nprint('memfit_slow')\nprint('half a line', end='', flush=True)"
    (tmp_path / "memfit_talks.py").write_text(text)
    (tmp_path / "memfit_slow.py").write_text(f"import time\n{text}\ntime.sleep(60)")
    (tmp_path / "memfit_broken.py").write_text(f"{text}\nraise RuntimeError('half installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_IMPORT_LIMIT_S", 2.0)
    assert dict(doctor.broken_imports(["memfit_talks", "memfit_slow", "memfit_broken"])) == {
        "memfit_slow": "the import did not finish within 2 s",
        "memfit_broken": "RuntimeError: half installed",
    }


def test_the_doctor_reports_techniques_that_a_missing_package_disables() -> None:
    packages = doctor.packages({"no-such-package-here": "lowbit"})
    assert [(p.ok, p.fix) for p in packages] == [(False, "pip install 'memfit[lowbit]'")]
    missing = [doctor.Check(name="peft", ok=False, detail="not installed", fix="pip install 'memfit[lora]'")]
    usable = {t.name: t for t in doctor.techniques(missing)}
    assert usable["bf16-autocast"].ok
    assert not usable["lora"].ok
    assert usable["lora"].fix == "pip install 'memfit[lora]'"


@pytest.mark.parametrize(
    ("build", "detail", "fix"),
    [
        ("", "this build of torch cannot use it", "--index-url URL"),
        ("CUDA 12.8", "this build of torch cannot use it", "--index-url URL"),
        ("ROCm 6.4", "torch is built for ROCm 6.4, but it finds no device", "whether the driver supports"),
    ],
)
def test_the_doctor_knows_whether_torch_is_built_for_the_driver(
    build: str, detail: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    version.write_text("6.10.5\n")
    monkeypatch.setattr(devices, "_DRIVERS", {"AMD": (version, version)})
    monkeypatch.setattr(devices, "torch_build", lambda: build)
    driver, accelerator = doctor.accelerator_checks()
    assert driver.detail == "AMD, version 6.10.5"
    assert not accelerator.ok
    assert detail in accelerator.detail
    assert fix in accelerator.fix


def test_the_doctor_reports_techniques_that_the_device_cannot_run() -> None:
    device = Device(name="Another GPU", kind="another", memory_bytes=Fact(value=2**30, source="", date=""))
    checks = {t.name: t for t in doctor.techniques([], Machine(name="here", device=device))}
    for name in ("compile", "float8-linear"):
        assert not checks[name].ok
        assert checks[name].detail.startswith("cannot run on Another GPU: ")
    no_kernels = "not proposed on Another GPU: no kernels for it in "
    for name in ("adamw-8bit", "adamw-paged"):  # not refused: some have slow kernels for every device
        assert not checks[name].ok
        assert checks[name].detail.startswith(f"{no_kernels}bitsandbytes: ")
    assert checks["qlora"].detail.startswith(f"{no_kernels}peft or bitsandbytes: ")
    assert checks["bf16-autocast"].ok


def test_the_doctor_works_without_torch_and_optional_packages(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("torch", "memfit.runtime.counting_allocator", "memfit.runtime.memory"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    code, out, _ = ask("doctor", "--json", "--store", str(tmp_path / "s.sqlite3"))
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"machine", "tools", "packages", "techniques", "engines", "files"}
    assert not any(package["ok"] for package in found["packages"])


def test_the_doctor_prints_machine_techniques_and_store_in_a_terminal(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "packages", lambda extras: [])
    code, out, _ = ask("doctor")
    assert code == 0
    for word in ("machine", "memory cap", "energy meter", "activation-checkpointing", "store"):
        assert word in out


# --- log messages of libraries


def test_only_known_harmless_library_warnings_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    quiet_libraries()
    logging.getLogger("torchao").warning("Failed to load _C_mxfp8.so: wrong processor")
    logging.getLogger("torchao").warning("something is really wrong")
    assert [r.getMessage() for r in caplog.records] == ["something is really wrong"]


PRINTING = """
import torch
from memfit import Job
print("loading data")
job = Job(name="x", build_model=lambda: torch.nn.Linear(4, 4),
          make_batch=lambda s, d: print(s) or torch.ones(2, 4),
          loss=lambda model, batch: model(batch).mean(), batch_size=2)
"""


def test_what_a_job_prints_is_not_in_the_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(PRINTING)
    assert main(["estimate", f"{tmp_path / 'own.py'}:job", "--on", "RTX-4090", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)
    assert "loading data" in err


BROKEN = """
from memfit import Job
job = Job(name="x", build_model=lambda: {}["zz"], make_batch=lambda s, d: (), loss=max, batch_size=1)
"""


@pytest.mark.parametrize(
    ("body", "told"),
    [("raise SystemExit(0)", "SystemExit: 0"), (BROKEN, "KeyError: 'zz'")],
    ids=["exits", "fails"],
)
def test_errors_in_the_users_own_code_are_reported_in_one_line(
    body: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(body)
    assert main(["estimate", f"{tmp_path / 'own.py'}:job"]) == 2
    err = capfd.readouterr().err
    assert told in err
    lines = err.strip().splitlines()  # on a busy machine a progress line on loading may come first
    assert len([line for line in lines if not line.startswith("loading (")]) == 1


def test_the_doctor_names_every_extra_that_a_technique_lacks() -> None:
    from memfit.cli.doctor import Check, techniques

    lacking = [Check(name=n, ok=False, detail="not installed", fix="one") for n in ("peft", "bitsandbytes")]
    fixes = {check.name: check.fix for check in techniques(lacking)}
    assert fixes["qlora"] == "pip install 'memfit[lora,lowbit]'"
    assert fixes["lora"] == "one"
