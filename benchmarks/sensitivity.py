"""Could the test of each science job have seen a loss? Its negative control must be judged different, and a
repetition of plain training without any technique must be judged equivalent.

    python benchmarks/sensitivity.py [JOB ...]   train what is not in the records yet, write the page
    python benchmarks/sensitivity.py --page      the page from the records only
    python benchmarks/sensitivity.py --package   the power studies that memfit ships, made from the records

Protocol, fixed in a commit before the first run (`PROTOCOLS` below):

- Steps, batch, metric, surrogates, margins and negative control are the job's own, those of its proof of
  concept. The margin comes from the science, as the job states it.
- Per seed three trainings: plain training; the negative control; and plain training again, with every initial
  weight moved by at most one unit in its last place, which is less than any technique above E0 changes.
- Judged as in a proof of concept: paired two one-sided t tests at 5 % on each endpoint. A training is
  different if it is in one endpoint, and equivalent if it is in all.
- A job passes if its control is different and its repetition equivalent.
- A job that does not pass may be revised once: another metric or surrogate, never another margin of the same
  endpoint, and other seeds. Its first result stays in the page.

Each training is a process of its own. Every number of the page comes from
benchmarks/records/sensitivity.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memfit.engines.registry import render
from memfit.jobs.registry import load
from memfit.runtime.child_process import run
from memfit.store.environment import fingerprint
from memfit.types import serialization
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import EndpointDifference, OutcomeKind, PowerStudy, VerdictKind
from memfit.verify.sensitivity import degrade_run, endpoint_differences, overall

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records" / "sensitivity.jsonl"
PAGE = FOLDER / "sensitivity.md"
PACKAGED = FOLDER.parent / "src" / "memfit" / "verify" / "power_studies.json"
ARMS = ("plain", "control", "repetition")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyProtocol:
    """The trainings of one job. ``version``: 1, or 2 for a revision. ``note``: what was revised and why."""

    job: str
    seeds: tuple[int, ...]
    version: int = 1
    note: str = ""


# Five seeds where earlier records (benchmarks/science.md) show a wide spread between plans, else four.
PROTOCOLS = (
    StudyProtocol(job="protein-ss", seeds=(0, 1, 2, 3)),
    StudyProtocol(job="molecules", seeds=(0, 1, 2, 3)),
    StudyProtocol(
        job="molecules",
        version=2,
        seeds=(10, 11, 12, 13),
        note=(
            "half the training changed the RMSE of single seeds by -0.25 to +0.17 log units, as an offset of "
            "all predictions differs from step to step. The surrogate, the RMSE over training molecules with "
            "the metric's margin, was replaced by their squared correlation, which no offset moves, with a "
            "margin from the rules for accepting such models; no value of it had been computed. Fresh seeds."
        ),
    ),
    StudyProtocol(job="genome", seeds=(0, 1, 2, 3)),
    StudyProtocol(job="potential", seeds=(0, 1, 2, 3)),
    StudyProtocol(job="segmentation3d", seeds=(0, 1, 2, 3, 4)),
    StudyProtocol(
        job="segmentation3d",
        version=2,
        seeds=(10, 11, 12, 13, 14),
        note=(
            "by Dice alone, half the training is different and the repetition equivalent; the soft Dice "
            "is noisier and left the repetition undecided. The surrogate was dropped. Fresh seeds."
        ),
    ),
    StudyProtocol(job="weather", seeds=(0, 1, 2, 3)),
    StudyProtocol(
        job="alphafold2",
        seeds=(0, 1, 2, 3),
        note=(
            "two trainings of the job as it was before 2026-11-29, when its data was rebuilt, were dropped; "
            "protocol, margin and seeds are as they were."
        ),
    ),
)
JOBS = tuple(dict.fromkeys(p.job for p in PROTOCOLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)}; default all")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--package", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.jobs) - set(JOBS)):
        parser.error(f"no science job {', '.join(unknown)}: {', '.join(JOBS)}")
    if not (options.page or options.package):
        for protocol in (p for p in PROTOCOLS if not options.jobs or p.job in options.jobs):
            train(protocol)
    if options.package:
        latest = {p.job: p for p in PROTOCOLS}.values()  # also studies that show no sensitivity
        studies = [study for p in latest if (study := power_study(p)) is not None]
        PACKAGED.write_text(serialization.dumps(studies, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


# -- training --------------------------------------------------------------------------------------------


def train(protocol: StudyProtocol) -> None:
    """Make the trainings of ``protocol`` that are not recorded, and append a record of each."""
    present = {(r["arm"], r["seed"]) for r in recorded(protocol)}
    job = load(JobRef(spec=protocol.job))
    for seed in protocol.seeds:
        for arm in ARMS:
            if (arm, seed) not in present:
                record = measure(job, protocol, arm, seed)
                with RECORDS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def measure(job: Job, protocol: StudyProtocol, arm: str, seed: int) -> dict[str, Any]:
    spec = RunSpec(
        name=arm,
        role="run",
        job=JobRef(spec=protocol.job),
        plan=Plan(),
        seed=seed,
        steps=job.steps,
        batch_size=job.batch_size,
        threads=1,
    )
    if arm == "control":
        spec = degrade_run(spec, job.negative_control)
    elif arm == "repetition":
        spec = dataclasses.replace(spec, degraded="last-bit")
    measurement = run(render(spec), on_event=lambda event: None)
    assert measurement.outcome is OutcomeKind.OK, f"{protocol.job} {arm} {seed}: {measurement.reason}"
    assert measurement.metric is not None
    assert job.metric is not None
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": protocol.version,
        "job": protocol.job,
        "size": job.size,
        "arm": arm,
        "negative_control": job.negative_control,
        "seed": seed,
        "steps": job.steps,
        "batch_size": job.batch_size,
        "margins": {e.name: e.margin for e in job.endpoints},
        "scores": {job.metric.name: measurement.metric, **measurement.surrogates},
        "losses": [float(f"{loss:.5g}") for loss in measurement.losses],
        "wall_s": round(measurement.wall_s, 2),
        "load": os.getloadavg()[1],
        "commit": _commit(),
        "environment": dict(fingerprint()),
    }


def _commit() -> str:
    given = os.environ.get("MEMFIT_COMMIT")  # of an exported tree
    command = ["git", "-C", str(FOLDER), "rev-parse", "HEAD"]
    return given or subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# -- judging ---------------------------------------------------------------------------------------------


def recorded(protocol: StudyProtocol) -> list[dict[str, Any]]:
    """Return the records of ``protocol``, of several of one training the last."""
    if not RECORDS.exists():
        return []
    records = map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    own = (r for r in records if (r["job"], r["version"]) == (protocol.job, protocol.version))
    return list({(r["arm"], r["seed"]): r for r in own if r["seed"] in protocol.seeds}.values())


def power_study(protocol: StudyProtocol) -> PowerStudy | None:
    """Return the study of ``protocol``; None while trainings are missing. Endpoints and margins are those of
    the records."""
    records = recorded(protocol)
    if len(records) < len(ARMS) * len(protocol.seeds):
        return None
    scores = {arm: [_score(records, arm, seed) for seed in protocol.seeds] for arm in ARMS}
    job, first = load(JobRef(spec=protocol.job)), records[0]
    template = job.metric
    assert template is not None
    units = {e.name: e.unit for e in job.endpoints}  # an endpoint of an earlier version had the metric's
    endpoints = [
        dataclasses.replace(template, name=name, margin=margin, unit=units.get(name, template.unit))
        for name, margin in first["margins"].items()
    ]
    return PowerStudy(
        job=protocol.job,
        size=first["size"],
        steps=first["steps"],
        batch_size=first["batch_size"],
        negative_control=first["negative_control"],
        seeds=protocol.seeds,
        control=endpoint_differences(scores["plain"], scores["control"], endpoints),
        repetition=endpoint_differences(scores["plain"], scores["repetition"], endpoints),
        date=max(r["created"] for r in records)[:10],
    )


def _score(records: Sequence[dict[str, Any]], arm: str, seed: int) -> dict[str, float]:
    return next(r["scores"] for r in records if (r["arm"], r["seed"]) == (arm, seed))


def verdicts(study: PowerStudy) -> tuple[VerdictKind, VerdictKind]:
    """Return how the control and the repetition were judged."""
    control, repetition = ([e.kind for e in results] for results in (study.control, study.repetition))
    return overall(control), overall(repetition)


def passes(study: PowerStudy) -> bool:
    return verdicts(study) == (VerdictKind.DIFFERENT, VerdictKind.EQUIVALENT)


# -- page ------------------------------------------------------------------------------------------------


def page() -> str:
    lines = [
        "# Could the tests have seen a loss?",
        "",
        "Generated by `python benchmarks/sensitivity.py` from `benchmarks/records/sensitivity.jsonl`; do not",
        "edit. The protocol is at the top of the script and was committed before the first run.",
        "",
        "Each science job, at the steps of its proof of concept: plain training, its negative control and a",
        "repetition of plain training, on paired seeds. The repetition has the same seed and no technique;",
        "each initial weight is moved by at most one unit in its last place. (On a processor, plain training",
        "repeated with nothing changed is bitwise equal and would show nothing.) The control must be judged",
        "different and the repetition equivalent.",
        "",
        *_conditions(),
        "",
        "| job | seeds | steps | control | control judged | repetition judged | sensitive |",
        "|---|--:|--:|---|---|---|---|",
        *(_row(p) for p in PROTOCOLS),
        "",
        "Differences to plain training: mean over seeds, in brackets the 90 % interval.",
        "",
        "| job | endpoint | plain | margin | control | judged | repetition | judged |",
        "|---|---|--:|--:|--:|---|--:|---|",
        *(line for p in PROTOCOLS for line in _endpoint_rows(p)),
        "",
        "Where the margins come from:",
        "",
        *_sources(),
        "",
        *_notes(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _conditions() -> Iterator[str]:
    """Yield a line for each processor, version of torch and commit of the trainings."""
    records = [r for p in PROTOCOLS for r in recorded(p)]
    for key in dict.fromkeys((_environment(r), r["commit"][:8]) for r in records):
        days = sorted({r["created"][:10] for r in records if (_environment(r), r["commit"][:8]) == key})
        yield f"- {key[0]}, commit {key[1]}, {' and '.join(dict.fromkeys((days[0], days[-1])))}"


def _environment(record: dict[str, Any]) -> str:
    environment = record["environment"]
    return f"{environment.get('processor')}, one thread, torch {environment.get('torch')}"


def _label(protocol: StudyProtocol) -> str:
    return protocol.job + (f", revision {protocol.version - 1}" if protocol.version > 1 else "")


def _row(protocol: StudyProtocol) -> str:
    study = power_study(protocol)
    if study is None:
        count, needed = len(recorded(protocol)), len(ARMS) * len(protocol.seeds)
        return f"| {_label(protocol)} | {len(protocol.seeds)} | | | {count} of {needed} trainings made | | |"
    control, repetition = verdicts(study)
    return (
        f"| {_label(protocol)} | {len(study.seeds)} | {study.steps} | {study.negative_control} | {control}"
        f" | {repetition} | {'yes' if passes(study) else 'no'} |"
    )


def _endpoint_rows(protocol: StudyProtocol) -> Iterator[str]:
    study = power_study(protocol)
    if study is None:
        return
    records = recorded(protocol)
    for control, repetition in zip(study.control, study.repetition, strict=True):
        plain = [r["scores"][control.name] for r in records if r["arm"] == "plain"]
        yield (
            f"| {_label(protocol)} | {control.name}{f' ({control.unit})' if control.unit else ''}"
            f" | {min(plain):.4g} to {max(plain):.4g} | {control.margin:.3g} | {_interval(control)}"
            f" | {control.kind} | {_interval(repetition)} | {repetition.kind} |"
        )


def _interval(result: EndpointDifference) -> str:
    return f"{result.difference:+.3g} ({result.low:+.3g} to {result.high:+.3g})"


def _sources() -> Iterator[str]:
    for name in JOBS:
        endpoints = load(JobRef(spec=name)).endpoints
        for source in dict.fromkeys(e.margin_source for e in endpoints):
            same = [e for e in endpoints if e.margin_source == source]
            names = ", ".join(e.name for e in same)
            yield f"- `{name}`, {names}: {same[0].margin:.3g} {same[0].unit}".rstrip() + f": {source}."


def _notes() -> Iterator[str]:
    for protocol in PROTOCOLS:
        if protocol.note:
            yield f"- `{_label(protocol)}`: {protocol.note}"


if __name__ == "__main__":
    main()
