"""Memory and step time of published training runs, predicted from their descriptions.

    python benchmarks/published.py --csv FILE [--json] [--record] [--only REGEX] [--held-out] [--jobs N]
    python benchmarks/published.py --page                 the page from the last record

Prints a line per row (id, quality, mem_metric, measured and predicted GiB, error; seconds of a step where a
speed was published) and the summary. ``--json`` prints both as JSON instead (sizes in GiB, times in seconds).
Rows that cannot be expressed are refused with the reason. ``--held-out`` also chooses the constants of time
that were set after rows had been seen again without each source in turn (published/held_out.py).
``--record`` adds the run to benchmarks/records/published.jsonl and writes benchmarks/published.md from it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from published.held_out import study
from published.page import HEADER, in_words, line, page
from published.rows import read
from published.score import Scored, score, summaries, sweeps, times
from published.step_time_page import held_out_in_words, sweep_in_words, time_in_words

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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    begun = time.perf_counter()
    scored = _all(rows, args)
    results = {
        "unit": "GiB",
        "rows": [s.as_row() for s in scored],
        "summary": [dataclasses.asdict(s) for s in summaries(scored)],
        "times": [dataclasses.asdict(t) for t in times(scored)],
        "sweeps": [dataclasses.asdict(s) for s in sweeps(scored)],
    }
    if args.held_out:
        results["held_out"] = study(rows, scored, args.jobs)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        print(*map(in_words, summaries(scored)), *map(time_in_words, times(scored)), sep="\n")
        print(*map(sweep_in_words, sweeps(scored)), sep="\n")
        if args.held_out:
            print(*held_out_in_words(results["held_out"]), sep="\n")
    if args.record:
        _record(results, time.perf_counter() - begun, args)
    return 0


def _all(rows: Sequence[dict[str, str]], args: argparse.Namespace) -> list[Scored]:
    scored = []
    if not args.json:
        print(HEADER)
    for found in _scored(rows, args.jobs):
        scored.append(found)
        if not args.json:
            print(line(found), flush=True)
    return scored


def _scored(rows: Sequence[dict[str, str]], jobs: int) -> Iterator[Scored]:
    if jobs == 1:
        yield from map(score, rows)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from pool.map(score, rows)


def _record(results: dict[str, Any], took_s: float, args: argparse.Namespace) -> None:
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_s": round(took_s),
        "command": f"python benchmarks/published.py --csv {args.csv.name} --record"
        + " --held-out" * args.held_out,
        "environment": dict(fingerprint()),
    }
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**about, **results}) + "\n")
    _write_page()


def _write_page() -> None:
    if not RECORDS.exists():
        raise UserError(f"no record yet in {RECORDS}", hint="run with --csv FILE --record first")
    PAGE.write_text(page(json.loads(RECORDS.read_text(encoding="utf-8").splitlines()[-1])), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a file with the columns of published.csv")
    parser.add_argument("--json", action="store_true", help="print rows and summary as JSON")
    parser.add_argument("--record", action="store_true", help="add a record, and write the page from it")
    parser.add_argument("--page", action="store_true", help="write the page from the last record only")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose id matches this pattern")
    parser.add_argument(
        "--held-out", action="store_true", help="choose constants again without each source, and predict it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    args = parser.parse_args()
    if args.csv is None and not args.page:
        parser.error("--csv FILE is needed")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is no pattern: {error}")
    return args


if __name__ == "__main__":
    sys.exit(main())
