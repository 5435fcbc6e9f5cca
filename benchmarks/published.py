"""Memory of published training runs, predicted from their descriptions and compared with what was measured.

    python benchmarks/published.py --csv FILE [--json] [--page FILE] [--only REGEX] [--jobs N]

Prints a line per row (id, quality, metric, measured and predicted GiB, error) and the summary. ``--json``
prints both as JSON instead. Rows that cannot be expressed are refused with the reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from published.rows import read
from published.score import Scored, line, page, score, summaries


def main() -> None:
    args = _arguments()
    rows = [r for r in read(args.csv) if re.search(args.only, r["id"])]
    scored = []
    for found in _scored(rows, args.jobs):
        scored.append(found)
        if not args.json:
            print(line(found), flush=True)
    if args.json:
        rows_out = [{**dataclasses.asdict(s), "error": s.error} for s in scored]
        whole = [dataclasses.asdict(s) for s in summaries(scored)]
        print(json.dumps({"rows": rows_out, "summary": whole}, indent=1))
    else:
        for s in summaries(scored):
            print(
                f"{s.name}: {s.predicted} of {s.rows} predicted"
                + _errors(s.median, s.median_of_sources, s.worst)
            )
    if args.page:
        args.page.write_text(page(scored, "python benchmarks/published.py --csv published.csv"))


def _errors(median: float | None, sources: float | None, worst: float | None) -> str:
    if median is None or sources is None or worst is None:
        return ""
    return f", median error {median:.1%}, median of sources' medians {sources:.1%}, worst {worst:.1%}"


def _scored(rows: list[dict[str, str]], jobs: int) -> Iterator[Scored]:
    if jobs == 1:
        yield from (s for s in map(score, rows) if s is not None)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from (s for s in pool.map(score, rows) if s is not None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="a file with the columns of published.csv")
    parser.add_argument("--json", action="store_true", help="print rows and summary as JSON")
    parser.add_argument("--page", type=Path, help="write the page with every row here")
    parser.add_argument("--only", default="", help="rows whose id matches this pattern")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
