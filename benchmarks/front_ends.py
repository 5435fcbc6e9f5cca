"""Read public files of Axolotl, LLaMA-Factory, Lightning's command line and MACE: how many options are
carried over.

::

python benchmarks/front_ends.py FOLDER:FILE...      # a git checkout, and a file in it; writes front_ends.md

Nothing of the files is kept. Per file: the options that the plan or the job has, those with a reason why not,
and those that memfit does not know."""

from __future__ import annotations

import argparse
from pathlib import Path

from lint_examples import git, remote

from memfit.lint.parse import Setup, read
from memfit.lint.to_plan import convert

OUT = Path(__file__).with_suffix(".md")
KINDS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "lightning": "Lightning", "mace": "MACE"}
HEAD = (
    "# Configurations of front ends, read into plans",
    "",
    "Written by `benchmarks/front_ends.py`, which takes files of checkouts; nothing of them is kept. Each",
    "option of a file is carried over into the plan or the job, or listed with the reason why not; options",
    "that memfit does not know are counted apart. `memfit plan --from FILE` lists them. The number of ranks",
    "is that of the file, and 1 if the file leaves it open.",
    "",
    "| library | repository | commit | file | plan | carried over | with a reason | unknown |",
    "|---|---|---|---|---|--:|--:|--:|",
)


def kind(setup: Setup) -> str:
    return next(name for name in KINDS if getattr(setup, name) is not None)


def row(folder: Path, name: str) -> str:
    setup = read([folder / name])
    found = convert(setup)
    unknown = [
        n for note in found.left_out if "knows no such" in note.reason for n in note.option.split(", ")
    ]
    reasons = sum(len(note.option.split(", ")) for note in found.left_out) - len(unknown)
    plan = " + ".join(use.technique for use in found.plan.uses) or "plain"
    plan += f" on {found.plan.ranks} ranks" if found.plan.ranks > 1 else ""
    commit = git(folder, "rev-parse", "HEAD")[:12]
    cells = (
        KINDS[kind(setup)],
        remote(folder),
        commit,
        name,
        plan,
        len(found.carried),
        reasons,
        len(unknown),
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FOLDER:FILE")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = [row(Path(folder), name) for folder, _, name in (file.partition(":") for file in given.files)]
    given.out.write_text("\n".join((*HEAD, *rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
