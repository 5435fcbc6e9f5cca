"""Repeat what memfit says about its performance: claim -> command -> record -> page.

    python benchmarks/reproduce.py --list            claims, with their commands, records and pages
    python benchmarks/reproduce.py --pages           write every page from its records, and compare
    python benchmarks/reproduce.py --quick           the pages, and a small part of measuring: 10 minutes
    python benchmarks/reproduce.py --all             measure; new records and pages replace the old ones
    python benchmarks/reproduce.py --all search ...  of these claims only

The table is claims.toml. Exit code 1: a command failed, or a page differs from its records. ``--pages`` and
``--quick`` work on a copy of benchmarks/ and docs/ in a temporary folder and change nothing here. What a
claim needs beyond this repository is said, and ``--all`` leaves it out unless it is named. ``--all`` takes
days on two cores; what is measured on another machine differs in times, and by a few KiB in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
COPIED: Final = ("benchmarks", "docs")  # what commands write to


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of claims.toml, whose head explains the fields. Commands are arguments of Python."""

    id: str
    measure: str
    page: str = ""
    records: tuple[str, ...] = ()
    render: str = ""
    quick: str = ""
    needs: str = ""


def read_claims() -> list[Claim]:
    rows = tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text(encoding="utf-8"))
    return [Claim(id=name, **row | {"records": tuple(row.get("records", ()))}) for name, row in rows.items()]


def copy_of_repository(folder: Path) -> Path:
    """Make a copy of this repository in ``folder``: what commands write to is copied, the rest are links."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def run(command: str, root: Path) -> tuple[str, str]:
    """Run ``command`` in ``root``. Return two lines: what went wrong, or "", and the last one it printed."""
    paths = os.pathsep.join(str(root / name) for name in ("src", "benchmarks"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout.strip().splitlines()[-1:]
    errors = done.stderr.strip().splitlines()[-1:] or printed
    return f"exit code {done.returncode}: {''.join(errors)}" if done.returncode else "", "".join(printed)


def rendered(claim: Claim, root: Path) -> str:
    """Write the claim's page from its records in the copy ``root`` and return "" if it is the page that is
    kept, else what is wrong."""
    if not claim.page.startswith("docs/"):  # of which only a part is written from records
        (root / claim.page).unlink()
    problem, _ = run(claim.render, root)
    if problem:
        return problem
    if not (root / claim.page).exists():
        return "the command did not write the page"
    is_same = (root / claim.page).read_bytes() == (ROOT / claim.page).read_bytes()
    return "" if is_same else f"{claim.page} differs from its records; write it again: python {claim.render}"


def check_pages(claims: Sequence[Claim], root: Path) -> Iterator[tuple[str, str, float]]:
    for claim in claims:
        if claim.render:
            start = time.monotonic()
            yield f"page of {claim.id}", rendered(claim, root), time.monotonic() - start


def measure(claims: Sequence[Claim], root: Path, *, quick: bool) -> Iterator[tuple[str, str, float]]:
    for claim in claims:
        if command := claim.quick if quick else claim.measure:
            start = time.monotonic()
            problem, said = run(command, root)
            yield f"{claim.id}: python {command}: {said[:200]}", problem, time.monotonic() - start


def listed(claims: Sequence[Claim]) -> Iterator[str]:
    for claim in claims:
        records = ", ".join(f"benchmarks/records/{r}" for r in claim.records) or "none"
        yield f"{claim.id}\n  measure: python {claim.measure}\n  records: {records}"
        render = f", from the records: python {claim.render}" if claim.render else ""
        yield f"  page:    {claim.page or 'none'}{render}"
        if claim.needs:
            yield f"  needs:   {claim.needs}"


def report(outcomes: Iterator[tuple[str, str, float]]) -> int:
    """Print each outcome when it is known, and return the number of problems."""
    problems = 0
    for what, problem, seconds in outcomes:
        print(f"{'FAILED' if problem else 'ok'}  {what} ({seconds:.0f} s)", flush=True)
        if problem:
            print(f"        {problem}")
            problems += 1
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    for name in ("list", "pages", "quick", "all"):
        mode.add_argument(f"--{name}", action="store_true")
    parser.add_argument("ids", nargs="*", metavar="CLAIM")
    options = parser.parse_args()
    claims = read_claims()
    if unknown := set(options.ids) - {claim.id for claim in claims}:
        parser.error(f"no such claim: {', '.join(sorted(unknown))}; --list shows them")
    claims = [claim for claim in claims if claim.id in options.ids or not options.ids]
    if options.list:
        print("\n".join(listed(claims)))
        return 0
    if options.all:
        wanted = [claim for claim in claims if options.ids or not claim.needs]
        for claim in claims:
            if claim not in wanted:
                print(f"left out  {claim.id}: it needs {claim.needs}")
        return 1 if report(measure(wanted, ROOT, quick=False)) else 0
    with tempfile.TemporaryDirectory(prefix="memfit-reproduce-") as folder:
        root = copy_of_repository(Path(folder))
        problems = report(check_pages(claims, root))
        if options.quick:
            problems += report(measure(claims, root, quick=True))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
