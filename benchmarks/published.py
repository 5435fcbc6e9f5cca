"""Memory and step time of published training runs, predicted from their rows (benchmarks/PROTOCOL.md).

    python benchmarks/published.py [--csv FILE] [--json] [--record] [--only REGEX] [--memory] [--held-out]
    python benchmarks/published.py --check [--csv FILE]   checks every row, predicts nothing
    python benchmarks/published.py --page                 the page from the last record

Prints a line a row (id, quality, what was measured, measured and predicted GiB, error; seconds of a step
where a speed was published) and both lines of every statistic. ``--json`` prints both as JSON instead
(sizes in GiB, times in seconds). Rows that contradict themselves are rejected before anything is
predicted; rows that cannot be expressed are refused; both with the reason. ``--held-out`` also chooses the
constants of time that were set after rows had been seen again without each house in turn
(published/held_out.py), which the targets are judged on. ``--memory`` predicts no step times: those of the
last record stand. ``--record`` adds the run to benchmarks/records/published.jsonl and writes
benchmarks/published.md from it; rows that ``--only`` leaves out are those of the last record. ``--resume
FILE`` adds each row to FILE when it is predicted, and predicts none that FILE has."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from published.checks import contradictions
from published.held_out import restated, study
from published.page import HEADER, held_out_in_words, in_words, line, page
from published.rows import setup_of
from published.schema import DATA, problems, read
from published.score import Scored, memory, order, score, scored_of, speed_of, sweeps, times

from memfit.store.environment import fingerprint
from memfit.types.errors import UserError

_HERE = Path(__file__).parent
RECORDS, PAGE = _HERE / "records" / "published.jsonl", _HERE / "published.md"


def main() -> int:
    args = _arguments()
    try:
        if args.page:
            _write_page()
            return 0
        rows = [r for r in read(args.csv) if re.search(args.only, r["id"])]
        if not rows:
            raise UserError(f"no row's id matches {args.only!r}")
        last = _last()
        if args.memory and not last:
            raise UserError(f"no record in {RECORDS} has step times", hint="run without --memory")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.check:
        return _check(rows)
    begun = time.perf_counter()
    scored, carried = _with_earlier(_all(rows, args), last, args)
    results = {
        "unit": "GiB",
        "carried": carried,
        "rows": [s.as_row() for s in scored],
        "memory": [dataclasses.asdict(s) for s in memory(scored)],
        "times": [dataclasses.asdict(t) for t in times(scored)],
        "sweeps": [dataclasses.asdict(s) for s in sweeps(scored)],
        "order": dataclasses.asdict(order(sweeps(scored))),
    }
    if args.held_out:
        results["held_out"] = study(rows, scored, args.jobs)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        print("Memory", *(text for s in memory(scored) for text in in_words(s)), sep="\n")
        print("Step time", *(text for s in times(scored) for text in in_words(s)), sep="\n")
        if args.held_out:
            print(*held_out_in_words(results["held_out"]), sep="\n")
    if args.record:
        _record(results, scored, time.perf_counter() - begun, args)
    return 0


def _check(rows: Sequence[dict[str, str]]) -> int:
    """1 where a row is rejected."""
    found = [(r["id"], problems(r) or contradictions(r, setup_of(r))) for r in rows]
    wrong = [(name, why) for name, why in found if why]
    for name, why in wrong:
        print(f"{name}: {'; '.join(why)}")
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} rows can be predicted or refused, {len(wrong)} are rejected"
    )
    return 1 if wrong else 0


def _all(rows: Sequence[dict[str, str]], args: argparse.Namespace) -> list[Scored]:
    scored = []
    if not args.json:
        print(HEADER)
    for found in _scored(rows, args):
        scored.append(found)
        if not args.json:
            print(line(found), flush=True)
    places = {row["id"]: i for i, row in enumerate(rows)}
    return sorted(scored, key=lambda s: places[s.id])


def _scored(rows: Sequence[dict[str, str]], args: argparse.Namespace) -> Iterator[Scored]:
    """In any order."""
    one = functools.partial(score, times=not args.memory)
    done = _lines(args.resume) if args.resume else []
    kept = {row["id"]: scored_of(row) for row in done}
    yield from (kept[row["id"]] for row in rows if row["id"] in kept)
    missing = [row for row in rows if row["id"] not in kept]
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        found = map(one, missing)
        if args.jobs > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn))
            found = (
                f.result() for f in concurrent.futures.as_completed([pool.submit(one, r) for r in missing])
            )
        for scored in found:
            if args.resume:
                with args.resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(scored.as_row()) + "\n")
            yield scored


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _with_earlier(
    scored: list[Scored], last: dict[str, Any], args: argparse.Namespace
) -> tuple[list[Scored], dict[str, Any]]:
    """The rows with what this run did not predict, and what that is: step times, and rows that are recorded
    beside those of ``--only``."""
    earlier = {row["id"]: row for row in last.get("rows", [])}
    carried = {}
    if args.memory:
        scored = [dataclasses.replace(s, speed=speed_of(earlier.get(s.id, {}))) for s in scored]
        carried["times"] = last.get("carried", {}).get("times", last["created"])
    if args.record and args.only:
        own = {s.id: s for s in scored}
        ids = [row["id"] for row in read(args.csv) if row["id"] in {**earlier, **own}]
        scored = [own[i] if i in own else scored_of(earlier[i]) for i in ids]
        carried |= {"rows": len(ids) - len(own), "created": last["created"]}
    return scored, carried


def _last() -> dict[str, Any]:
    """The last record of the present form; empty where there is none."""
    found = [record for record in _lines(RECORDS) if "memory" in record]
    return found[-1] if found else {}


def _record(
    results: dict[str, Any], scored: Sequence[Scored], took_s: float, args: argparse.Namespace
) -> None:
    """The choice without houses takes an hour: without a new one, the last one stays, with its date. First
    scores of blind rows stay for good."""
    last = _last()
    if "held_out" not in results:
        before = last.get("held_out")
        results["held_out"] = restated(before, scored) if before else None
    first = {r["id"]: r for r in results["rows"] if r["blind"]}
    results["first_scores"] = {**first, **last.get("first_scores", {})}
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_s": round(took_s),
        "command": "python benchmarks/published.py --record"
        + " --memory" * args.memory
        + " --resume FILE" * bool(args.resume)
        + " --held-out" * args.held_out,
        "environment": dict(fingerprint()),
    }
    if args.held_out:
        results["held_out"] = {"created": about["created"], **results["held_out"]}
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**about, **results}) + "\n")
    _write_page()


def _write_page() -> None:
    if not (last := _last()):
        raise UserError(f"no record yet in {RECORDS}", hint="run with --record first")
    PAGE.write_text(page(last), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        default=DATA / "published.csv",
        help="a file with the columns of benchmarks/data/published.csv, which is the default",
    )
    parser.add_argument("--check", action="store_true", help="check every row, predict nothing")
    parser.add_argument("--json", action="store_true", help="print rows and summary as JSON")
    parser.add_argument("--record", action="store_true", help="add a record, and write the page from it")
    parser.add_argument("--page", action="store_true", help="write the page from the last record only")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose id matches this pattern")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep rows in FILE, and go on from them")
    parser.add_argument("--memory", action="store_true", help="predict no step times, take the last record's")
    parser.add_argument(
        "--held-out", action="store_true", help="choose constants again without each source, and predict it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is no pattern: {error}")
    return args


if __name__ == "__main__":
    sys.exit(main())
