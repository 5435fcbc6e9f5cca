"""Lint the example configurations of the libraries themselves: what is found there is an alarm to be argued.

::

    python benchmarks/lint_examples.py FOLDER...      # folders of git checkouts; writes lint_examples.md
    python benchmarks/lint_examples.py      # only counts, in lint_examples.md, the rules added since

Every JSON, YAML, TOML and shell file that ``memfit lint`` knows is read, and every fenced JSON, YAML or TOML
block of the documentation. Findings are listed with the argument that is kept in lint_arguments.toml; one
without an argument is a false alarm until somebody looks.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

from memfit.lint.check import CHECKS, Finding, check
from memfit.lint.parse import KINDS, Setup, read
from memfit.lint.to_plan import convert
from memfit.types.errors import UserError

HERE = Path(__file__).parent
SUFFIXES = (".json", ".yaml", ".yml", ".toml", ".sh")
SKIP = re.compile(r"(^|/)(\.git|\.github|node_modules|third_party|\.circleci|\.gitlab)(/|$)")
FENCE = re.compile(r"^```(json|ya?ml|toml)[^\n]*\n(.*?)^```", re.M | re.S)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkout:
    name: str
    commit: str
    kinds: collections.Counter[str]
    findings: tuple[tuple[str, Finding], ...]


def linted(folder: Path) -> Checkout:
    kinds: collections.Counter[str] = collections.Counter()
    findings = []
    for name, path in files(folder):
        try:
            setup = read([path])
        except UserError:
            continue
        kinds[kind(setup)] += 1
        convert(setup)  # every example can be read as a plan
        findings += [(name, found) for found in check(setup)]
    return Checkout(
        name=remote(folder), commit=git(folder, "rev-parse", "HEAD"), kinds=kinds, findings=tuple(findings)
    )


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if SKIP.search(name) or not path.is_file():
            continue
        if path.suffix in SUFFIXES:
            yield name, path
        elif path.suffix == ".md":
            text = path.read_text(encoding="utf-8", errors="replace")
            for index, (language, body) in enumerate(FENCE.findall(text), start=1):
                with tempfile.TemporaryDirectory() as place:
                    block = Path(place) / f"block.{language}"
                    block.write_text(body, encoding="utf-8")
                    yield f"{name}, block {index}", block


def kind(setup: Setup) -> str:
    """Of the file that was read: Accelerate's may hold another's settings, and all may name DeepSpeed's."""
    return next(n for n in ("accelerate", *reversed(KINDS)) if getattr(setup, n) is not None)


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def remote(folder: Path) -> str:
    """owner/name, or the folder's name where there is no such remote."""
    try:
        url = git(folder, "remote", "get-url", "origin")
    except subprocess.CalledProcessError:
        return folder.name
    parts = re.split(r"[/:]", url.removesuffix(".git").rstrip("/"))
    return "/".join(parts[-2:]) if "github.com" in url else folder.name


def page(checkouts: list[Checkout], arguments: dict[str, dict[str, str]], note: str) -> str:
    rows = [(c, name, found) for c in checkouts for name, found in c.findings]
    argued = [(c, n, f, why) for c, n, f in rows if (why := argument(arguments, n, f))]
    false = [(c, n, f) for c, n, f in rows if not argument(arguments, n, f)]
    total = sum(sum(c.kinds.values()) for c in checkouts)
    lines = [*_HEAD, _COUNTED.format(total=total, rules=len(CHECKS), right=len(argued), false=len(false)), ""]
    lines += ["| repository | commit | configurations | findings |", "|---|---|---|--:|"]
    for c in checkouts:
        counts = ", ".join(f"{k} {n}" for k, n in sorted(c.kinds.items()))
        lines.append(f"| {c.name} | {c.commit[:12]} | {counts} | {len(c.findings)} |")
    lines += ["", *textwrap.wrap(note, 110), "", "## False alarms", "", *table([(*r, "") for r in false])]
    lines += ["", "## Right alarms, with the argument", "", *table(argued)]
    return "\n".join(lines) + "\n"


_HEAD = (
    "# memfit lint on the libraries' own examples",
    "",
    "Written by `benchmarks/lint_examples.py`, which takes folders of checkouts; nothing of them is kept.",
    "A finding without an argument (lint_arguments.toml) is a false alarm.",
    "",
)
_COUNTED = "{total} configurations, {rules} rules: {right} findings that are right, {false} false."


def with_later_rules(text: str, rules: int) -> str:
    """Return the page with the number of those of ``rules`` rules that are newer than its findings."""

    def counted(match: re.Match[str]) -> str:
        later = rules - int(match[2])
        return match[1] + f" Rules added later, not tried on these: {later}." * bool(later)

    return re.sub(r"^(\d+ configurations, (\d+) rules: .*? false\.).*$", counted, text, flags=re.MULTILINE)


def table(found: list[tuple[Checkout, str, Finding, str]]) -> list[str]:
    rows = [
        f"| {c.name} | {name} | {f.rule} | {f.says.replace('|', chr(92) + '|')} | {why} |"
        for c, name, f, why in found
    ]
    head = ["| repository | file | rule | finding | argument |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else ["None."]


def argument(arguments: dict[str, dict[str, str]], name: str, found: Finding) -> str:
    """Of the first pattern of the rule that the file's name matches."""
    return next(
        (why for pattern, why in arguments.get(found.rule, {}).items() if re.search(pattern, name)), ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "lint_examples.md")
    given = parser.parse_args()
    if not given.folders:
        text = given.out.read_text(encoding="utf-8")
        given.out.write_text(with_later_rules(text, len(CHECKS)), encoding="utf-8")
        return
    arguments = tomllib.loads((HERE / "lint_arguments.toml").read_text(encoding="utf-8"))
    note = str(arguments.pop("note"))
    checkouts = [linted(folder) for folder in given.folders]
    given.out.write_text(page(checkouts, arguments, note), encoding="utf-8")
    print(*(line for line in given.out.read_text(encoding="utf-8").splitlines()[5:8] if line), sep="\n")


if __name__ == "__main__":
    main()
