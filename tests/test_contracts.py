"""Rules for the whole code base, checked on its source and its imports."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
import pkgutil
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grimp
import pytest
import yaml

import memfit
import memfit.types

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "memfit"
FILES = sorted(SRC.rglob("*.py"))
WITHOUT_TORCH = (
    "types",
    "catalog",
    "cost",
    "engines",
    "lint",
    "verify",
    "store",
    "report",
    "export",
    "planner.selection",
    "planner.plan_space",
    "planner.parallelism_grid",
    "runtime.child_process",
    "runtime.restart",
    "runtime.ranks",
    "runtime.engine_environment",
)
IN_ENGINES = (".step", ".gpt")  # the engines' own training steps, which run in the worker
# Words that are too vague to name a module.
BANNED = {
    "given",
    "beside",
    "heard",
    "held",
    "told",
    "found",
    "made",
    "settled",
    "lens",
    "shadows",
    "tape",
    "ledger",
    "wire",
    "race",
    "doubts",
    "guesses",
    "second",
    "third",
    "looks",
    "across",
    "places",
}

# Who may read environment variables: one file records them, and one hands them on to a child process.
READS_ENVIRONMENT = {
    "store/environment.py",
    "store/prediction_cache.py",
    "planner/job_content.py",
    "runtime/child_process.py",
    "runtime/devices.py",
    "monitoring/command.py",
    "monitoring/startup/sitecustomize.py",
    # they set variables for the user's script, as its launcher would
    "capture/child.py",
    "capture/estimate.py",
    "capture/sandbox.py",
    "capture/script_ranks.py",
}

# Numbers that count or compare have no unit. Any other number has its unit at the end of its name.
UNITS = (
    "_bytes",
    "_s",
    "_j",
    "_w",
    "_usd",
    "_flops",
    "_tokens",
    "_steps",
    "_ratio",
    "_g",
    "_kg",
    "_mib",
    "_minutes",
    "_per_hour",
    "_per_kwh",
    "_per_batch",
    "_per_step",
    "_to_buy",
    "_count",
    "_per_host",
    "_percent",
    "_per_run",
    "_per_year",
    "_per_month",
    "_per_usd",
    "_years",
    "_hours",
    "_factor",
)
DIMENSIONLESS = {
    "allocator_retries",
    "nccl_channels",
    "nccl_multicast_channels",
    "oom_probability",
    "rank",
    "ranks",
    "node",
    "nodes",
    "per_node",
    "fullest",
    "slowest",
    "communicators",
    # counts and indices
    "batch",
    "batch_size",
    "changed_lines",
    "keep_last",
    "restarts",
    "failed_after_rank",
    "commands",
    "considered",
    "dimensions",
    "failed_attempts",
    "first_step",
    "first_differing_step",
    "packages",
    "pairs",
    "pieces",
    "times",
    "record_id",
    "repeated_micro_steps",
    "seed",
    "seeds",
    "length",
    "parameter_count",
    "sample_shape",
    "sequence_dim",
    "micro_batch",
    "more_devices",
    "multiple",
    "offloaded_tensors",
    "step",
    "steps",
    "steps_done",
    "steps_per_run",
    "threads",
    "workers",
    # ticks of the trace's clock
    "clock",
    "start",
    "end",
    "last_read",
    "needs",
    # numbers of calls and of what they made
    "calls",
    "key",
    "reads",
    # an index of one of many
    "members",
    "waits",
    # pure numbers
    "betas",
    "clip",
    "ema",
    "eps",
    "grad_norms",
    "learning_rate",
    "losses",
    "power",
    "weight_decay",
    # in the unit that stands beside them (Metric.unit, Fact's field, Interaction.quantity, Reach.quantity)
    "margin",
    "naive",
    "metric",
    "surrogates",
    "metric_naive",
    "difference",
    "low",
    "high",
    "value",
    "neither",
    "first_only",
    "second_only",
    "both",
    "plain",
    "recommended",
    # in the currency of the case (Decision.currency), or as their key says (Risk.values)
    "own",
    "setup",
    "purchase",
    "initial",
    "residual",
    "present_cost",
    "net_present_value",
    "loss",
    "spent",
    "to_spend",
    "values",
    "most",
    "ends",
    # which ways, and how many of what they are named after
    "shown",
    "slots",
    "best",
    "way",
    "back_way",
    "reference",
    "decimals",
    "machines",
    "most_machines",
    "years",
    "hours",
    # the unit itself
    "flops",
    "usd",
}


def modules(room: str = "") -> list[str]:
    parts = [p.relative_to(SRC.parent).with_suffix("").parts for p in FILES]
    names = (".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts)
    start = f"memfit.{room}" if room else "memfit"
    return sorted(n for n in names if n == start or n.startswith(f"{start}."))


def nouns() -> list[type]:
    def inside() -> Iterator[ModuleType]:
        for info in pkgutil.iter_modules(memfit.types.__path__):
            yield importlib.import_module(f"memfit.types.{info.name}")

    found = {c for module in inside() for _, c in inspect.getmembers(module, inspect.isclass)}
    return sorted(filter(dataclasses.is_dataclass, found), key=lambda c: c.__name__)


# --- what importing loads


@pytest.mark.parametrize("statement", ["import memfit", "from memfit.cli import main"])
def test_importing_memfit_loads_no_heavy_library(statement: str) -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "jinja2")
    code = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    assert _python(code) == "[]"


def test_packages_of_arithmetic_and_text_never_load_torch() -> None:
    names = [n for room in WITHOUT_TORCH for n in modules(room) if not n.endswith(IN_ENGINES)]
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'{name} loaded torch')"
    )
    assert _python(code) == ""


def test_every_module_imports_without_optional_packages() -> None:
    code = (
        "import importlib, sys\n"
        "for name in ('bitsandbytes', 'torchao', 'peft'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {[n for n in modules() if not n.endswith('__main__')]}:\n"
        "    importlib.import_module(name)"
    )
    assert _python(code) == ""


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# --- types


@pytest.mark.parametrize("noun", nouns(), ids=lambda c: c.__name__)
def test_types_are_frozen_slotted_and_keyword_only(noun: type) -> None:
    parameters = noun.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert "__slots__" in vars(noun)
    assert all(field.kw_only for field in dataclasses.fields(noun))
    assert "__dict__" not in dir(noun)


@pytest.mark.parametrize("noun", nouns(), ids=lambda c: c.__name__)
def test_numeric_fields_name_their_unit(noun: type) -> None:
    numbers = [f.name for f in dataclasses.fields(noun) if _is_number(str(f.type))]
    nameless = [n for n in numbers if n not in DIMENSIONLESS and not n.endswith(UNITS)]
    assert not nameless, f"{noun.__name__}: give {nameless} a unit, or list them as dimensionless"


def _is_number(annotation: str) -> bool:
    names = {n.id for n in ast.walk(ast.parse(annotation)) if isinstance(n, ast.Name)}
    return bool(names & {"int", "float", "Interval", "Fact"}) and "Callable" not in names


# --- source


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in FILES:
        yield file.relative_to(SRC).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def found(wanted: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for name, tree in trees():
        yield from ((name, node) for node in ast.walk(tree) if isinstance(node, wanted))


def test_only_listed_files_read_environment_variables() -> None:
    readers = {
        name
        for name, node in found(ast.Attribute)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and ast.unparse(node.value) == "os"
    }
    assert readers <= READS_ENVIRONMENT


def test_only_modules_that_run_foreign_code_catch_all_exceptions() -> None:
    wide = {
        f"{name}:{node.lineno}"
        for name, node in found(ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not (isinstance(last := node.body[-1], ast.Raise) and last.exc is None)  # cleans up, passes it on
    }
    allowed = (
        "runtime/",
        "worker/",
        "jobs/user_job.py",
        "trace/trace_extrapolation.py",
        "planner/evaluate.py",
        "planner/job_content.py",
        "trace/trace_pool.py",
        "planner/multi_device_predictor.py",
        "planner/block_traces.py",
        "model/chunking_probe.py",
        "trace/sample_dependence.py",
        "monitoring/watch.py",
        "monitoring/startup/",
        "capture/child.py",
        "capture/batch_sizes.py",
        "techniques/imported_optimizer.py",
    )
    assert not {place for place in wide if not place.startswith(allowed)}


DEVICES = {"cpu", "cuda", "xpu", "mps", "gloo", "nccl", "xccl"}


def test_no_worker_technique_or_engine_names_a_device_or_a_backend() -> None:
    """They take devices as values. Whose kernels run (`DeviceKind.kernels`) is not a device."""
    named = set()
    for name, tree in trees():
        if not name.startswith(("worker/", "techniques/", "engines/", "conformance/")):
            continue
        of_kernels = {
            id(other)
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".kernels")
            for other in node.comparators
        }
        named |= {
            f"{name}:{node.lineno}"
            for node in ast.walk(tree)
            if (isinstance(node, ast.Constant) and node.value in DEVICES and id(node) not in of_kernels)
            or (isinstance(node, ast.Attribute) and node.attr == "is_cuda")
            or (isinstance(node, ast.ImportFrom) and any(alias.name == "CUDA" for alias in node.names))
        }
    assert not named


def test_modules_have_no_import_cycles() -> None:
    """Imports for type checking, and those inside functions, count."""
    graph = grimp.build_graph("memfit", cache_dir=None)
    imported = {m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}
    order = graphlib.TopologicalSorter(imported)
    order.prepare()  # raises CycleError, which names the circle


def test_public_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for name, node in found(ast.ClassDef):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places.setdefault(node.name, []).append(name)
    same = {n: where for n, where in places.items() if len(where) > 1}
    assert same.keys() == {"Step", "MemfitCallback"}, (
        same
    )  # each engine's, and each trainer's, by the same name


def test_no_module_has_a_banned_name() -> None:
    assert not [name for name in modules() if name.rpartition(".")[2] in BANNED]


def test_no_function_uses_a_global_statement() -> None:
    assert not [name for name, _ in found(ast.Global)]


def test_most_functions_fit_at_a_glance() -> None:
    """ruff limits the statements and branches of each."""
    assert statistics.median(_length(f) for _, f in functions()) <= 10


# What a training loop has beside its model is a keyword of its own: a group of settings is harder to use.
MANY_KEYWORDS = {
    "api.py estimate",
    "api.py assert_fits",
    "api.py apply",
    "api.py largest",
    "user_loop.py apply_plan",
    "monitoring/watch.py __init__",
    "cli/plan.py plan",  # one for each group of options
    "cli/estimate.py estimate",
    "cli/estimate_job.py estimate_job",
    "trace/evoformer_kernel.py _backward",  # those of DeepSpeed's operator
    "workflows/single_run.py run_plan",
    "workflows/proof_of_concept.py poc",
    "workflows/largest.py largest",
    "workflows/largest.py _row",
    "workflows/size_pairs.py report_pairs",
}


def test_functions_take_few_arguments() -> None:
    counts = {
        f"{name} {f.name}": len([*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])
        for name, f in functions()
    }
    assert not {where for where, n in counts.items() if n > (13 if where in MANY_KEYWORDS else 8)}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, node in found(ast.AST):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, docstring excluded."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


# --- packaging


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("memfit-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {p for p in SRC.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p.relative_to(SRC.parent).as_posix() for p in ours} <= packed
    assert wheel.stat().st_size < 12e6


def test_every_file_that_states_the_version_states_the_same() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"] == memfit.__version__ == citation["version"] == newest[1]


@pytest.mark.parametrize("workflow", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda p: p.stem)
def test_workflows_run_scripts_that_exist(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    for job in jobs.values():
        assert job["runs-on"]
        assert set(job.get("needs", ())) <= set(jobs)
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            script = step.get("run", "")
            subprocess.run(["bash", "-n", "-c", script.replace("${{", "").replace("}}", "")], check=True)
            named = re.findall(r"\b(?:scripts|benchmarks)/[\w/.]+", script)
            assert not [path for path in named if not (ROOT / path).is_file()]


def test_forms_for_issues_ask_for_what_is_needed() -> None:
    for form in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        content = yaml.safe_load(form.read_text())
        if form.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(content)
        assert any(part.get("validations", {}).get("required") for part in content["body"])
