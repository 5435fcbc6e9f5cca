"""The predicted peak of twelve public training scripts, unmodified, against the peak that each one has.

    python benchmarks/scripts.py [NAME ...] --sources DIR               prepare, measure, predict, record
    python benchmarks/scripts.py [NAME ...] --sources DIR --prepare     make the data only
    python benchmarks/scripts.py [NAME ...] --sources DIR --truth-only  measure only, record nothing
    python benchmarks/scripts.py --page                                 the page from the records only

scripts/scripts.toml lists the scripts: DIR holds a checkout of each repository at its commit, named by
the repository's last part. Each script runs as a user would start it. The truth is the peak of live
tensor bytes of torch's CPU allocator from the first forward pass that computes gradients to the end of
the last optimizer step that memfit traces (the second, or up to the fifth), the highest over ranks; it is
counted in the script's own processes by scripts/counting/sitecustomize.py. The prediction is `memfit
estimate -- COMMAND`. Every number in the page comes from benchmarks/records/scripts.jsonl; of several
records of a script the latest counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from scripts.corpus import PublicScript, ScriptError, check_unmodified, load_scripts
from scripts.measure import PREDICTED_STEPS, environment_of, measure, predict, prepare
from scripts.page import RECORDS, line, write_page


def main() -> int:
    options = _options()
    if options.page:
        write_page()
        return 0
    sources: Path = options.sources.resolve()
    for script in (load_scripts()[n] for n in options.names or load_scripts()):
        try:
            record = _run(script, sources, options)
        except ScriptError as error:
            print(f"{script.name:12} error: {error}", file=sys.stderr)
            continue
        if record:
            print(line(record), flush=True)
        if record and not options.truth_only:
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if not (options.prepare or options.truth_only):
        write_page()
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ", ".join(load_scripts())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {names}; default all")
    parser.add_argument("--sources", type=Path, help="folder of the checkouts; data is written there, too")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each script; default 3")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--truth-only", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(load_scripts())):
        parser.error(f"no script {', '.join(unknown)}: {names}")
    if options.sources is None and not options.page:
        parser.error("--sources DIR is needed")
    return options


def _run(script: PublicScript, sources: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Prepare `script`; unless only that is asked for, measure it, predict it and return the record."""
    check_unmodified(script, sources)
    work = prepare(script, sources)
    if options.prepare:
        return None
    predicted = {} if options.truth_only else {"predicted": predict(script, sources, work)}
    steps = predicted.get("predicted", {}).get("steps", PREDICTED_STEPS)
    truth = measure(script, sources, work, repeats=options.repeats, steps=steps, peak_steps=steps)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "script": script.name,
        "use": script.use,
        "commit": script.commit,
        "sha256": script.sha256,
        "environment": environment_of(script),
        "truth": truth,
        **predicted,
    }


if __name__ == "__main__":
    sys.exit(main())
