"""Does memfit install from its wheel and work in empty environments, by Python and torch version?

    python benchmarks/support_matrix.py [PYTHON:TORCH ...]    build, install, try, record, write the page
    python benchmarks/support_matrix.py --page                the page from the records only

PYTHON is a version such as 3.13, which uv finds or installs; TORCH is a version such as 2.6.0, or "newest".
For each pair, the wheel of this repository (--sdist: the sdist) is installed into a new environment in a
temporary folder that has nothing else. Then, in an empty folder and without this repository on the path, the
commands of `CHECKS` are run. Environments are removed afterwards; those with CUDA builds of torch take 7 GB.
Each pair is a line of benchmarks/records/support_matrix.jsonl; the page shows the last of each. With
--strict, the exit code is 1 if a check fails. It needs uv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RECORDS: Final = ROOT / "benchmarks" / "records" / "support_matrix.jsonl"
PAGE: Final = ROOT / "benchmarks" / "support_matrix.md"
PAIRS: Final = ("3.11:2.13.0", "3.11:newest", "3.12:2.14.1", "3.13:2.13.0", "3.13:newest", "3.14:newest")
POC: Final = ("poc", "--steps", "6", "--seeds", "1", "--within", "10s")
_IMPORTS: Final = """
import importlib, pkgutil, memfit
for module in pkgutil.walk_packages(memfit.__path__, "memfit."):
    if not module.name.endswith(("__main__", ".step", ".gpt", ".pytest_plugin")):  # steps of engines
        importlib.import_module(module.name)
"""
_ESTIMATE: Final = """
import torch, memfit
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
assert memfit.estimate(model, torch.zeros(8, 64), machine="H100-SXM").fits
"""
CHECKS: Final[Mapping[str, tuple[str, ...]]] = {
    "version": ("memfit", "--version"),
    "help": ("memfit", "--help"),
    "doctor": ("memfit", "doctor"),
    "imports": ("python", "-c", _IMPORTS),
    "estimate": ("python", "-c", _ESTIMATE),
    "poc": ("memfit", *POC),
    "alphafold2": ("memfit", "run", "alphafold2", "--steps", "2"),
}


def build(folder: Path) -> tuple[Path, Path]:
    """Build the wheel and the sdist into ``folder`` and return their paths."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def install(pair: str, package: Path, folder: Path) -> None:
    """Install ``package`` and torch into a new environment in ``folder``. Raises CalledProcessError."""
    python, torch = pair.split(":")
    venv, environment = folder / "venv", _environment(folder)
    subprocess.run(["uv", "venv", "-q", "--seed", "--python", python, venv], check=True, env=environment)
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    command = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir", package, wanted]
    subprocess.run(command, check=True, env=environment)


def check(pair: str, package: Path, folder: Path) -> dict[str, Any]:
    """Run the checks in the environment in ``folder`` and return what was seen."""
    venv, environment = folder / "venv", _environment(folder)
    code = "import sys, torch, numpy; print(sys.version.split()[0], torch.__version__, numpy.__version__)"
    versions = subprocess.run(
        [venv / "bin" / "python", "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return {
        "pair": pair,
        "package": package.name,
        "package_bytes": package.stat().st_size,
        "python": versions[0],
        "torch": versions[1],
        "numpy": versions[2],
        "checks": {name: _outcome(command, venv, work, environment) for name, command in CHECKS.items()},
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of a user who has nothing of memfit: stores and caches lie in
    ``folder``."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MEMFIT", "PYTHON", "VIRTUAL_ENV"))}
    folders = {
        "HOME": folder,
        "XDG_CACHE_HOME": folder / "cache",
        "XDG_DATA_HOME": folder / "data",
        "TMPDIR": folder,
    }
    return {**own, **{k: str(v) for k, v in folders.items()}}


def _outcome(
    command: Sequence[str], venv: Path, work: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run ``command`` of the environment ``venv`` in the folder ``work`` and return its exit code, seconds,
    and the last line on standard error if the code is not 0."""
    start = time.monotonic()
    run = subprocess.run(
        [venv / "bin" / command[0], *command[1:]],
        cwd=work,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stderr.strip().splitlines()
    said = lines[-1].replace(str(work.parent), "")[:300] if run.returncode and lines else ""
    return {"code": run.returncode, "seconds": round(time.monotonic() - start, 1), "said": said}


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of the last record of each pair and kind of package."""
    last = {(r["pair"], r["package"].endswith(".whl")): r for r in records}
    names = list(CHECKS)
    rows = []
    for (_, is_wheel), record in sorted(last.items()):
        cells = [_cell(record["checks"].get(name)) for name in names]
        version = record["package"].split("-")[1].removesuffix(".tar.gz")
        what = f"{version}, {'wheel' if is_wheel else 'sdist'}, {record['package_bytes'] / 1e6:.1f} MB"
        rows.append([record["python"], record["torch"], what, *cells, record["when"][:10]])
    head = ["Python", "torch", "memfit", *names, "date"]
    table = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    untried = [p for p in PAIRS if p not in {pair for pair, _ in last}]
    notes = [f"Pairs of the script that were not tried: {', '.join(untried) or 'none'}.", ""]
    notes += [
        f"- {record['python']}, torch {record['torch']}, {name}: {check['said']}"
        for record in last.values()
        for name, check in record["checks"].items()
        if check["code"]
    ]
    head_lines = _HEAD.format(poc=" ".join(POC)).splitlines()
    return "\n".join([*head_lines, *lines, "", *notes]).rstrip() + "\n"


_HEAD = """# Python and torch versions

Generated by `python benchmarks/support_matrix.py` from `benchmarks/records/support_matrix.jsonl`; do not
edit. Each row is an empty environment into which the package was installed, without the repository. A cell
has the seconds that the command took, if it ended with exit code 0 (cores may have been shared). `imports`:
every module, without optional packages. `poc`: `memfit {poc}`.

"""


def _cell(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "not tried"
    return f"{check['seconds']:g} s" if check["code"] == 0 else f"**exit code {check['code']}**"


def read_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=[], metavar="PYTHON:TORCH")
    parser.add_argument("--sdist", action="store_true", help="install the sdist in place of the wheel")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a check fails")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    failed: list[str] = []
    if not options.page and shutil.which("uv") is None:
        sys.exit("uv is not installed, which makes the environments; run `pip install uv`")
    if not options.page:
        for pair in options.pairs or PAIRS:
            folder = Path(tempfile.mkdtemp(prefix="memfit-matrix-"))
            try:
                package = build(folder)[options.sdist]
                install(pair, package, folder)
                record = check(pair, package, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record))
            failed += [name for name, check in record["checks"].items() if check["code"]]
    PAGE.write_text(page(read_records()), encoding="utf-8")
    if options.strict and failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
